"""Token sequences, the data of training and evaluation: a prompt and what followed it.

Owns their form in memory and on disk, their digest, their most frequent tokens, and the split into
a part to train on and a part held out. Where they come from is `generate.py`'s and `prompts.py`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.json_lines import (
    BadLineError,
    complaint,
    json_rows,
    parse_rows,
    write_json_lines,
)


@dataclass(frozen=True)
class Sequence:
    """A prompt and its continuation.

    Attributes:
        prompt_ids: tokens given; empty of a document.
        output_ids: tokens that followed; of a document, all of it.
        source: name of the data set, for reports by set.
        own: whether what followed is known to be the target's own (ready-made sequences).
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    source: str
    own: bool = field(default=False, compare=False)

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.output_ids


def read_sequences(path: str | Path) -> list[Sequence]:
    """The sequences of a file of JSON lines, each
    ``{"prompt_ids": [...], "output_ids": [...], "source": "name"}``.

    Raises:
        AdaDecodeError: the file can't be read, is empty, or has malformed lines.
    """
    sequences, bad = parse_rows(json_rows(path), parse_sequence)
    if bad:
        raise AdaDecodeError(f"{complaint(bad)}; correct them, or delete the file")
    if not sequences:
        raise AdaDecodeError(f"{path} holds no sequences: give a file with at least one")
    return sequences


def write_sequences(path: str | Path, sequences: Iterable[Sequence]) -> None:
    """Write what `read_sequences` reads, whole or not at all.

    Raises:
        OSError: the disk refuses.
    """
    stored = ("prompt_ids", "output_ids", "source")
    write_json_lines(path, ({name: getattr(s, name) for name in stored} for s in sequences))


def parse_sequence(value: Any) -> Sequence:
    """A sequence from a line's JSON value.

    Raises:
        BadLineError: it is none.
    """
    if not isinstance(value, dict):
        raise BadLineError("is no JSON object")
    parts = []
    for key in ("prompt_ids", "output_ids"):
        ids = value.get(key)
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise BadLineError(f"{key} is no list of token ids")
        parts.append(tuple(ids))
    if not any(parts):
        raise BadLineError("has no tokens")
    source = value.get("source", "")
    if not isinstance(source, str):
        raise BadLineError("source is no string")
    return Sequence(parts[0], parts[1], source, own=bool(parts[1]))


def check_vocabulary(sequences: Iterable[Sequence], vocab_size: int, where: str) -> None:
    """Refuse tokens that the target does not have.

    Raises:
        AdaDecodeError: a token id is ``vocab_size`` or larger.
    """
    largest = max((max(s.ids) for s in sequences if s.ids), default=0)
    if largest >= vocab_size:
        raise AdaDecodeError(
            f"{where}: token {largest} is outside of the target's vocabulary of {vocab_size}: "
            "these sequences were made for another target"
        )


def sequences_digest(sequences: Iterable[Sequence]) -> str:
    """``"sha256:<hex>"`` of their tokens, in order; sources do not count."""
    digest = hashlib.sha256()
    for s in sequences:
        digest.update(json.dumps([s.prompt_ids, s.output_ids]).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def split_held_out(
    sequences: Iterable[Sequence], share: float
) -> tuple[list[Sequence], list[Sequence]]:
    """Part to train on and part held out, decided by each prompt alone.

    Equal prompts (of sequences without one, equal first tokens) go to the same side, whatever else
    is in the set: a sequence once held out is not trained on when data is added.

    Args:
        sequences: any.
        share: expected share of prompts held out, in (0, 1).

    Raises:
        AdaDecodeError: one of the parts is empty.
    """
    parts: tuple[list[Sequence], list[Sequence]] = ([], [])
    for s in sequences:
        key = json.dumps(s.prompt_ids or s.output_ids[:32]).encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
        parts[number < share * 2**64].append(s)
    if not all(parts):
        total = len(parts[0]) + len(parts[1])
        raise AdaDecodeError(
            f"{total} sequences with {share:g} of them held out leave none to "
            f"{'hold out' if parts[0] else 'train on'}: give more data, or another --held-out"
        )
    return parts


def choose_draft_vocab(
    sequences: Iterable[Sequence], size: int, vocab_size: int
) -> tuple[torch.Tensor, float]:
    """A draft vocabulary: the ``size`` tokens that occur most in outputs (in prompts without any).

    Ties, and what is missing to ``size``, go to lower ids: tokenizers number frequent tokens first.

    Returns:
        Their ids, int64 ``[size]``, strictly increasing, and their share of the counted tokens.
    """
    counts: Counter[int] = Counter()
    for s in sequences:
        counts.update(s.output_ids or s.prompt_ids)
    order = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    chosen = sorted(order[:size])
    share = sum(counts[token] for token in chosen) / max(1, counts.total())
    return torch.tensor(chosen, dtype=torch.int64), share
