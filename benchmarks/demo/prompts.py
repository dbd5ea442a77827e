"""The prompts of the demo: beginnings of passages from files of a known set.

Each begins with a line and is a whole number of tokens, so that its text and its tokens say the
same thing wherever they are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo.corpus import Corpus, Source

LENGTHS = (48, 64, 96, 112)  # tokens; few different ones, so that equal ones run as a batch


@dataclass(frozen=True)
class Prompt:
    text: str
    source: str
    files: str  # name of the set of files, such as "held_out"
    tokens: int


def split_held_out(corpus: Corpus) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """Files that choose between heads, and files that measure the result. Neither is trained on."""
    return corpus.held_out[1::2], corpus.held_out[0::2]


def draw(
    tokenizer: Any,
    sources: Sequence[Source],
    files: str,
    count: int,
    seed: int,
    lengths: Sequence[int] = LENGTHS,
) -> list[Prompt]:
    """`count` prompts in turn from each of `sources` and of each length, at random lines.

    `tokenizer` is of the *tokenizers* library."""
    rng = np.random.default_rng(seed)
    prompts: list[Prompt] = []
    tries = 0
    while len(prompts) < count:
        # Lengths change once all sources had their turn; short files are passed over.
        source = sources[tries % len(sources)]
        length = lengths[len(prompts) * len(lengths) // count]
        tries += 1
        lines = source.text.splitlines(keepends=True)
        text = "".join(lines[int(rng.integers(0, len(lines))) :])[: 12 * max(lengths)]
        ids = tokenizer.encode(text).ids[:length]
        cut = tokenizer.decode(ids)
        new = cut.strip() and all(cut != p.text for p in prompts)
        if new and len(ids) == length and tokenizer.encode(cut).ids == ids:
            prompts.append(Prompt(cut, source.path, files, length))
        elif tries > 1000 + 100 * count:
            raise ValueError(
                f"the {files} files are too short for prompts of {max(lengths)} tokens"
            )
    return prompts


def demo_prompts(tokenizer: Any, corpus: Corpus, count: int = 32, seed: int = 0) -> list[Prompt]:
    _, measured = split_held_out(corpus)
    return [
        *draw(tokenizer, measured, "held_out", count, seed),
        *draw(tokenizer, corpus.second_stage, "second_stage", count, seed + 1),
    ]


def encoded_sets(prompts: Sequence[Prompt], tokenizer: Any) -> dict[str, list[list[int]]]:
    """The tokens of the prompts, by set of files."""
    return {
        files: [tokenizer.encode(p.text).ids for p in prompts if p.files == files]
        for files in dict.fromkeys(p.files for p in prompts)
    }


def dump(prompts: Sequence[Prompt]) -> str:
    return json.dumps([asdict(p) for p in prompts], indent=1, ensure_ascii=False) + "\n"


def load(path: Path, count: int | None = None) -> list[Prompt]:
    """What `dump` made, set by set of files; the first `count` of each."""
    found = [Prompt(**p) for p in json.loads(path.read_text(encoding="utf-8"))]
    sets = dict.fromkeys(p.files for p in found)
    return [p for files in sets for p in [p for p in found if p.files == files][:count]]
