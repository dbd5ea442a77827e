"""The parts of the suite in their order, what each measures, and what becomes of one that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import fmean, median
from typing import Any

from benchmarks import load
from benchmarks.counts import total
from benchmarks.gpu_suite.settings import Settings
from benchmarks.gpu_suite.suite import INVARIANT, PLAIN, Suite, layers_read
from benchmarks.load import Measurement
from benchmarks.pair import first_difference, tie_gap
from vllm_adadecode.errors import AdaDecodeError

# So many differences are looked into; more would all have one cause.
MOST_GAPS = 64
WARM_TOKENS = 8
# Requests at a time while waits are counted.
SYNCED = (1, 8)

Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        run: called with the suite and a dict that takes what is found, while it is found.
        servers: names of those that it asks.
        steps: calls of `Suite.advance`, at most.
    """

    run: Callable[[Suite, Found], None]
    servers: Sequence[str]
    steps: int


def all_parts(settings: Settings) -> dict[str, Part]:
    """Correctness, then speed; what would be missed least comes last."""
    compared, levels = len(settings.batches), len(settings.levels)
    pair = INVARIANT if settings.invariant else PLAIN
    return {
        "bit_identical": Part(lambda suite, found: compare(suite, pair, found), pair, compared),
        "ties": Part(lambda suite, found: compare(suite, PLAIN, found), PLAIN, compared),
        "host_syncs": Part(host_syncs, PLAIN, len(SYNCED)),
        "speed": Part(speed, PLAIN, levels * settings.repeats),
    }


def run_all(
    suite: Suite, parts: Mapping[str, Part], written: Callable[[str, Found], object]
) -> None:
    """All of them; one that fails does not end the others.

    Args:
        written: called with the name of each, and the seconds that it took, ``data`` found, how the
            ``servers`` ran, and ``error``, if it was not finished.
    """
    for number, (name, part) in enumerate(parts.items()):
        begin, data = time.monotonic(), Found()
        result: Found = {"data": data}
        try:
            suite.start({s for later in list(parts.values())[number:] for s in later.servers})
            suite.wait(part.servers)
            result["servers"] = {s: suite.servers[s].call("suite_describe") for s in part.servers}
            part.run(suite, data)
        except (AdaDecodeError, OSError) as error:
            result["error"] = str(error)
        written(name, {"seconds": round(time.monotonic() - begin, 1), **result})


# --- correctness ---------------------------------------------------------------------------------


def compare(suite: Suite, pair: Sequence[str], found: Found) -> None:
    """Whether greedy outputs are vanilla's, and how close the two tokens were where they differ.

    Args:
        pair: names of the servers, vanilla's first.
        found: takes what was found. ``differences``: where an output first differs from vanilla's
            of the same batch size, and their ``gap`` (`tie_gap`).
    """
    settings, vanilla = suite.settings, suite.servers[pair[0]]
    differences: list[Found] = []
    batch_sizes = {str(batch): count for batch, count in settings.batches.items()}
    found |= {"outputs": 0, "divergences": 0, "batch_sizes": batch_sizes}
    for batch, count in settings.batches.items():
        theirs, mine = (
            suite.generate(name, suite.prompts[:count], settings.tokens, batch) for name in pair
        )
        for number, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            if a != b:
                found["divergences"] += 1
                at = first_difference(a, b)
                difference = {"batch": batch, "prompt": number, "position": at}
                if len(differences) < MOST_GAPS:
                    gap = tie_gap(vanilla, [*suite.prompts[number], *a[:at]], (a[at], b[at]))
                    differences.append(difference | {"gap": gap})
        found["outputs"] += count
        suite.advance()
    gaps = [difference["gap"] for difference in differences]
    found |= {
        "tie_bound": settings.tie_bound,
        "beyond_bound": sum(g is None or g > settings.tie_bound for g in gaps),
        "largest_gap": max((g for g in gaps if g is not None), default=None),
        "differences": differences,
        "identical": not differences,
    }


def host_syncs(suite: Suite, found: Found) -> None:
    """Calls in a decode step that the host waits in, vanilla's and ours."""
    for batch in SYNCED:
        cell: Found = {}
        for name in PLAIN:
            # Once before: what is done once only is no step's.
            for _ in range(2):
                suite.servers[name].call("suite_count_syncs", True)
                suite.generate(name, suite.prompts[:batch], suite.settings.tokens, batch)
                cell[name] = suite.servers[name].call("suite_count_syncs", False)
        found[str(batch)] = cell
        suite.advance()


# --- speed ---------------------------------------------------------------------------------------


def speed(suite: Suite, found: Found) -> None:
    """So many requests at a time, twice as many in all, both servers in turn, the other one first
    each time."""
    settings = suite.settings
    runs: dict[int, dict[str, list[Measurement]]] = {}
    for repeat in range(settings.repeats):
        for level in settings.levels:
            prompts = list(islice(cycle(suite.prompts), 2 * level if level > 1 else 8))
            of_level = runs.setdefault(level, {name: [] for name in PLAIN})
            for name in PLAIN if repeat % 2 == 0 else reversed(PLAIN):
                server, ours = suite.servers[name], name != PLAIN[0]
                if repeat == 0:
                    load.send(server, prompts[:level], WARM_TOKENS, level, 0.0)
                measured = load.measure(server, prompts, settings.tokens, level, 0.0, ours)
                of_level[name].append(measured)
            found[str(level)] = figures(suite, level, *(of_level[name] for name in PLAIN))
            suite.advance()


def figures(
    suite: Suite, level: int, vanilla: Sequence[Measurement], adadecode: Sequence[Measurement]
) -> Found:
    """Of repeated runs of the same prompts, ratios within a repeat.

    Returns:
        ``ratio`` of tokens/s over whole requests. Of decoding alone, by the mean time for a token
        behind the first: ``speedup``, ``ideal_speedup`` (of the bytes of weights that both must
        read) and ``efficiency``, the one over the other.
    """

    def of_pairs(value: Callable[[Measurement, Measurement], float]) -> list[float]:
        return [value(v, a) for v, a in zip(vanilla, adadecode, strict=True)]

    ratios = of_pairs(lambda v, a: a.tokens_per_s / v.tokens_per_s)
    speedups = of_pairs(lambda v, a: fmean(v.tpot_ms) / fmean(a.tpot_ms))
    stats = total([m.stats for m in adadecode if m.stats is not None])
    # Requests are of one length: vanilla decodes them in whole batches.
    steps = stats["generated_tokens"] / level
    layers = stats["draft_layers"] + stats["verification_layers"]
    ideal = steps * suite.costs.vanilla_token / layers_read(suite.costs, stats)
    return {
        "tokens_per_s": {
            name: median(m.tokens_per_s for m in of)
            for name, of in zip(PLAIN, (vanilla, adadecode), strict=True)
        },
        "ratio": median(ratios),
        "ratio_by_repeat": ratios,
        "speedup": median(speedups),
        "speedup_by_repeat": speedups,
        "ideal_speedup": ideal,
        "efficiency": median(speedups) / ideal,
        "draft_acceptance_rate": stats["draft_acceptance_rate"],
        "mean_acceptance_length": stats["mean_acceptance_length"],
        # With one request at a time layers executed per token.
        "layers_of_vanilla": layers / (stats["num_layers"] * steps),
    }
