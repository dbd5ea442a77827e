"""Where data comes from: files, data sets of the hub, and the paper's sets by one name each.

Owns finding the rows that ``--data`` names; what a row says is `records.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.json_lines import BadLineError, complaint, read_json_lines
from vllm_adadecode.training.paper_sets import PAPER_SETS, Part
from vllm_adadecode.training.records import Record, RecordReader
from vllm_adadecode.training.sequences import Sequence


@dataclass
class Data:
    """What the given data holds.

    Attributes:
        records: in the order given.
        malformed: a complaint per line that was left out.
    """

    records: list[Record] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


def load_data(
    specs: Iterable[str],
    reader: RecordReader,
    *,
    skip_malformed: bool = False,
    max_records: int | None = None,
    seed: int = 0,
) -> Data:
    """Read all of the data.

    Args:
        specs: each a ``.jsonl`` file, a ``.txt`` file (a prompt a line), a paper set (``xsum``,
            ``code``, ``gsm8k``), or a data set of the hub (or a folder that `datasets` loads),
            ``NAME``, ``NAME:SPLIT`` or ``NAME@CONFIG:SPLIT``. The split is ``train`` by default.
        reader: makes records of rows.
        skip_malformed: leave malformed rows out instead of refusing.
        max_records: at most so many of each spec, drawn at random with ``seed``.

    Raises:
        AdaDecodeError: something is not there, is malformed, or there is nothing at all.
    """
    data = Data()
    specs = list(specs)
    for spec in specs:
        found = _load(spec, reader, skip_malformed)
        if max_records is not None and len(found.records) > max_records:
            drawn = random.Random(seed).sample(range(len(found.records)), max_records)
            found.records = [found.records[i] for i in sorted(drawn)]
        data.records += found.records
        data.malformed += found.malformed
    if not data.records:
        left_out = f" ({complaint(data.malformed)})" if data.malformed else ""
        raise AdaDecodeError(f"no data in {', '.join(specs)}{left_out}: give at least one prompt")
    return data


def prompts_of(
    records: Iterable[Record], max_tokens: int
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
        ids = record.prompt_ids or record.answer_ids[:max_tokens]
        if 0 < len(ids) <= max_tokens:
            prompts.append((ids, record.source))
        else:
            left_out += 1
    return prompts, left_out


def sequences_of(records: Iterable[Record], max_tokens: int) -> list[Sequence]:
    """Sequences as the data has them, nothing generated; documents in pieces of ``max_tokens``."""
    sequences = []
    for record in records:
        if record.prompt_ids:
            sequences.append(Sequence(record.prompt_ids, record.answer_ids, record.source))
            continue
        for start in range(0, len(record.answer_ids), max_tokens):
            piece = record.answer_ids[start : start + max_tokens]
            # The last piece may be too short to teach anything.
            if start == 0 or len(piece) * 8 >= max_tokens:
                sequences.append(Sequence((), piece, record.source))
    return sequences


# --- sources -----------------------------------------------------------------------------------


def _load(spec: str, reader: RecordReader, skip: bool) -> Data:
    path = Path(spec).expanduser()
    if path.is_file():
        return _load_file(path, reader, skip)
    name, _, split = spec.partition(":")
    if name in PAPER_SETS and not path.is_dir():
        parts = PAPER_SETS[name].get(split or "train")
        if parts is None:
            raise AdaDecodeError(f"{name} has no split {split!r}: use {name}:train or {name}:test")
        data = Data()
        for part in parts:
            _read_rows(_paper_rows(part), part.path, lambda row: reader.read(row, name), skip, data)
        return data
    name, _, config = name.partition("@")
    rows = _hub_rows(name, config or None, split or "train")
    data = Data()
    _read_rows(rows, name, lambda row: reader.read(row, Path(name).name), skip, data)
    return data


def _load_file(path: Path, reader: RecordReader, skip: bool) -> Data:
    source = path.stem
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AdaDecodeError(f"{path} can't be read as UTF-8 text ({error})") from None
        return Data([reader.read(line, source) for line in lines if line.strip()])
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise AdaDecodeError(
            f"{path} is neither .jsonl (a JSON object a line) nor .txt (a prompt a line): "
            "convert it to one of these"
        )
    return Data(*read_json_lines(path, lambda value: reader.read(value, source), skip))


def _read_rows(
    rows: Iterable[Any], name: str, read: Callable[[Any], Record], skip: bool, data: Data
) -> None:
    malformed = []
    for number, row in enumerate(rows, 1):
        try:
            data.records.append(read(row))
        except BadLineError as error:
            malformed.append(f"{name}, row {number}: {error}")
    if malformed and not skip:
        raise AdaDecodeError(
            f"{complaint(malformed)}; name the right column with --field, or leave these rows out "
            "with --skip-malformed"
        )
    data.malformed += malformed


def _paper_rows(part: Part) -> Iterable[Any]:
    rows = _hub_rows(part.path, part.config, part.split)
    for number, row in enumerate(rows):
        if part.count is not None and number >= part.count:
            return
        yield {"prompt": part.form(row)}


def _hub_rows(name: str, config: str | None, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise AdaDecodeError(
            f"data {name} is no file here; to have it from the hub: pip install datasets"
        ) from None
    try:
        rows: Iterable[Any] = load_dataset(name, config, split=split)
    except Exception as error:
        # datasets raises errors of a dozen libraries.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdaDecodeError(
            f"data {name} is no file here, and no data set that can be loaded: {reason}"
        ) from None
    return rows
