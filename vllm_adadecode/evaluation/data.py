"""The sequences that heads are evaluated on, by named set.

Owns ``FILE[:name]`` and what a set needs: ready-made sequences are taken as they are, prompts are
continued greedily by the target. Reading rows is `training.records`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.json_lines import complaint
from vllm_adadecode.training.prompts import load_data, prompts_of
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.sequences import Sequence, check_vocabulary
from vllm_adadecode.training.target_model import FrozenTarget

# Prompts of equal length that are continued together.
BATCH = 16


@dataclass(frozen=True)
class DataSet:
    """Of one name.

    Attributes:
        name: as in reports, for example "in domain".
        sequences: at least one, each with an output.
        notes: what was left out, one line each.
    """

    name: str
    sequences: tuple[Sequence, ...]
    notes: tuple[str, ...] = ()


def split_spec(spec: str) -> tuple[str, str]:
    """``FILE:name`` into both; without a name, the file's own, without its ending.

    What is after the last colon is a name only if what is before it is a file.
    """
    path, colon, name = spec.rpartition(":")
    if colon and name and Path(path).expanduser().is_file():
        return path, name
    return spec, Path(spec.partition(":")[0]).stem


def load_sets(
    specs: ListOf[str],
    target: FrozenTarget,
    *,
    max_tokens: int,
    max_sequences: int | None = None,
    chat: bool = False,
    advance: Callable[[int], None] = lambda generated: None,
) -> list[DataSet]:
    """All sets, prompts continued.

    Args:
        specs: ``FILE[:name]`` each, or anything else that `training.prompts.load_data` takes; equal
            names are one set.
        target: continues prompts.
        max_tokens: most new tokens of a prompt.
        max_sequences: at most so many of each spec, drawn at random.
        chat: put plain prompts into the chat template.
        advance: called with the number of prompts that have been continued.

    Raises:
        AdaDecodeError: something is not there, empty, or of another target.
    """
    reader = RecordReader(target.tokenizer, target.name, chat=chat)
    sets: dict[str, DataSet] = {}
    for spec in specs:
        path, name = split_spec(spec)
        records, malformed = load_data([path], reader, max_records=max_sequences)
        notes = [f"left out {complaint(malformed)}"] if malformed else []
        own = [replace(r, source=name) for r in records if r.own]
        check_vocabulary(own, target.lm_head_weight.shape[0], path)
        ready_made = all(record.own for record in records)
        longest = 0 if ready_made else longest_prompt(target, max_tokens)
        prompts, left_out = prompts_of(records, longest)
        if left_out:
            notes.append(f"{path}: {left_out} prompts of more than {longest} tokens left out")
        sequences = own + continue_prompts(
            target, [p for p, _ in prompts], max_tokens, name, advance
        )
        usable = tuple(s for s in sequences if len(s.output_ids) > 1)
        if len(usable) < len(sequences):
            notes.append(f"{path}: {len(sequences) - len(usable)} outputs of one token left out")
        before = sets.get(name, DataSet(name, ()))
        sets[name] = DataSet(name, before.sequences + usable, before.notes + tuple(notes))
    empty = [name for name, found in sets.items() if not found.sequences]
    if empty or not sets:
        raise AdaDecodeError(
            f"no sequences with at least two output tokens in {', '.join(empty) or 'the data'}: "
            "give prompts, or sequences with output_ids"
        )
    return list(sets.values())


def longest_prompt(target: FrozenTarget, max_tokens: int) -> int:
    """Tokens of a prompt that leave room for ``max_tokens`` in the target's context.

    Raises:
        AdaDecodeError: there is none.
    """
    context = getattr(target.config, "max_position_embeddings", None)
    if context is None:
        return 1 << 30
    if context <= max_tokens:
        raise AdaDecodeError(
            f"{max_tokens} new tokens do not fit into the target's context of {context}: lower "
            "--max-tokens"
        )
    return int(context) - max_tokens


@torch.no_grad()
def continue_prompts(
    target: FrozenTarget,
    prompts: ListOf[ListOf[int]],
    max_tokens: int,
    source: str,
    advance: Callable[[int], None] = lambda generated: None,
) -> list[Sequence]:
    """Greedy continuations with transformers, in the order of ``prompts``.

    Prompts of one length run together, so that nothing is padded; an end-of-text token of the
    target's generation config ends an output and belongs to it.

    Args:
        target: the loaded target.
        prompts: token ids.
        max_tokens: most new tokens.
        source: of the sequences.
        advance: called with the number of prompts that have been continued.
    """
    ends = end_tokens(target)
    found: dict[int, Sequence] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        members = list(group)
        for begin in range(0, len(members), BATCH):
            part = members[begin : begin + BATCH]
            rows = _continue(
                target, torch.tensor([list(prompts[i]) for i in part]), max_tokens, ends
            )
            for i, row in zip(part, rows, strict=True):
                found[i] = Sequence(tuple(prompts[i]), row, source)
            advance(len(part))
    return [found[i] for i in range(len(prompts))]


def end_tokens(target: FrozenTarget) -> frozenset[int]:
    """Ids that end an output: those of the generation config, else of the config."""
    generation = getattr(target.model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(target.config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list | tuple) else [ids])


def _continue(
    target: FrozenTarget,
    # [N, T] int64
    rows: torch.Tensor,
    max_tokens: int,
    ends: frozenset[int],
) -> list[tuple[int, ...]]:
    inner = target.model.model
    newest, cache, columns = rows.to(target.device), None, []
    ended = torch.zeros(len(rows), dtype=torch.bool, device=target.device)
    stop = torch.tensor(sorted(ends), dtype=torch.int64, device=target.device)
    for _ in range(max_tokens):
        out = inner(newest, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        last = out.last_hidden_state[:, -1:].to(target.device)
        newest = target.lm_head(last).argmax(-1)
        columns.append(newest[:, 0])
        ended |= torch.isin(newest[:, 0], stop)
        if bool(ended.all()):
            break
    outputs = torch.stack(columns, 1).cpu().tolist()
    return [_cut(row, ends) for row in outputs]


def _cut(row: list[int], ends: frozenset[int]) -> tuple[int, ...]:
    """Up to and with the first end-of-text token."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return tuple(row[: stop + 1])
