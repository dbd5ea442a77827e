"""What a server serves, as far as it decides what decoding costs.

Owns the sizes of target, heads and drafters, read from configs and headers alone; what follows from
them is `cost_accounting.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.costs import ModelShape
from vllm_adadecode.heads import HeadsConfig, find_heads

FLOAT32 = 4  # bytes
FLOAT32_NAMES = ("float32", "float")
# Methods whose drafter makes one draft a pass, and all of a step in one; the others look drafts up.
PER_DRAFT = ("eagle3", "draft_model")
PER_STEP = ("medusa",)


@dataclass(frozen=True)
class Target:
    """A target as it is served.

    Attributes:
        weight_bytes: of one weight of its LM head, and of a head's transform.
        layer_weight_bytes: of one weight of a layer; fewer where the layers are quantised.
    """

    shape: ModelShape
    weight_bytes: float
    layer_weight_bytes: float

    @property
    def lm_head_weights(self) -> int:
        return self.shape.hidden_size * self.shape.vocab_size

    @property
    def layer_bytes(self) -> float:
        return self.layer_weight_bytes * self.shape.layer_weights

    @property
    def lm_head_bytes(self) -> float:
        return self.weight_bytes * self.lm_head_weights

    @property
    def step_bytes(self) -> float:
        """Of one pass of all layers and the LM head: a vanilla token, or a verification."""
        return self.shape.num_layers * self.layer_bytes + self.lm_head_bytes

    @property
    def token_flops(self) -> float:
        """Of one token through all layers and the LM head."""
        return 2.0 * (self.shape.num_layers * self.shape.layer_weights + self.lm_head_weights)


@dataclass(frozen=True)
class Drafter:
    """Another method's drafter.

    Attributes:
        weights: that one pass of it reads; 0 for methods that look drafts up.
        per_step: whether one pass makes all drafts of a step; else it makes one.
    """

    weights: int = 0
    per_step: bool = False


def head_weights(heads: HeadsConfig) -> int:
    """Weights that one check of one head multiplies with."""
    d = heads.target.hidden_size
    rows = heads.draft_vocab_size or heads.target.vocab_size
    return heads.transform_parameters + d * (rows + (heads.draft_vocab_size is not None))


def head_bytes(target: Target, heads: HeadsConfig) -> float:
    """Bytes that one check of one head reads: transform, rows of the LM head or of its copy with a
    float32 scale each, and the float32 vector of the "other" logit."""
    d = heads.target.hidden_size
    rows = heads.draft_vocab_size or heads.target.vocab_size
    row = d + FLOAT32 if heads.lm_head_quantization else d * target.weight_bytes
    other = FLOAT32 * d if heads.draft_vocab_size is not None else 0
    return heads.transform_parameters * target.weight_bytes + rows * row + other


def load_target(model: str | Path, dtype: str, quantization: str | None = None) -> Target:
    """
    Args:
        model: folder or hub id.
        dtype: as `vllm serve --dtype` takes it.
        quantization: as `--quantization`; None: what the model says.

    Raises:
        AdaDecodeError: it can't be read, or its layers' bytes are not known.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise AdaDecodeError(f"{model} can't be read: {str(error).splitlines()[0]}") from None
    # "auto" is 16 bits whatever the model is stored in.
    weight = 4.0 if dtype in FLOAT32_NAMES else 2.0
    stored = getattr(config, "quantization_config", None) or {}
    method = quantization or stored.get("quant_method")
    layer_weight = weight if method is None else _quantized_bytes(method, stored)
    try:
        return Target(ModelShape.from_config(config), weight, layer_weight)
    except AdaDecodeError:
        raise AdaDecodeError(f"the config of {model} lacks a size") from None


def _quantized_bytes(method: str, config: Mapping[str, Any]) -> float:
    """Of a weight of a layer, without its scales."""
    if "fp8" in method:
        return 1.0
    if "bits" in config:
        return float(config["bits"]) / 8
    raise AdaDecodeError(f"bytes of weights quantised by {method} are not known")


def load_heads(model: str | Path, target: Target, options: Mapping[str, Any]) -> HeadsConfig:
    """The heads that a server drafts with.

    Args:
        model: the target, folder or hub id.
        options: the speculative configuration.

    Raises:
        AdaDecodeError: they can't be read.
    """
    path = find_heads(options.get("model"), str(model), options.get("revision"))
    if path is not None:
        return HeadsConfig.load(path)
    shape = target.shape
    return HeadsConfig.logit_lens(shape.hidden_size, shape.vocab_size, shape.num_layers)


def load_drafter(target: Target, options: Mapping[str, Any]) -> Drafter | None:
    """Another method's drafter, from the headers of its safetensors.

    Of the embedding a pass reads one row, unless it is the LM head as well. A drafter that brings
    no LM head uses the target's.

    Args:
        options: the speculative configuration; empty for vanilla.

    Returns:
        None if its size can't be told: it has other files, or quantised weights.
    """
    method = options.get("method")
    if method not in (*PER_DRAFT, *PER_STEP):
        return Drafter()
    sizes = tensor_sizes(str(options["model"]))
    if not sizes:
        return None
    weights = sum(size for name, size in sizes.items() if "embed_tokens" not in name)
    if not any("lm_head" in name for name in sizes):
        embeddings = [size for name, size in sizes.items() if "embed_tokens" in name]
        weights += sum(embeddings) or target.lm_head_weights
    return Drafter(weights, per_step=method in PER_STEP)


def tensor_sizes(model: str) -> dict[str, int]:
    """Number of weights by tensor; empty if they can't be told."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
            return {}
    sizes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_slice(name)
                if tensor.get_dtype() in ("F32", "F16", "BF16"):
                    sizes[name] = math.prod(tensor.get_shape())
                elif tensor.get_dtype() in ("I32", "I8", "U8", "F8_E4M3"):
                    return {}
    return sizes
