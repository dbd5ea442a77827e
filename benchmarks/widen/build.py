"""The folder of a widened model: weights, config, heads, tokenizer and model card, whole or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig

from benchmarks.machine import record
from benchmarks.widen.heads import widen_config, widen_tensors
from benchmarks.widen.plan import Plan, Shape, make_plan
from benchmarks.widen.target import Read, wide_tensors, write
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import new_folder, read_json
from vllm_adadecode.heads import HeadsConfig, check_weights, save_heads, target_fingerprint
from vllm_adadecode.heads.config import WEIGHTS_NAME, is_heads_folder
from vllm_adadecode.heads.resolve import SUBFOLDER
from vllm_adadecode.heads.target import INDEX_NAME, tensor_files

COPIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
CARD = """# A widened model

{wide}: {weights:.3g} weights, {dtype}, made by `python -m benchmarks.widen` from a small model
({small}) whose function it computes. It costs what a model of its shape costs and says what the
small one says: for measuring speed, and for nothing else.

Made with:

{made_with}
"""


def read_config(source: Path) -> Any:
    """The `LlamaConfig` of a model.

    Raises:
        AdaDecodeError: there is none, or it is of another architecture.
    """
    data = read_json(source / "config.json")
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind != "llama":
        raise AdaDecodeError(f"{source} holds a model of type {kind!r}: only Llama can be widened")
    return LlamaConfig.from_pretrained(source)


def widen(
    source: Path,
    output: Path,
    wide: Shape,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda _: None,
    grow_draft_vocab: bool = False,
) -> Plan:
    """Write a widened copy of a model, with its heads if it has some beside it.

    Args:
        source: folder of a Llama with safetensors weights.
        output: folder that does not exist yet, or is empty.
        dtype: of the wide weights; None: the source's.
        advance: called with numbers of bytes, in all `total_bytes`.
        grow_draft_vocab: see `Plan`.

    Raises:
        AdaDecodeError: the source or the place of the output is wrong, or the shape can't be
            reached; one line.
        OSError: the disk refuses; nothing is left.
    """
    config = read_config(source)
    plan = make_plan(config, wide, dtype or config.dtype, grow_draft_vocab)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise AdaDecodeError(f"{output} exists already: give a folder that does not")
    heads = _read_heads(source, plan)
    with new_folder(output) as unfinished:
        _write_weights(unfinished, plan, _reader(source), advance)
        _wide_config(plan, config).save_pretrained(unfinished)
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
        if heads is not None:
            small, tensors = heads
            wide_heads = widen_config(plan, small, target_fingerprint(unfinished))
            save_heads(unfinished / SUBFOLDER, wide_heads, widen_tensors(plan, small, tensors))
        (unfinished / "README.md").write_text(_card(plan, source), encoding="utf-8")
    return plan


def widen_shown(
    progress: Progress,
    source: Path,
    output: Path,
    wide: Shape,
    dtype: torch.dtype | None = None,
    grow_draft_vocab: bool = True,
) -> None:
    """`widen`, with a line that says how far it is. By default a head costs its share of the LM
    head, as in the source."""
    dtype = dtype or read_config(source).dtype
    task = progress.add_task("widening the target (MB)", total=total_bytes(wide, dtype) // 10**6)

    def advance(done: int) -> None:
        progress.advance(task, done / 10**6)

    widen(source, output, wide, dtype, advance, grow_draft_vocab)


def total_bytes(wide: Shape, dtype: torch.dtype) -> int:
    """Size of the wide weights."""
    return wide.weights * dtype.itemsize


def _reader(source: Path) -> Read:
    """Reads one tensor at a time."""
    names = tensor_files(source)

    def read(name: str) -> torch.Tensor:
        if name not in names:
            raise AdaDecodeError(f"{source} has no tensor {name}: it needs safetensors weights")
        with safe_open(names[name], framework="pt") as weights:
            tensor: torch.Tensor = weights.get_tensor(name).double()
        return tensor

    return read


def _write_weights(folder: Path, plan: Plan, read: Read, advance: Callable[[int], object]) -> None:
    shards = plan.wide.num_hidden_layers + 2
    weight_map: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(wide_tensors(plan, read), 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write(folder / file, tensors, advance)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _wide_config(plan: Plan, config: Any) -> Any:
    data = config.to_dict() | vars(plan.wide)
    data["dtype"] = str(plan.dtype).removeprefix("torch.")
    return LlamaConfig(**data)


def _read_heads(source: Path, plan: Plan) -> tuple[HeadsConfig, dict[str, torch.Tensor]] | None:
    folder = source / SUBFOLDER
    if not is_heads_folder(folder):
        return None
    config = HeadsConfig.load(folder)
    check_weights(folder, config)
    widen_config(plan, config, None)  # refuses before anything is written
    file = folder / WEIGHTS_NAME
    return config, load_file(file) if file.is_file() else {}


def _card(plan: Plan, source: Path) -> str:
    made = record() | {"source": source, "source_fingerprint": target_fingerprint(source)}
    return CARD.format(
        wide=plan.wide,
        small=plan.small,
        weights=plan.wide.weights,
        dtype=str(plan.dtype).removeprefix("torch."),
        made_with="\n".join(f"- {name}: `{value}`" for name, value in made.items()),
    )
