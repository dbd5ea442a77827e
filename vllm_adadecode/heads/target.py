"""What can be said about a target from its files alone, without loading it."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.files import CONFIG_NAME, read_json
from vllm_adadecode.heads.fingerprint import tensor_files


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


def fetch_config(model: str | Path) -> Path:
    """Folder with the config.json of a model or of heads; from the hub, that file alone is read.

    Raises:
        AdaDecodeError: there is none.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    str(model),
                    allow_patterns=[CONFIG_NAME],
                    local_files_only=constants.HF_HUB_OFFLINE,
                )
            )
        except (HFValidationError, HfHubHTTPError, OSError):
            raise AdaDecodeError(
                f"{model} is no folder and can't be had from the hub: give a folder or hub id"
            ) from None
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
