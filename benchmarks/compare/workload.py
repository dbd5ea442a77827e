"""The prompts of a comparison: named parts, each a list of prompts as token ids.

Owns what `--data` may say. Token ids, not text: every server then gets exactly the same. Reading
rows, chats and the paper's data sets is `vllm_adadecode.training`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo import prompts as demo_prompts
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.json_lines import BadLineError, read_json_lines
from vllm_adadecode.training.prompts import PAPER_SETS, load_data, prompts_of
from vllm_adadecode.training.records import Record, RecordReader

HERE = Path(__file__).parent
DEMO_PROMPTS = HERE.parent / "demo" / "prompts.json"
OFFLINE_PROMPTS = HERE / "offline.json"
DEMO_NAMES = {"held_out": "held-out files", "second_stage": "trained files"}
# The paper's names for test sets, and ours.
PAPER_NAMES = {"xsum": "xsum", "humaneval": "code", "code": "code", "gsm8k": "gsm8k"}
DEFAULT_TOKENS = 128
PAPER_TOKENS = 512


@dataclass(frozen=True)
class Part:
    """Prompts that are measured together.

    Attributes:
        name: as in the report, for example "held-out files".
        prompts: token ids of each.
        max_tokens: generated for each; an end-of-text token does not end an answer.
        notes: what was left out, one line each.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Names the prompts and the length of their answers."""
        content = json.dumps([self.prompts, self.max_tokens]).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def load(
    specs: ListOf[str],
    reader: RecordReader,
    *,
    context: int,
    count: int,
    tokens: int | None = None,
) -> list[Part]:
    """The parts that ``--data`` names, in order.

    Args:
        specs: each one of

            - ``demo``: the demo target's prompts, a part of files that it has seen and one of
              files that it has not;
            - ``offline``: three parts that need no network (`offline.py`);
            - ``xsum``, ``humaneval``, ``gsm8k``: the paper's test sets from the hub, or from a
              file of their rows, ``xsum=FILE.jsonl``;
            - ``spec_bench=FILE``: its ``question.jsonl``, first turns;
            - ``FILE[:name]``, and whatever else `training.prompts.load_data` takes.
        reader: with the target's tokenizer.
        context: longest prompt with its answer, in tokens; longer ones are left out.
        count: most prompts of a part: the first of a stored set, of other data drawn with seed 0.
        tokens: of an answer; None: 512 for the paper's sets, else 128.

    Raises:
        AdaDecodeError: something is not there, is malformed, or leaves no prompt.
    """
    parts: list[Part] = []
    for spec in specs:
        length = tokens or (PAPER_TOKENS if _paper_name(spec) else DEFAULT_TOKENS)
        for name, records, notes in _records(spec, reader, count):
            found, left_out = prompts_of(records, context - length)
            if left_out:
                notes = [*notes, f"{name}: {left_out} prompts left out, longer than the context"]
            if not found:
                raise AdaDecodeError(
                    f"no prompt of {name} leaves room for {length} tokens in a context of "
                    f"{context}: lower --tokens, or give other data"
                )
            parts.append(Part(name, tuple(ids for ids, _ in found), length, tuple(notes)))
    names = [part.name for part in parts]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise AdaDecodeError(f"two parts are called {min(doubled)}: name one, FILE:name")
    return parts


Found = tuple[str, list[Record], list[str]]


def _records(spec: str, reader: RecordReader, count: int) -> Iterable[Found]:
    if spec == "demo":
        prompts = demo_prompts.load(DEMO_PROMPTS)
        for files in dict.fromkeys(p.files for p in prompts):
            texts = [p.text for p in prompts if p.files == files][:count]
            yield DEMO_NAMES.get(files, files), _read(reader, texts, files), []
        return
    if spec == "offline":
        stored: dict[str, list[str]] = json.loads(OFFLINE_PROMPTS.read_text(encoding="utf-8"))
        for name, texts in stored.items():
            yield name, _read(reader, texts[:count], name), []
        return
    name, equals, path = spec.partition("=")
    if equals and name in _FORMS:
        texts, notes = read_json_lines(path, _FORMS[name])
        yield name, _read(reader, texts[:count], name), notes
        return
    source, name = _split(spec)
    data = load_data([source], reader, max_records=count)
    yield name, data.records, data.malformed


def _read(reader: RecordReader, texts: Iterable[str], source: str) -> list[Record]:
    return [reader.read({"prompt": text}, source) for text in texts]


def _split(spec: str) -> tuple[str, str]:
    """What `load_data` is to read, and the name of the part."""
    path, colon, name = spec.rpartition(":")
    if colon and name and Path(path).expanduser().is_file():
        return path, name
    if Path(spec).expanduser().is_file():
        return spec, Path(spec).stem
    if paper := PAPER_NAMES.get(spec):
        return f"{paper}:test", spec
    return spec, spec


def _paper_name(spec: str) -> bool:
    return spec.partition("=")[0] in PAPER_NAMES and not Path(spec).is_file()


def _form(paper: str) -> Callable[[Any], str]:
    """The paper's prompt of a row of the data set as it is published."""
    form = PAPER_SETS[f"{paper}:test"].form

    def prompt(row: Any) -> str:
        try:
            return form(row)
        except (KeyError, TypeError) as error:
            raise BadLineError(f"is no row of {paper}: no {error}") from None

    return prompt


def _first_turn(row: Any) -> str:
    turns = row.get("turns") if isinstance(row, Mapping) else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise BadLineError("is no question of Spec-Bench: no turns")
    return turns[0]


_FORMS: dict[str, Callable[[Any], str]] = {
    **{name: _form(paper) for name, paper in PAPER_NAMES.items()},
    "spec_bench": _first_turn,
}
