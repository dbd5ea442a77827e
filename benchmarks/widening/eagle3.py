"""An EAGLE-3 drafter of the small model, as `benchmarks.baselines` trains it, made to fit the wide
one.

Owns what differs from a Llama: states of the target at several depths go through a norm and one
matrix, the layer reads the embedding and the state side by side, and its own output comes back as
the state for the next draft. Its state has the target's layout (`Channels`) everywhere, behind its
norms too: what reads it divides by s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.widening import files
from benchmarks.widening.drafters import wide_provenance
from benchmarks.widening.plan import Plan
from benchmarks.widening.shape import Shape
from benchmarks.widening.target import (
    Block,
    Read,
    WideTensor,
    added_tokens,
    column_block,
    embedding_tensor,
    layer_tensors,
)
from vllm_adadecode.errors import AdaDecodeError

EMBEDDING_AND_STATE = ("q_proj", "k_proj", "v_proj")


def read_eagle3(plan: Plan, source: Path) -> dict[str, Any]:
    """The config of a drafter that can be widened.

    Raises:
        AdaDecodeError: it has parts that `benchmarks.baselines` does not make.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layer = config.get("transformer_layer_config", {})
    odd = [
        name
        for name, expected in (
            ("draft_vocab_size", plan.small.vocab_size),
            ("norm_before_fc", True),
            ("norm_before_residual", True),
            ("norm_output", True),
            ("fc_norm", False),
        )
        if config.get(name) != expected
    ]
    # One layer of the target's shape, with an LM head of its own.
    expected = vars(plan.small) | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    odd += [field.name for field in fields(Shape) if layer.get(field.name) != expected[field.name]]
    if odd:
        raise AdaDecodeError(
            f"{source} is no EAGLE-3 drafter of benchmarks.baselines ({odd[0]} differs) and can't "
            "be widened: move its folder away to go without"
        )
    return config


def widen_eagle3(plan: Plan, source: Path, folder: Path, fingerprint: str | None) -> None:
    """Write the wide model's drafter.

    Args:
        source: the small one's folder, which `read_eagle3` takes.
        fingerprint: of the wide model.
    """
    config = read_eagle3(plan, source)
    small = load_file(source / "model.safetensors")
    folder.mkdir()
    tensors = list(_tensors(plan, lambda name: small[name].double()))
    files.write(folder / "model.safetensors", tensors)
    layer = config["transformer_layer_config"]
    layer |= vars(_of_drafter(plan).wide) | {"dtype": _name(plan.dtype)}
    layer["rms_norm_eps"] *= plan.channels.energy
    rope = layer["rope_parameters"]
    rope["rope_theta"] = plan.theta(rope["rope_theta"])
    config |= {
        "draft_vocab_size": plan.wide.vocab_size,
        "dtype": _name(plan.dtype),
        "eagle_aux_hidden_state_layer_ids": [
            plan.wide_layer(layers) for layers in config["eagle_aux_hidden_state_layer_ids"]
        ],
        "provenance": wide_provenance(plan, config, fingerprint),
    }
    text = json.dumps(config, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of_drafter(plan: Plan) -> Plan:
    """The plan for its one layer, whose LM head is its own."""
    one = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    return replace(plan, small=plan.small.change(**one), wide=plan.wide.change(**one))


def _tensors(plan: Plan, read: Read) -> Iterator[WideTensor]:
    channels = plan.channels
    d, width, first, written = (
        plan.small.hidden_size,
        channels.wide,
        channels.first,
        channels.written,
    )
    into_state = plan.norm_gain * channels.scale

    def vector(name: str, gain: float) -> WideTensor:
        """A norm of one or more states side by side; the constant goes through it."""
        parts = read(f"{name}.weight").split(d)
        blocks = []
        for i, gains in enumerate(parts):
            values = (gains * gain).repeat(channels.copies)[:, None]
            blocks.append(Block(written + i * width, torch.tensor([0]), values))
            if channels.constant is not None:
                blocks.append(column_block(torch.tensor([i * width + channels.constant]), 0, 1.0))
        return WideTensor(f"{name}.weight", (len(parts) * width,), plan.dtype, tuple(blocks))

    embedding = embedding_tensor(plan, lambda _: read("embed_tokens.weight"))
    yield replace(embedding, name="embed_tokens.weight")
    yield vector("input_norm", plan.norm_gain)
    yield vector("layers.0.hidden_norm", into_state)
    yield vector("norm", into_state)
    yield from _layer(_of_drafter(plan), read)

    depths = read("fc.weight").split(d, 1)
    blocks = [
        Block(written, first + i * width, (part * channels.scale).repeat(channels.copies, 1))
        for i, part in enumerate(depths)
    ]
    if channels.constant is not None:
        constant = torch.tensor([channels.constant])
        blocks.append(column_block(constant, channels.constant, 1.0))
    yield WideTensor("fc.weight", (width, len(depths) * width), plan.dtype, tuple(blocks))

    table = read("lm_head.weight") / channels.scale
    blocks = [Block(torch.arange(len(table)), first, table)]
    if channels.constant is not None:
        blocks.append(added_tokens(plan))
    yield WideTensor("lm_head.weight", (plan.wide.vocab_size, width), plan.dtype, tuple(blocks))


def _layer(plan: Plan, read: Read) -> Iterator[WideTensor]:
    """As a Llama's, but that queries, keys and values read two states side by side."""
    d, width = plan.small.hidden_size, plan.wide.hidden_size

    def half(number: int, scale: float) -> Read:
        def of(name: str) -> torch.Tensor:
            tensor = read(name.removeprefix("model."))
            if any(part in name for part in EMBEDDING_AND_STATE):
                tensor = tensor.split(d, 1)[number] / scale
            return tensor

        return of

    halves = (half(0, 1.0), half(1, plan.channels.scale))
    for of_embedding, of_state in zip(*(layer_tensors(plan, of, 0) for of in halves), strict=True):
        name = of_embedding.name.removeprefix("model.")
        if not any(part in name for part in EMBEDDING_AND_STATE):
            yield replace(of_embedding, name=name)
            continue
        moved = [replace(block, columns=block.columns + width) for block in of_state.blocks]
        rows, _ = of_embedding.shape
        yield WideTensor(name, (rows, 2 * width), plan.dtype, (*of_embedding.blocks, *moved))
