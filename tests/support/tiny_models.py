"""Small random-weight checkpoints of every supported architecture, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

NUM_LAYERS = 6

_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # Wide enough that the layers change what comes out.
    "initializer_range": 0.08,
    "dtype": "float32",
}

ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "LlamaForCausalLM": (LlamaConfig, {}),
    "MistralForCausalLM": (MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "Qwen2ForCausalLM": (Qwen2Config, {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": (Qwen3Config, {"head_dim": 32}),
    "Qwen3MoeForCausalLM": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}


def save_tiny_model(
    path: Path, architecture: str = "LlamaForCausalLM", vocab_size: int = 256, **options: Any
) -> Path:
    """Write a random model of this architecture, with a one-word-per-id tokenizer, to ``path``."""
    config_class, extra = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = config_class(vocab_size=vocab_size, **(_SHAPE | extra | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert type(model).__name__ == architecture
    model.save_pretrained(path)
    vocabulary = WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(path)
    return path


def random_prompts(count: int, vocab_size: int = 256, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts of 3 to 40 random ids."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt_token_ids": torch.randint(
                1, vocab_size, (3 + 37 * i // max(1, count - 1),), generator=generator
            ).tolist()
        }
        for i in range(count)
    ]
