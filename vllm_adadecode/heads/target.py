"""What can be said about a target from its files alone, without loading it.

Owns what its config.json says, where its weights are found in safetensors files, and two digests: a
fingerprint of a few weights, by which heads recognise their target, also as a copy in another
precision; and one of all files, the key of what is cached for a target, since fine-tuning may have
left those few as they were.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import read_json
from vllm_adadecode.heads.config import CONFIG_NAME

INDEX_NAME = "model.safetensors.index.json"
# Spread over any vocabulary; those beyond it are left out.
SAMPLE_ROWS = (0, 3, 17, 101, 251, 499, 997, 1999, 4001, 9973, 20011, 50021, 100003)
# A bfloat16 value from here up is exact in float16; below, float16 may drop bits.
SMALLEST = 2.0**-14

# Of the beginning, the middle and the end of each tensor. Training changes all values of a tensor,
# or at least all of a row.
SAMPLE_BYTES = 4096
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_OTHERS = (".json", ".jinja", ".model", ".txt")

_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
_NORM_NAMES = tuple(f"{prefix}norm.weight" for prefix in _PREFIXES)
_EMBEDDING_NAMES = (
    *(f"{prefix}embed_tokens.weight" for prefix in _PREFIXES),
    "tok_embeddings.weight",
)


@dataclass(frozen=True)
class TargetInfo:
    """A target model as its config.json describes it."""

    name: str
    folder: Path
    architectures: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int

    def num_parameters(self) -> int | None:
        """Weights in its safetensors files (tied ones once); None if they are not all there."""
        total = 0
        try:
            files = tensor_files(self.folder)
            for file in sorted(set(files.values())):
                with safe_open(file, framework="pt") as weights:
                    names = weights.keys()
                    total += sum(prod(weights.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        return total or None


def fetch(model: str | Path, patterns: Sequence[str]) -> Path:
    """A model's folder; from the hub (when offline, its cache), files of these patterns.

    Raises:
        AdaDecodeError: there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    offline = constants.HF_HUB_OFFLINE
    try:
        found = snapshot_download(
            str(model), allow_patterns=list(patterns), local_files_only=offline
        )
    except (HFValidationError, HfHubHTTPError, OSError):
        raise AdaDecodeError(
            f"{model} is no folder and can't be had from the hub: give a folder or hub id"
        ) from None
    return Path(found)


def fetch_config(model: str | Path) -> Path:
    """Folder with the config.json of a model or of heads; from the hub, that file alone is read.

    Raises:
        AdaDecodeError: there is none.
    """
    folder = fetch(model, [CONFIG_NAME])
    if not (folder / CONFIG_NAME).is_file():
        raise AdaDecodeError(
            f"{model} holds no {CONFIG_NAME}: give the folder of a model or of heads"
        )
    return folder


def read_target(model: str | Path) -> TargetInfo:
    """Read a target's config.json, see `fetch_config`.

    Raises:
        AdaDecodeError: it is not found, or not the config of a decoder-only model.
    """
    folder = fetch_config(model)
    data = read_json(folder / CONFIG_NAME)
    text = data.get("text_config", data) if isinstance(data, dict) else {}
    try:
        hidden_size, vocab_size, num_hidden_layers = (
            int(text[key]) for key in ("hidden_size", "vocab_size", "num_hidden_layers")
        )
    except (KeyError, TypeError, ValueError):
        raise AdaDecodeError(
            f"{folder / CONFIG_NAME} lacks hidden_size, vocab_size or num_hidden_layers: it is not "
            "the config of a decoder-only language model"
        ) from None
    return TargetInfo(
        name=str(model),
        folder=folder,
        architectures=tuple(data.get("architectures") or ()),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
    )


def target_fingerprint(model_path: str | Path) -> str | None:
    """Digest of the final norm and of some rows of the input embedding of a model.

    Float32 and bfloat16 copies of one model agree, as do bfloat16 and float16 ones.

    Args:
        model_path: the model's folder, or the id of a hub model that is in the local cache;
            nothing is downloaded.

    Returns:
        ``"sha256:<64 hex digits>"``, or None where no safetensors file to read is found (no such
        folder, another format, other weight names, a damaged file, not in the cache).
    """
    folder = local_folder(model_path)
    if folder is None:
        return None
    try:
        files = tensor_files(folder)
        norm = _find(_NORM_NAMES, files)
        embedding = _find(_EMBEDDING_NAMES, files)
        if norm is None or embedding is None:
            return None
        digest = hashlib.sha256()
        with safe_open(files[norm], framework="pt") as weights:
            _update(digest, weights.get_tensor(norm))
        with safe_open(files[embedding], framework="pt") as weights:
            rows = weights.get_slice(embedding)
            num_rows = rows.get_shape()[0]
            for row in SAMPLE_ROWS:
                if row < num_rows:
                    _update(digest, rows[row : row + 1])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    return f"sha256:{digest.hexdigest()}"


def target_digest(target: str | Path) -> str:
    """``"sha256:<hex>"`` of a target's config, tokenizer and weights.

    Files are read whole but for safetensors, of which the header and parts of every tensor are.

    Args:
        target: folder, or hub id that is in the local cache.

    Raises:
        AdaDecodeError: there are no files to read.
    """
    folder = local_folder(target)
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder else []
    weights = [p for p in files if p.suffix in _WEIGHTS]
    if not weights:
        raise AdaDecodeError(f"{target} has no weights here: give the folder or hub id of a model")
    digest = hashlib.sha256()
    for file in files:
        if file.suffix not in _WEIGHTS + _OTHERS:
            continue
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            if file.suffix == ".safetensors":
                _update_samples(digest, stream, file)
            else:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def local_folder(model: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a local model or of an already cached hub model; None if there is neither."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor of the model."""
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            found.update(dict.fromkeys(weights.keys(), file))
    return found


def _find(names: Sequence[str], files: Mapping[str, Path]) -> str | None:
    return next((name for name in names if name in files), None)


def _update(digest: Any, tensor: torch.Tensor) -> None:
    values = tensor.float().bfloat16().float()
    # Adding zero makes -0.0 the same as 0.0.
    values = torch.where(values.abs() < SMALLEST, 0.0, values) + 0.0
    digest.update(values.contiguous().numpy().tobytes())


def _update_samples(digest: Any, stream: BinaryIO, file: Path) -> None:
    """The header of a safetensors file (8 bytes of length, JSON) and samples of its tensors."""
    try:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
        spans = [
            entry["data_offsets"]
            for name, entry in sorted(json.loads(header).items())
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise AdaDecodeError(f"{file} is no safetensors file: copy it again") from None
    digest.update(header)
    for start, end in spans:
        middle = (start + end - SAMPLE_BYTES) // 2
        for offset in (start, max(start, middle), max(start, end - SAMPLE_BYTES)):
            stream.seek(8 + length + offset)
            digest.update(stream.read(min(SAMPLE_BYTES, end - offset)))
