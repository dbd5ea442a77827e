"""The prompts: all that come with the demo, every kind of file in turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.demo import prompts
from benchmarks.demo.__main__ import HERE

# The demo's own, one half of which the target knows nearly by heart; and those of the heads report,
# down to prose and C headers.
FILES = ("prompts.json", "heads_prompts.json")
DEMO_KINDS = ("second_stage", "held_out")


def load(model: Path) -> list[list[int]]:
    """Token ids; the first 64 are the demo's, in turn of known and of unseen files."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    demo, others = (prompts.load(HERE / name) for name in FILES)
    chosen = in_turn(demo, DEMO_KINDS)
    chosen += in_turn(others, tuple(dict.fromkeys(p.files for p in others)))
    return [tokenizer.encode(p.text).ids for p in chosen]


def in_turn(known: Sequence[prompts.Prompt], kinds: Sequence[str]) -> list[prompts.Prompt]:
    """One of each kind, then the next of each, the shortest and the longest spread alike."""
    by_kind = [[p for p in known if p.files == kind] for kind in kinds]
    return [p for p in chain.from_iterable(zip_longest(*map(_spread, by_kind))) if p is not None]


def _spread(of_kind: list[prompts.Prompt]) -> list[prompts.Prompt]:
    """Every fourth, then the ones behind those: files list their lengths one after the other."""
    step = max(1, len(of_kind) // len(prompts.LENGTHS))
    return [p for start in range(step) for p in of_kind[start::step]]
