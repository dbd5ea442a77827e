"""A tiny random Llama with a byte tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 256


def save_tiny_model(folder: Path) -> None:
    """Two layers of 64, two heads of 32 (the smallest that vLLM's CPU attention takes)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        # Wide enough that greedy tokens are not ties.
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)

    special = ["<unk>", "<s>", "</s>"]
    # A few bytes that no text has make way for the special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB_SIZE - len(special)]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
