"""Text, tokenizer and prompts of the demo target.

The corpus is Python's own standard library: every machine has it, so nothing is downloaded. This
module decides which files count, which of them no training step ever sees, how text becomes tokens,
and which passages are prompts. It trains no model.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.workload import Prompt

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"  # id 0; also marks the start of every file
HELD_OUT_ONE_IN = 20

# Tests, tables and installed packages: not prose-like code, or not the same on every machine.
SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "__pycache__",
        "ensurepip",
        "turtledemo",
    ]
)

# The second stage goes over these files until the model knows them: a target whose continuations
# are sharp, as those of a large model are on its own domain.
SECOND_STAGE_FILES = tuple(
    [
        "textwrap.py",
        "heapq.py",
        "bisect.py",
        "random.py",
        "fractions.py",
        "shutil.py",
        "string.py",
        "queue.py",
        "contextlib.py",
        "fnmatch.py",
        "glob.py",
        "json/decoder.py",
        "json/encoder.py",
        "json/scanner.py",
        "csv.py",
        "shlex.py",
        "sched.py",
        "calendar.py",
        "statistics.py",
    ]
)

# Files of the second stage that the heads are not trained on: those on which their settings are
# chosen, and those on which they are measured.
HEADS_CHOOSE_FILES = ("bisect.py", "fnmatch.py", "queue.py", "json/encoder.py")
HEADS_MEASURE_FILES = ("glob.py", "heapq.py", "shlex.py", "string.py")

LENGTHS = (
    48,
    64,
    96,
    112,
)  # tokens of a prompt; few different ones, so that equal ones are a batch

# Digits one by one; a newline keeps the indentation behind it, which makes code lines short.
_PIECES = r"\n+[ ]*|[ ]?[A-Za-z]+|[ ]?[0-9]|[ ]?[^\sA-Za-z0-9]+|\s+"


@dataclass(frozen=True)
class Source:
    """One file: its path below the standard library's folder, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The three sets of files. `second_stage` is a part of `train`; `held_out` shares nothing."""

    train: tuple[Source, ...]
    second_stage: tuple[Source, ...]
    held_out: tuple[Source, ...]

    def for_heads(self, name: str) -> tuple[Source, ...]:
        """What the heads are trained on, of the set of that name."""
        left_out = HEADS_CHOOSE_FILES + HEADS_MEASURE_FILES
        return tuple(s for s in getattr(self, name) if s.path not in left_out)


def is_held_out(path: str) -> bool:
    """By a hash of the path, so that the split is the same on every machine."""
    if path in SECOND_STAGE_FILES:
        return False
    return int(hashlib.sha1(path.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS and not name.startswith("config-")
        )
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def read_sources(root: Path | None = None) -> list[Source]:
    """Every distinct, hand-written-looking Python file below `root` (the standard library)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    sources, seen = [], set()
    for file in _python_files(root):
        text = file.read_text(encoding="utf-8", errors="ignore")
        # Very short files teach nothing, very long lines are generated tables.
        if text in seen or len(text) < 200 or max(map(len, text.splitlines())) > 500:
            continue
        seen.add(text)
        sources.append(Source(file.relative_to(root).as_posix(), text))
    return sources


def load_corpus(root: Path | None = None) -> Corpus:
    sources = read_sources(root)
    return Corpus(
        train=tuple(s for s in sources if not is_held_out(s.path)),
        second_stage=tuple(s for s in sources if s.path in SECOND_STAGE_FILES),
        held_out=tuple(s for s in sources if is_held_out(s.path)),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE: no unknown token, and decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, sources: Iterable[Source]) -> NDArray[np.int64]:
    """All files as one row of tokens, each behind an END_OF_TEXT."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([s.text for s in sources]):
        ids.append(0)
        ids.extend(encoding.ids)
    return np.asarray(ids, dtype=np.int64)


def digest(corpus: Corpus) -> str:
    """Names the text: another Python version brings another standard library."""
    sha = hashlib.sha1()
    for source in corpus.train + corpus.held_out:
        sha.update(source.path.encode() + b"\0" + source.text.encode() + b"\0")
    return sha.hexdigest()


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

    Each is a whole number of tokens, so that its text and its tokens say the same wherever they are
    read.

    Args:
        tokenizer: of the *tokenizers* library.
        files: what the sources are called together.
    """
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
