"""Quantised copies of the demo target, in the formats that checkpoints on the hub have.

Owns rounding to nearest and the packing of each format; vLLM reads them like anybody's. Only the
layers' matrices are rounded, and on request the LM head: embeddings and norms stay, as is usual.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from tests.support.heads_samples import DEMO_MODEL

Tensors = dict[str, torch.Tensor]
# Weights that share a scale, along a row; divides the demo's 256 and 704.
GROUP = 64
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# Rows and columns; a CPU takes 128 columns alone, and 64 divides all the demo's rows.
FP8_BLOCK = (64, 128)
# Where an int32 of AWQ keeps each of eight neighbours, lowest bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _int8_channel(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _int4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric: int8 ``[out, in]`` in [-8, 7] and scales ``[out, in / GROUP]``."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    rounded = (groups / scale).round().clamp(-8, 7)
    return rounded.flatten(1).to(torch.int8), scale.squeeze(-1)


def _packed_int4(weight: torch.Tensor) -> Tensors:
    rounded, scale = _int4_groups(weight)
    return {
        "weight_packed": pack_to_int32(rounded, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _pack(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight values from 0 to 15 along ``dim`` as one int32."""
    return pack_to_int32((values - 8).to(torch.int8), 4, packed_dim=dim).contiguous()


def _gptq(weight: torch.Tensor) -> Tensors:
    rounded, scale = _int4_groups(weight)
    # Stored zero points are one less than what they stand for.
    zeros = torch.full((weight.shape[1] // GROUP, weight.shape[0]), 7)
    return {
        "qweight": _pack(rounded.t() + 8, 0),
        "qzeros": _pack(zeros, 1),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }


def _awq(weight: torch.Tensor) -> Tensors:
    groups = weight.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    rounded = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15).flatten(1)

    def pack(values: torch.Tensor) -> torch.Tensor:
        eights = values.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)]
        return _pack(eights.flatten(-2), 1)

    return {
        "qweight": pack(rounded.t()),
        "qzeros": pack(zero.t()),
        "scales": scale.t().contiguous(),
    }


def _fp8_blocks(weight: torch.Tensor) -> Tensors:
    """One scale for each block; the last one of a row may be narrower."""
    tall, wide = FP8_BLOCK
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % wide))
    blocks = padded.unflatten(0, (-1, tall)).unflatten(-1, (-1, wide))
    scale = blocks.abs().amax((1, 3), keepdim=True) / FP8_MAX
    rounded = (blocks / scale).flatten(2).flatten(0, 1)[:, : weight.shape[1]]
    return {
        "weight": rounded.to(FP8).contiguous(),
        "weight_scale_inv": scale[:, 0, :, 0].contiguous(),
    }


def _compressed(format: str, weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"symmetric": True, "dynamic": False} | weights,
                "input_activations": activations,
            }
        },
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Format:
    """How one matrix ``[out, in]`` is stored, and what config.json says of it."""

    store: Callable[[torch.Tensor], Tensors]
    config: dict[str, Any]


FORMATS = {
    "int8": Format(
        _int8_channel,
        _compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        ),
    ),
    "packed-int4": Format(
        _packed_int4,
        _compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
        ),
    ),
    "gptq": Format(
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "awq": Format(
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "lm_head": False,
        },
    ),
    "fp8-block": Format(
        _fp8_blocks,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK),
        },
    ),
}


def save_quantised(path: Path, kind: str, *, lm_head: bool = False) -> Path:
    """Write a copy of the demo target, with a link to its heads, to ``path``.

    Args:
        kind: key of `FORMATS`.
        lm_head: untie the LM head from the embedding and quantise it, too.
    """
    format = FORMATS[kind]
    weights = load_file(DEMO_MODEL / "model.safetensors")
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    quantization = dict(format.config)
    if lm_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        config["tie_word_embeddings"] = False
        if "ignore" in quantization:
            quantization |= {"ignore": []}
            quantization["config_groups"]["group_0"]["targets"] = ["Linear", "re:.*lm_head"]
        else:
            quantization["lm_head"] = True
    stored: Tensors = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            prefix = name.removesuffix("weight")
            stored |= {prefix + part: value for part, value in format.store(weight.float()).items()}
        else:
            stored[name] = weight
    path.mkdir(parents=True)
    for file in DEMO_MODEL.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, path)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    (path / "adadecode").symlink_to(DEMO_MODEL / "adadecode")
    return path
