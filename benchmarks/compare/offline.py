"""``python -m benchmarks.compare.offline``: makes the prompts that need no network.

Three kinds of work, 32 prompts each: completing code, summarising documentation, arithmetic word
problems. The text is the standard library's, from files that the demo target and its heads have
never seen; the problems are made up here. The result is stored, because another Python has
another standard library: it is the same on every machine.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Sequence

from benchmarks.arguments import make_parser
from benchmarks.compare.workload import OFFLINE_PROMPTS
from benchmarks.demo.corpus import Source, load_corpus
from vllm_adadecode.files import write_whole

COUNT = 32
CODE_LINES = (8, 24)  # of a prompt, the first line of the function to complete included
DOC_CHARACTERS = (200, 900)

NAMES = ("Ada", "Ben", "Chloe", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "books", "stamps", "bottles", "tickets", "pencils", "shells", "coins")
PROBLEMS = (
    "{name} has {a} {thing}. {other} gives {name} {b} more, and {name} then shares all of them "
    "equally among {c} friends and keeps what is left over. How many does {name} keep?",
    "A box holds {a} {thing}. {name} buys {c} boxes and gives {b} {thing} to {other}. How many "
    "{thing} does {name} have now?",
    "{name} sells {a} {thing} on Monday and {c} times as many on Tuesday. {other} sells {b} fewer "
    "than {name} did on both days together. How many {thing} does {other} sell?",
    "A shelf has {c} rows with {a} {thing} in each row. {name} takes {b} of them away and {other} "
    "puts half of these back. How many {thing} are on the shelf?",
)


def functions(source: Source) -> list[tuple[int, int]]:
    """First and last line of each function, from 0, in order; nothing of a file that is no
    Python of this version."""
    try:
        tree = ast.parse(source.text)
    except (SyntaxError, ValueError):
        return []
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sorted((n.lineno - 1, (n.end_lineno or n.lineno) - 1) for n in found)


def code(sources: Sequence[Source], count: int, seed: int) -> list[str]:
    """Passages that end behind the first line of a function."""
    rng = random.Random(seed)
    prompts = []
    for source in sources:
        lines = source.text.splitlines()
        for first, last in functions(source):
            begin = max(0, first + 1 - rng.randint(*CODE_LINES))
            # One-line functions leave nothing to complete.
            if first + 1 - begin >= CODE_LINES[0] and last - first >= 4:
                prompts.append("\n".join(lines[begin : first + 1]) + "\n")
    return _drawn(prompts, count, rng)


def documentation(sources: Sequence[Source], count: int, seed: int) -> list[str]:
    """Docstrings to summarise."""
    rng = random.Random(seed)
    prompts = []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for source in sources:
        try:
            tree = ast.parse(source.text)
        except (SyntaxError, ValueError):
            continue
        documents = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds)]
        prompts += [
            f"Documentation:\n{text}\n\nSummary in one sentence:"
            for text in documents
            if text and DOC_CHARACTERS[0] <= len(text) <= DOC_CHARACTERS[1]
        ]
    return _drawn(prompts, count, rng)


def arithmetic(count: int, seed: int) -> list[str]:
    """Word problems in the form of GSM8K."""
    rng = random.Random(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        name, other = rng.sample(NAMES, 2)
        problem = rng.choice(PROBLEMS).format(
            name=name,
            other=other,
            thing=rng.choice(THINGS),
            a=rng.randint(11, 60),
            b=2 * rng.randint(1, 5),
            c=rng.randint(2, 9),
        )
        prompt = f"Question: {problem}\nAnswer:"
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts


def _drawn(prompts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < count:
        raise ValueError(f"the files hold {len(distinct)} prompts, {count} are wanted")
    return rng.sample(distinct, count)


def make(sources: Sequence[Source], count: int = COUNT, seed: int = 0) -> dict[str, list[str]]:
    """All three parts; the same for the same files and seed."""
    return {
        "code completion": code(sources, count, seed),
        "docstring summaries": documentation(sources, count, seed + 1),
        "arithmetic": arithmetic(count, seed + 2),
    }


def main() -> None:
    make_parser("benchmarks.compare.offline", __doc__).parse_args()
    parts = make(load_corpus().held_out)
    text = json.dumps(parts, indent=1, ensure_ascii=False) + "\n"
    write_whole(OFFLINE_PROMPTS, text.encode())
    print(f"written: {OFFLINE_PROMPTS} ({sum(map(len, parts.values()))} prompts)")


if __name__ == "__main__":
    main()
