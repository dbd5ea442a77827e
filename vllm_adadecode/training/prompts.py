"""Where data comes from: files, data sets of the hub, and the paper's sets by one name each.

Owns finding the rows that ``--data`` names, and how a row of the paper's data becomes a prompt.
What any other row says is `records.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_adadecode.errors import AdaDecodeError, first_line
from vllm_adadecode.training.json_lines import complaint, json_rows, parse_rows
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.sequences import Sequence

Rows = Iterable[tuple[str, Any]]  # where each is, and its value


def load_data(
    specs: Iterable[str], reader: RecordReader, *, max_records: int | None = None, seed: int = 0
) -> tuple[list[Sequence], list[str]]:
    """Read all of the data, leaving out what is malformed.

    Args:
        specs: each a ``.jsonl`` file, a ``.txt`` file (a prompt a line), a paper set (``xsum``,
            ``code``, ``gsm8k``), or a data set of the hub (or a folder that `datasets` loads),
            ``NAME``, ``NAME:SPLIT`` or ``NAME@CONFIG:SPLIT``. The split is ``train`` by default.
        reader: makes sequences of rows.
        max_records: at most so many of each spec, drawn at random with ``seed``.

    Returns:
        What there is, in the order given, and a complaint per row that was left out.

    Raises:
        AdaDecodeError: something is not there, or there is nothing at all.
    """
    found, malformed = [], []
    specs = list(specs)
    for spec in specs:
        source, rows = _file_rows(spec) if Path(spec).expanduser().is_file() else _hub_rows(spec)
        records, bad = parse_rows(rows, partial(reader.read, source=source))
        if max_records is not None and len(records) > max_records:
            drawn = random.Random(seed).sample(range(len(records)), max_records)
            records = [records[i] for i in sorted(drawn)]
        found += records
        malformed += bad
    if not found:
        advice = f" ({complaint(malformed)}; --field names another field)" if malformed else ""
        raise AdaDecodeError(f"no data in {', '.join(specs)}{advice}: give at least one prompt")
    return found, malformed


def prompts_of(
    records: Iterable[Sequence], max_tokens: int
) -> tuple[list[tuple[tuple[int, ...], str]], int]:
    """What the target is to continue, of records that are no sequences of its own.

    Documents are cut to ``max_tokens``; a longer prompt would lose what it asks, so it is left out.

    Returns:
        ``(token ids, source)`` of each, and how many were left out.
    """
    prompts, left_out = [], 0
    for record in records:
        if record.own:
            continue
        ids = record.prompt_ids or record.output_ids[:max_tokens]
        if 0 < len(ids) <= max_tokens:
            prompts.append((ids, record.source))
        else:
            left_out += 1
    return prompts, left_out


def cut_documents(records: Iterable[Sequence], max_tokens: int) -> list[Sequence]:
    """Sequences as the data has them, nothing generated; documents in pieces of ``max_tokens``."""
    sequences = []
    for record in records:
        if record.prompt_ids:
            sequences.append(record)
            continue
        for start in range(0, len(record.output_ids), max_tokens):
            piece = record.output_ids[start : start + max_tokens]
            # The last piece may be too short to teach anything.
            if start == 0 or len(piece) * 8 >= max_tokens:
                sequences.append(Sequence((), piece, record.source))
    return sequences


# --- the paper's data --------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperSet:
    """Rows of one split of a hub data set.

    Attributes:
        path, config, split: as `datasets.load_dataset` takes them.
        form: the prompt of a row. The paper does not print its own, these are usual zero-shot ones.
        count: the first so many rows, as in the paper; None: all.
    """

    path: str
    config: str | None
    split: str
    form: Callable[[Mapping[str, Any]], str]
    count: int | None = None


def _xsum(row: Mapping[str, Any]) -> str:
    return f"Article: {row['document'].strip()}\n\nSummary in one sentence:"


def _mbpp(row: Mapping[str, Any]) -> str:
    # The task and one of its tests in a docstring, the form that models without examples get.
    return f'"""\n{row["text"].strip()}\n{row["test_list"][0].strip()}\n"""\n'


def _gsm8k(row: Mapping[str, Any]) -> str:
    return f"Question: {row['question'].strip()}\nAnswer:"


# arXiv 2506.03700, section "Experiments".
PAPER_SETS = {
    "xsum:train": PaperSet("EdinburghNLP/xsum", None, "train", _xsum, 10_000),
    "xsum:test": PaperSet("EdinburghNLP/xsum", None, "test", _xsum, 1_000),
    # HumanEval has no rows to train on: the paper trains on all 974 of MBPP.
    "code:train": PaperSet(
        "google-research-datasets/mbpp", "full", "train+validation+test+prompt", _mbpp
    ),
    "code:test": PaperSet("openai/openai_humaneval", None, "test", lambda row: str(row["prompt"])),
    "gsm8k:train": PaperSet("openai/gsm8k", "main", "train", _gsm8k),
    "gsm8k:test": PaperSet("openai/gsm8k", "main", "test", _gsm8k, 1_000),
}
PAPER_NAMES = {name.partition(":")[0] for name in PAPER_SETS}


# --- sources: the name of each, and its rows ------------------------------------------------------


def _file_rows(spec: str) -> tuple[str, Rows]:
    path = Path(spec).expanduser()
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AdaDecodeError(f"{path} can't be read as UTF-8 text ({error})") from None
        return path.stem, ((str(path), line) for line in lines if line.strip())
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise AdaDecodeError(
            f"{path} is neither .jsonl (a JSON object a line) nor .txt (a prompt a line): "
            "convert it to one of these"
        )
    return path.stem, json_rows(path)


def _hub_rows(spec: str) -> tuple[str, Rows]:
    name, _, split = spec.partition(":")
    if name not in PAPER_NAMES or Path(name).is_dir():
        name, _, config = name.partition("@")
        return Path(name).name, _loaded(name, config or None, split or "train")
    paper = PAPER_SETS.get(f"{name}:{split or 'train'}")
    if paper is None:
        raise AdaDecodeError(f"{name} has no split {split!r}: use {name}:train or {name}:test")
    rows = islice(_loaded(paper.path, paper.config, paper.split), paper.count)
    return name, ((where, {"prompt": paper.form(row)}) for where, row in rows)


def _loaded(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise AdaDecodeError(
            f"data {name} is no file here; to have it from the hub: pip install datasets"
        ) from None
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:
        # datasets raises errors of a dozen libraries.
        raise AdaDecodeError(
            f"data {name} is no file here, and no data set that can be loaded: {first_line(error)}"
        ) from None
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
