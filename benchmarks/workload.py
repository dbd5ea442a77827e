"""The prompts of all commands: the demo's, and named parts of any data as token ids.

Owns what ``--data`` may say. Reading rows, chats and the paper's data sets is
`vllm_adadecode.training`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.prompts import load_data, prompts_of
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.sequences import Sequence as Tokens

HERE = Path(__file__).parent
# The demo target's folder, and as commands name it in a checkout.
DEMO_MODEL = HERE / "demo" / "model"
DEMO_TARGET = "benchmarks/demo/model"
DEMO_PROMPTS = HERE / "demo" / "prompts.json"
# What the heads know well and less well, by set of files: for `adadecode eval` and `calibrate`.
EVAL_PROMPTS = HERE / "demo" / "eval_prompts"
OFFLINE_PROMPTS = HERE / "offline.json"
# By set of files that demo prompts are from.
TITLES = {"held_out": "held-out files", "second_stage": "trained files"}
# The paper's names for test sets, and ours.
PAPER_NAMES = {"xsum": "xsum", "humaneval": "code", "code": "code", "gsm8k": "gsm8k"}
DEFAULT_TOKENS, PAPER_TOKENS = 128, 512


@dataclass(frozen=True)
class Prompt:
    """A prompt of the demo: a whole number of tokens, so that text and tokens say the same.

    Attributes:
        source: file that it is from.
        files: name of the set of files.
        tokens: how many.
    """

    text: str
    source: str
    files: str
    tokens: int


def load_demo_prompts(count: int | None = None, path: Path = DEMO_PROMPTS) -> list[Prompt]:
    """Set by set of files; the first ``count`` of each."""
    found = [Prompt(**p) for p in json.loads(path.read_text(encoding="utf-8"))]
    return [p for of_set in by_files(found).values() for p in of_set[:count]]


def by_files(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts by set of files, in their order."""
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        found.setdefault(prompt.files, []).append(prompt)
    return found


def dump(prompts: Sequence[Prompt]) -> str:
    """What `load_demo_prompts` reads."""
    return json.dumps([asdict(p) for p in prompts], indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Part:
    """Prompts that are measured together. Token ids: every server then gets exactly the same.

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


def load_parts(
    specs: Sequence[str],
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
            - ``offline``: three parts that need no network;
            - ``xsum``, ``humaneval``, ``gsm8k``: the paper's test sets from the hub;
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
        length = tokens or (PAPER_TOKENS if spec in PAPER_NAMES else DEFAULT_TOKENS)
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


def _records(
    spec: str, reader: RecordReader, count: int
) -> Iterable[tuple[str, list[Tokens], list[str]]]:
    """Names, records, and notes on what was malformed."""
    if spec in ("demo", "offline"):
        stored: dict[str, list[str]] = json.loads(OFFLINE_PROMPTS.read_text(encoding="utf-8"))
        if spec == "demo":
            sets = by_files(load_demo_prompts())
            stored = {TITLES[files]: [p.text for p in of_set] for files, of_set in sets.items()}
        for name, texts in stored.items():
            yield name, [reader.read({"prompt": t}, name) for t in texts[:count]], []
        return
    source, name = _split(spec)
    yield name, *load_data([source], reader, max_records=count)


def _split(spec: str) -> tuple[str, str]:
    """What `load_data` is to read, and the name of the part."""
    path, colon, name = spec.rpartition(":")
    if colon and name and Path(path).expanduser().is_file():
        return path, name
    if Path(spec).expanduser().is_file():
        return spec, Path(spec).stem
    return (f"{PAPER_NAMES[spec]}:test" if spec in PAPER_NAMES else spec), spec
