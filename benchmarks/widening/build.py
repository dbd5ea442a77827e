"""The folder of a widened model: weights, config, heads, tokenizer and model card, whole or not."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig

from benchmarks.machine import command, git_revision, versions
from benchmarks.widening import drafters, files
from benchmarks.widening.eagle3 import read_eagle3, widen_eagle3
from benchmarks.widening.heads import widen_config, widen_tensors
from benchmarks.widening.plan import Plan, make_plan
from benchmarks.widening.shape import Shape
from benchmarks.widening.target import Read, wide_tensors
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
small one says: for measuring speed, and for nothing else.{heads}

Made with:

{provenance}
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
    other_drafters: bool = True,
) -> Plan:
    """Write a widened copy of a model, with its heads and drafters if it has some beside it.

    Args:
        source: folder of a Llama with safetensors weights.
        output: folder that does not exist yet, or is empty.
        dtype: of the wide weights; None: the source's.
        advance: called with numbers of bytes, in all `total_bytes`.
        grow_draft_vocab: see `Plan`.
        other_drafters: whether those of other methods are widened, too.

    Raises:
        AdaDecodeError: the source or the place of the output is wrong, or the shape can't be
            reached; one line.
        OSError: the disk refuses; nothing is left.
    """
    config = read_config(source)
    plan = replace(
        make_plan(config, wide, dtype or config.dtype), grow_draft_vocab=grow_draft_vocab
    )
    check_output(output)
    heads = _read_heads(source, plan)
    if other_drafters:
        _check_drafters(plan, source)
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
        if other_drafters:
            _write_drafters(plan, source, unfinished)
        (unfinished / "README.md").write_text(_card(plan, source, heads), encoding="utf-8")
    return plan


def _check_drafters(plan: Plan, source: Path) -> None:
    """Refuse before anything is written."""
    if drafters.has_drafter(source, drafters.MEDUSA):
        drafters.check_medusa(plan)
    if drafters.has_drafter(source, drafters.EAGLE3):
        read_eagle3(plan, source / drafters.EAGLE3)


def _write_drafters(plan: Plan, source: Path, folder: Path) -> None:
    fingerprint = target_fingerprint(folder)
    if drafters.has_drafter(source, drafters.MEDUSA):
        medusa = drafters.MEDUSA
        drafters.widen_medusa(plan, source / medusa, folder / medusa, fingerprint)
    if drafters.has_drafter(source, drafters.EAGLE3):
        eagle3 = drafters.EAGLE3
        widen_eagle3(plan, source / eagle3, folder / eagle3, fingerprint)
    if drafters.has_drafter(source, drafters.DRAFT):
        draft = folder / drafters.DRAFT
        small = read_config(source / drafters.DRAFT)
        layers = drafters.draft_layers(plan, small.num_hidden_layers)
        wide = plan.wide.change(num_hidden_layers=layers)
        widen(source / drafters.DRAFT, draft, wide, plan.dtype)
        path = draft / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["provenance"] = drafters.wide_provenance(plan, config, fingerprint)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def total_bytes(wide: Shape, dtype: torch.dtype) -> int:
    """Size of the wide weights."""
    return wide.weights * dtype.itemsize


def check_output(output: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        AdaDecodeError: it is a file, or a folder that holds something.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise AdaDecodeError(f"{output} exists already: give a folder that does not")


def _reader(source: Path) -> Read:
    """Reads one tensor at a time."""
    names = tensor_files(source)

    def read(name: str) -> torch.Tensor:
        if name not in names:
            raise AdaDecodeError(f"{source} has no tensor {name}: it needs safetensors weights")
        with safe_open(names[name], framework="pt") as weights:
            tensor: torch.Tensor = weights.get_tensor(name)
        return tensor

    return read


def _write_weights(folder: Path, plan: Plan, read: Read, advance: Callable[[int], object]) -> None:
    shards = plan.wide.num_hidden_layers + 2
    weight_map: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(wide_tensors(plan, read), 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        files.write(folder / name, tensors, advance)
        weight_map |= {tensor.name: name for tensor in tensors}
        size += sum(map(files.num_bytes, tensors))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _wide_config(plan: Plan, config: Any) -> Any:
    data = config.to_dict() | vars(plan.wide)
    data["rms_norm_eps"] = config.rms_norm_eps * plan.channels.energy
    data["dtype"] = str(plan.dtype).removeprefix("torch.")
    rope = dict(data.get("rope_parameters") or {})
    if "rope_theta" in rope:
        rope["rope_theta"] = plan.theta(rope["rope_theta"])
        data["rope_parameters"] = rope
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


def _card(plan: Plan, source: Path, heads: Any) -> str:
    made: dict[str, Any] = {
        "command": shlex.join(command()),
        "git": git_revision(),
        **versions(),
        "source": source,
        "source_fingerprint": target_fingerprint(source),
    }
    lines = [f"- {name}: `{value}`" for name, value in made.items()]
    return CARD.format(
        wide=plan.wide,
        small=plan.small,
        weights=plan.wide.weights,
        dtype=str(plan.dtype).removeprefix("torch."),
        heads=" Its AdaDecode heads are in `adadecode/`." if heads is not None else "",
        provenance="\n".join(lines),
    )
