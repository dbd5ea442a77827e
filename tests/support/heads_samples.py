"""Small targets and heads for the tests of heads and of the command."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_adadecode.heads import HeadsConfig, head_tensors, save_heads
from vllm_adadecode.heads import make_heads as new_heads
from vllm_adadecode.heads.checkpoint import DRAFT_VOCAB

DEMO_MODEL = Path(__file__).parents[2] / "benchmarks" / "demo" / "model"
HIDDEN, VOCAB, LAYERS = 64, 128, 4


def make_target(
    path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: int
) -> Path:
    """Save a random Llama of 4 layers, 64 wide, 128 tokens."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS} | shape
    config = LlamaConfig(
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **sizes,
    )
    model = LlamaForCausalLM(config)
    # Real final norms are not all ones.
    torch.nn.init.normal_(model.model.norm.weight, 1.0, 0.1)
    model.to(dtype).save_pretrained(path)
    return path


def heads_fields(**changes: Any) -> dict[str, Any]:
    """Fields of a valid low-rank config with exits after layers 1 and 3, changed as asked."""
    fields: dict[str, Any] = {
        "exit_layers": [1, 3],
        "confidence_threshold": [0.5, 0.75],
        "transform": "low_rank",
        "rank": 4,
        "norm": "after",
        "target": {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS},
        "speculators_config": {"verifier": {"name_or_path": ".."}},
        "provenance": {"command": "adadecode train"},
    }
    return fields | changes


def random_tensors(config: HeadsConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights for ``config``, none of them zero, and a draft vocabulary if it has one."""
    torch.manual_seed(seed)
    heads = new_heads(config, torch.float32, "cpu")
    tensors = {name: torch.randn_like(tensor) for name, tensor in head_tensors(heads).items()}
    if config.draft_vocab_size is not None:
        ids = torch.randperm(config.target.vocab_size)[: config.draft_vocab_size]
        tensors[DRAFT_VOCAB] = ids.sort().values
    return tensors


def make_heads(path: Path, **changes: Any) -> tuple[Path, HeadsConfig, dict[str, torch.Tensor]]:
    """Save valid heads."""
    config = HeadsConfig(**heads_fields(**changes))
    tensors = random_tensors(config)
    return save_heads(path, config, tensors), config, tensors


def demo_heads(folder: Path, extra: dict[str, torch.Tensor] | None = None, **fields: Any) -> str:
    """The demo's transforms without gate and draft vocabulary, threshold 0.75 and K = 5, with
    changed fields and more tensors.

    Args:
        extra: tensors; names without an exit are given to every exit.
    """
    source = DEMO_MODEL / "adadecode"
    data = HeadsConfig.load(source).model_dump() | {
        "confidence_threshold": 0.75,
        "gate": False,
        "gate_threshold": 0.5,
        "draft_vocab_size": None,
    }
    data["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 5
    data["speculators_config"]["verifier"]["name_or_path"] = str(DEMO_MODEL)
    config = HeadsConfig(**(data | fields))
    stored = load_file(source / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    for name, tensor in (extra or {}).items():
        if name == DRAFT_VOCAB or name.startswith("exit_"):
            tensors[name] = tensor
        else:
            tensors |= {f"exit_{e}.{name}": tensor.clone() for e in config.exit_layers}
    return str(save_heads(folder, config, tensors))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change top-level keys of a config.json by hand."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
