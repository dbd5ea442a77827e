"""Decoding time against vanilla's and against the ideal; throughput at any concurrency."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.demo.report import total
from benchmarks.gpu_suite.engine import EngineError
from benchmarks.gpu_suite.suite import Suite

WARM_TOKENS = 8
# A share of so many head checks can be off by this much.
COVERAGE_SLACK = 0.15


@dataclass(frozen=True)
class Decoding:
    """Of prompts in batches of one size.

    Attributes:
        seconds: from the first sampled tokens to the last, of all batches.
        tokens: decoded meanwhile.
        steps: that vanilla takes for them.
        stats: what the worker counted; None of vanilla.
    """

    seconds: float
    tokens: int
    steps: int
    stats: dict[str, Any] | None


def decode(
    suite: Suite, name: str, prompts: Sequence[Sequence[int]], tokens: int, batch: int
) -> Decoding:
    """Continue all prompts, ``batch`` at a time, each batch whole before the next.

    Prefill and the first token are left out: their time is measured and taken off.
    """
    seconds, steps, count = 0.0, 0, 0
    stats = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        first = suite.generate(name, part, 1, batch)
        whole = suite.generate(name, part, tokens, batch)
        seconds += whole["seconds"] - first["seconds"]
        steps += tokens - 1
        count += len(part) * (tokens - 1)
        stats.append(whole["stats"])
    return Decoding(seconds, count, steps, total(stats) if stats[0] is not None else None)


def compare(
    suite: Suite,
    pair: tuple[str, str],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    batch: int,
    repeats: int,
) -> dict[str, Any]:
    """Both engines in turn, the other one first each time; at least once.

    Raises:
        OutOfTimeError: not even once. With less time than it takes again, it is not repeated.
    """
    runs: dict[str, list[Decoding]] = {name: [] for name in pair}
    for name in pair:
        suite.generate(name, prompts[:batch], WARM_TOKENS, batch)
    for repeat in range(repeats):
        begin = suite.clock.left()
        for name in pair if repeat % 2 == 0 else reversed(pair):
            runs[name].append(decode(suite, name, prompts, tokens, batch))
        suite.advance()
        if suite.clock.left() < 1.5 * (begin - suite.clock.left()):
            break
    return figures(suite, *(runs[name] for name in pair))


def figures(suite: Suite, vanilla: list[Decoding], adadecode: list[Decoding]) -> dict[str, Any]:
    """Speed-up and efficiency of repeated runs of the same prompts; medians of times."""
    seconds = [statistics.median(d.seconds for d in runs) for runs in (vanilla, adadecode)]
    stats = total([d.stats for d in adadecode if d.stats is not None])
    read_by_vanilla = suite.reading.vanilla(vanilla[0].steps)
    read_by_adadecode = suite.reading.adadecode(stats) / len(adadecode)
    speedup = seconds[0] / seconds[1]
    ideal = read_by_vanilla / read_by_adadecode
    rates = [
        layers * suite.reading.layer_bytes / s
        for layers, s in zip((read_by_vanilla, read_by_adadecode), seconds, strict=True)
    ]
    bandwidth = suite.result.data("bandwidth").get("bytes_per_second")
    return {
        "speedup": speedup,
        "ideal_speedup": ideal,
        "efficiency": speedup / ideal,
        "speedup_by_repeat": [
            v.seconds / a.seconds for v, a in zip(vanilla, adadecode, strict=True)
        ],
        "tokens_per_second": {
            "vanilla": vanilla[0].tokens / seconds[0],
            "adadecode": adadecode[0].tokens / seconds[1],
        },
        # Weights read in a second, over what a copy moves.
        "of_bandwidth": {
            name: rate / bandwidth if bandwidth else None
            for name, rate in zip(("vanilla", "adadecode"), rates, strict=True)
        },
        "draft_acceptance_rate": stats["draft_acceptance_rate"],
        "mean_acceptance_length": stats["mean_acceptance_length"],
        # Of a batch; at batch 1 layer passes a token.
        "layers_executed_of_vanilla": (stats["draft_layers"] + stats["verification_layers"])
        / (len(adadecode) * stats["num_layers"] * vanilla[0].steps),
        "draft_tokens": stats["draft_tokens"],
        "coverage": coverage(stats),
    }


def coverage(stats: dict[str, Any]) -> float | None:
    """Share of head checks that gave a draft."""
    checked = sum(e["heads_evaluated"] for e in stats["exits"].values())
    return stats["draft_tokens"] / checked if checked else None


def speed(suite: Suite, found: dict[str, Any]) -> None:
    """The part `speed`."""
    settings = suite.settings
    for batch, count in settings.speed_batches.items():
        found[str(batch)] = compare(
            suite,
            ("vanilla", "adadecode"),
            suite.prompts[:count],
            settings.speed_tokens,
            batch,
            settings.speed_repeats,
        )


def traces(suite: Suite, found: dict[str, Any]) -> None:
    """The part `traces`: drafts at random, kept at random; by coverage, precision and batch size.

    Raises:
        EngineError: drafts were not made at the rate that was asked for.
    """
    settings = suite.settings
    for precision in settings.precisions:
        for wanted in settings.coverages:
            suite.ask("controlled", "set_drafts", coverage=wanted, precision=precision)
            for batch in settings.speed_batches:
                got = compare(
                    suite,
                    ("vanilla", "controlled"),
                    suite.prompts[: max(2, batch)],
                    settings.traces_tokens,
                    batch,
                    settings.traces_repeats,
                )
                if got["coverage"] is None or abs(got["coverage"] - wanted) > COVERAGE_SLACK:
                    raise EngineError(
                        f"controlled: asked for drafts in {wanted:.2f} of head checks, got "
                        f"{got['coverage']}: heads were not followed as set"
                    )
                found[f"{wanted}, {precision}, {batch}"] = got


def concurrency(suite: Suite, found: dict[str, Any]) -> None:
    """The part `concurrency`: tokens a second with so many requests at a time, prefill included.

    Twice as many requests as run at a time: when one ends the next begins.
    """
    settings, pair = suite.settings, ("vanilla", "adadecode")
    rates: dict[int, dict[str, list[float]]] = {}
    for repeat in range(settings.concurrency_repeats):
        for level in settings.concurrencies:
            count = max(2 * level, 4)
            prompts = [suite.prompts[i % len(suite.prompts)] for i in range(count)]
            cell = rates.setdefault(level, {name: [] for name in pair})
            for name in pair if repeat % 2 == 0 else reversed(pair):
                if repeat == 0:
                    suite.generate(name, prompts[:level], WARM_TOKENS, level)
                done = suite.generate(name, prompts, settings.concurrency_tokens, level)
                tokens = count * settings.concurrency_tokens
                cell[name].append(tokens / done["seconds"])
            found[str(level)] = ratios(cell["vanilla"], cell["adadecode"])
            suite.advance()


def ratios(vanilla: list[float], adadecode: list[float]) -> dict[str, Any]:
    """Of tokens a second, by repeat."""
    by_repeat = [a / v for v, a in zip(vanilla, adadecode, strict=True)]
    return {
        "ratio": statistics.median(by_repeat),
        "ratio_by_repeat": by_repeat,
        "tokens_per_second": {
            "vanilla": statistics.median(vanilla),
            "adadecode": statistics.median(adadecode),
        },
    }
