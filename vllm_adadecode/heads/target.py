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
from safetensors import SafetensorError, safe_open

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import read_json
from vllm_adadecode.heads.config import CONFIG_NAME
from vllm_adadecode.heads.hub import USUAL, HubOptions, hub_folder, local_folder

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
                with _open(file) as weights:
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
    return folder if folder.is_dir() else hub_folder(str(model), patterns)


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
        architectures = tuple(map(str, data.get("architectures") or ()))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise AdaDecodeError(
            f"{folder / CONFIG_NAME} lacks hidden_size, vocab_size or num_hidden_layers: it is not "
            "the config of a decoder-only language model"
        ) from None
    return TargetInfo(
        name=str(model),
        folder=folder,
        architectures=architectures,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
    )


def target_fingerprint(model_path: str | Path, options: HubOptions = USUAL) -> str | None:
    """Digest of the final norm and of some rows of the input embedding of a model.

    Float32 and bfloat16 copies of one model agree, as do bfloat16 and float16 ones.

    Args:
        model_path: the model's folder, or the id of a hub model that is in the local cache;
            nothing is downloaded.
        options: how its hub repository was read.

    Returns:
        ``"sha256:<64 hex digits>"``, or None where no safetensors file to read is found (no such
        folder, another format, other weight names, a damaged file, not in the cache).
    """
    folder = local_folder(model_path, options)
    if folder is None:
        return None
    try:
        files = tensor_files(folder)
        norm = _find(_NORM_NAMES, files)
        embedding = _find(_EMBEDDING_NAMES, files)
        if norm is None or embedding is None:
            return None
        digest = hashlib.sha256()
        with _open(files[norm]) as weights:
            _update(digest, weights.get_tensor(norm))
        with _open(files[embedding]) as weights:
            rows = weights.get_slice(embedding)
            num_rows, _ = rows.get_shape()
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


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, in whatever format."""
    return any(file.suffix in _WEIGHTS for file in folder.iterdir())


def tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor of the model, all in its folder.

    Raises:
        AdaDecodeError: its index is no index, or names files elsewhere.
        SafetensorError, OSError: a file is damaged.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        data = read_json(index)
        weight_map = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise AdaDecodeError(
                f"{index} does not name a file of this folder for every weight: copy it again"
            )
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    found: dict[str, Path] = {}
    for file in files:
        with _open(file) as weights:
            found.update(dict.fromkeys(weights.keys(), file))
    return found


def _open(file: Path) -> Any:
    """An opened safetensors file, header checked against the size of the file."""
    # Of a pipe the beginning may never come.
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file")
    return safe_open(file, framework="pt")


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


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
        with _open(file):
            pass
    except (SafetensorError, OSError):
        raise AdaDecodeError(f"{file} is no safetensors file: copy it again") from None
    length = int.from_bytes(stream.read(8), "little")
    header = stream.read(length)
    spans = [
        entry["data_offsets"]
        for name, entry in sorted(json.loads(header).items())
        if name != "__metadata__"
    ]
    digest.update(header)
    for start, end in spans:
        middle = (start + end - SAMPLE_BYTES) // 2
        for offset in (start, max(start, middle), max(start, end - SAMPLE_BYTES)):
            stream.seek(8 + length + offset)
            digest.update(stream.read(min(SAMPLE_BYTES, end - offset)))
