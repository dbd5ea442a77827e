"""Whether greedy outputs are vanilla's: bit for bit, or but for ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu_suite.suite import Suite

# So many differences are looked into; more would all have one cause.
MOST_GAPS = 64
LOGPROBS = 20

Outputs = list[list[int]]


@dataclass(frozen=True)
class Difference:
    """Where an output first differs from vanilla's of the same batch size.

    Attributes:
        prompt: its number.
        gap: how far the less likely of the two tokens is behind the best one, in vanilla's
            log-probabilities: where the two are the best ones, the top-2 gap of the logits. None:
            further than `LOGPROBS` tokens, or not looked into.
    """

    batch: int
    prompt: int
    position: int
    vanilla: int
    adadecode: int
    gap: float | None = None


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position at which two outputs of the same length differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def count_different(mine: Outputs, theirs: Outputs) -> int:
    return sum(first_difference(a, b) is not None for a, b in zip(mine, theirs, strict=True))


def compare(suite: Suite, pair: tuple[str, str], found: dict[str, Any]) -> None:
    """Both engines' outputs at every batch size.

    Args:
        pair: names of the engines, vanilla's first.
        found: takes what was found.
    """
    vanilla, adadecode = pair
    batches = suite.settings.compared_batches
    differences: list[Difference] = []
    references: dict[int, Outputs] = {}
    found |= {"outputs": 0, "batch_sizes": {str(b): n for b, n in batches.items()}}
    for batch, count in batches.items():
        mine, theirs = (
            suite.generate(name, suite.prompts[:count], suite.settings.compared_tokens, batch)
            for name in (adadecode, vanilla)
        )
        references[batch] = theirs["token_ids"]
        differences += list_differences(batch, mine["token_ids"], theirs["token_ids"])
        found["outputs"] += count
        found["divergences"] = len(differences)
        suite.advance()
    found["vanilla_against_itself"] = against_itself(references)
    looked_into = _with_gaps(suite, vanilla, differences, references)
    bound = suite.settings.tie_bound
    found |= {
        "tie_bound": bound,
        "beyond_bound": sum(d.gap is None or d.gap > bound for d in looked_into),
        "largest_gap": max((d.gap for d in looked_into if d.gap is not None), default=None),
        "differences": [asdict(d) for d in looked_into],
        "identical": not differences,
    }


def list_differences(batch: int, mine: Outputs, theirs: Outputs) -> list[Difference]:
    found = []
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        at = first_difference(a, b)
        if at is not None:
            found.append(Difference(batch, number, at, b[at], a[at]))
    return found


def against_itself(references: dict[int, Outputs]) -> dict[str, int]:
    """Vanilla's outputs at each batch size that differ from those at the last: a control."""
    *others, last = references
    return {
        f"{batch} and {last}": count_different(
            references[batch], references[last][: len(references[batch])]
        )
        for batch in others
    }


def _with_gaps(
    suite: Suite, vanilla: str, differences: Sequence[Difference], references: dict[int, Outputs]
) -> list[Difference]:
    chosen = differences[:MOST_GAPS]
    if not chosen:
        return []
    prompts = [
        [*suite.prompts[d.prompt], *references[d.batch][d.prompt][: d.position]] for d in chosen
    ]
    scores = suite.generate(vanilla, prompts, 1, len(prompts), logprobs=LOGPROBS)["logprobs"]
    return [
        Difference(**{**asdict(d), "gap": gap(d, by_token)})
        for d, by_token in zip(chosen, scores, strict=True)
    ]


def gap(difference: Difference, scores: dict[str, float]) -> float | None:
    """See `Difference`; ``scores`` are log-probabilities by token id."""
    tokens = (str(difference.vanilla), str(difference.adadecode))
    if any(token not in scores for token in tokens):
        return None
    return max(scores.values()) - min(scores[token] for token in tokens)
