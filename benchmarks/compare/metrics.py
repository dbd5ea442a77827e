"""From measurements to the figures of a comparison: one row for each method in each setting.

Owns what a figure means. Ratios are taken within one repetition, where both servers met the same
machine, and only then summed up.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from benchmarks.compare.load import Measurement, percentile
from benchmarks.compare.store import Cell, Turn

BASELINE = "vanilla"
OURS = "adadecode"
# Nearer to 1 than this, a ratio is called the same: repetitions differ by as much.
SAME = 0.02


@dataclass(frozen=True)
class Ratio:
    """Of tokens/s to vanilla's in the same repetition, over the repetitions."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Row:
    """A method in a setting. None: not measured, or it has no meaning there.

    Attributes:
        tokens_per_s: output tokens, median of the repetitions.
        ratio: to vanilla.
        ttft_ms_p50 to tpot_ms_p99: over the requests of all repetitions.
        mean_acceptance_length: behind the first token of each request; 1 without a method.
        draft_acceptance_rate: share of drafts that verification kept.
        layers_executed_per_token: of AdaDecode with one request at once; 1 is plain decoding.
        identical, compared: outputs that are vanilla's, of how many; at temperature 0 only, and
            with the same concurrency. Vanilla's own are compared with its first repetition.
        peak_memory: of the server's processes, bytes; the largest of the repetitions.
        failed: requests without an answer.
        repetitions: that were measured.
    """

    method: str
    part: str
    temperature: float
    concurrency: int
    runner: str | None
    repetitions: int
    tokens_per_s: float | None = None
    ratio: Ratio | None = None
    ttft_ms_p50: float | None = None
    ttft_ms_p99: float | None = None
    tpot_ms_p50: float | None = None
    tpot_ms_p99: float | None = None
    mean_acceptance_length: float | None = None
    draft_acceptance_rate: float | None = None
    layers_executed_per_token: float | None = None
    identical: int | None = None
    compared: int | None = None
    peak_memory: int | None = None
    startup_s: float | None = None
    failed: int = 0

    @property
    def setting(self) -> tuple[str, float, int]:
        return self.part, self.temperature, self.concurrency

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows(
    cells: Sequence[Cell], measured: Mapping[Cell, Measurement], turns: Sequence[Turn]
) -> list[Row]:
    """All rows, setting by setting, methods in the order of the cells."""
    settings = dict.fromkeys((c.part, c.temperature, c.concurrency) for c in cells)
    methods = dict.fromkeys(c.method for c in cells)
    found = []
    for setting in settings:
        for method in methods:
            own = {
                c.repetition: measured[c]
                for c in cells
                if (c.part, c.temperature, c.concurrency) == setting
                and c.method == method
                and c in measured
            }
            base = {
                c.repetition: measured[c]
                for c in measured
                if (c.part, c.temperature, c.concurrency) == setting and c.method == BASELINE
            }
            found.append(_row(method, setting, own, base, [t for t in turns if t.method == method]))
    return found


def _row(
    method: str,
    setting: tuple[str, float, int],
    own: Mapping[int, Measurement],
    base: Mapping[int, Measurement],
    turns: Sequence[Turn],
) -> Row:
    part, temperature, concurrency = setting
    runner = next((t.runner for t in turns if t.runner), None)
    row = Row(method, part, temperature, concurrency, runner, len(own))
    if not own:
        return row
    all_of = list(own.values())
    ttft = [x for m in all_of for x in m.ttft_ms]
    tpot = [x for m in all_of for x in m.tpot_ms]
    steps, drafted = sum(m.steps for m in all_of), sum(m.draft_tokens for m in all_of)
    behind_first = sum(m.output_tokens - len(m.ttft_ms) for m in all_of)
    passes = [
        m.layers_executed_per_token for m in all_of if m.layers_executed_per_token is not None
    ]
    identical, compared = same_outputs(method, own, base) if temperature == 0 else (None, None)
    return Row(
        method,
        part,
        temperature,
        concurrency,
        runner,
        len(own),
        tokens_per_s=statistics.median(rate(m) for m in all_of),
        ratio=ratio(own, base),
        ttft_ms_p50=percentile(ttft, 50),
        ttft_ms_p99=percentile(ttft, 99),
        tpot_ms_p50=percentile(tpot, 50),
        tpot_ms_p99=percentile(tpot, 99),
        mean_acceptance_length=behind_first / steps if steps else None,
        draft_acceptance_rate=sum(m.accepted_tokens for m in all_of) / drafted if drafted else None,
        layers_executed_per_token=statistics.mean(passes) if passes else None,
        identical=identical,
        compared=compared,
        peak_memory=max((t.peak_memory for t in turns if t.peak_memory), default=None),
        startup_s=_median(t.startup_s for t in turns),
        failed=sum(m.failed for m in all_of),
    )


def rate(measured: Measurement) -> float:
    """Output tokens a second, over whole requests."""
    return measured.output_tokens / measured.seconds


def ratio(own: Mapping[int, Measurement], base: Mapping[int, Measurement]) -> Ratio | None:
    ratios = [rate(own[r]) / rate(base[r]) for r in own.keys() & base.keys()]
    if not ratios:
        return None
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def same_outputs(
    method: str, own: Mapping[int, Measurement], base: Mapping[int, Measurement]
) -> tuple[int | None, int | None]:
    """How many outputs are vanilla's in the same repetition, and of how many."""
    if method == BASELINE:
        first = min(base)
        pairs = [(own[r], base[first]) for r in own if r != first]
    else:
        pairs = [(own[r], base[r]) for r in own if r in base]
    if not pairs:
        return None, None
    same = sum(
        a == b for mine, his in pairs for a, b in zip(mine.outputs, his.outputs, strict=True)
    )
    return same, sum(len(mine.outputs) for mine, _ in pairs)


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def findings(all_rows: Sequence[Row]) -> list[str]:
    """Who wins and who loses, a sentence each: every method against vanilla, ours against all."""
    sentences = []
    for method in dict.fromkeys(row.method for row in all_rows if row.method != BASELINE):
        with_ratio = [r for r in all_rows if r.method == method and r.ratio is not None]
        if with_ratio:
            sentences.append(_against_vanilla(method, with_ratio))
    return sentences + _against_all(all_rows)


def _against_all(all_rows: Sequence[Row]) -> list[str]:
    first, behind = 0, []
    for setting, group in groupby(all_rows, key=lambda r: r.setting):
        rates = {r.method: r.tokens_per_s for r in group if r.tokens_per_s is not None}
        mine = rates.get(OURS)
        if mine is None or len(rates) == 1:
            continue
        faster = {m: rate for m, rate in rates.items() if rate > mine}
        first += not faster
        if faster:
            order = ", ".join(
                f"{m} {rates[m]:.0f}" for m in sorted(faster, key=rates.__getitem__, reverse=True)
            )
            behind.append(
                f"Ahead of {OURS} ({mine:.0f} tokens/s) with {describe(setting)}: {order}."
            )
    if not first and not behind:
        return []
    return [f"{OURS} is the fastest in {first} of {first + len(behind)} settings.", *behind]


def _against_vanilla(method: str, measured: Sequence[Row]) -> str:
    def verdict(row: Row) -> str:
        assert row.ratio is not None
        if abs(row.ratio.median - 1) <= SAME:
            return "as fast"
        return "faster" if row.ratio.median > 1 else "slower"

    counts = {word: sum(verdict(r) == word for r in measured) for word in ("faster", "slower")}
    best = max(measured, key=lambda r: r.ratio.median if r.ratio else 0)
    worst = min(measured, key=lambda r: r.ratio.median if r.ratio else 0)
    assert best.ratio is not None
    assert worst.ratio is not None
    text = (
        f"{method} is faster than vanilla in {counts['faster']} of {len(measured)} settings and "
        f"slower in {counts['slower']}: from {worst.ratio.median:.2f} ({describe(worst.setting)}) "
        f"to {best.ratio.median:.2f} ({describe(best.setting)})."
    )
    compared = sum(r.compared or 0 for r in measured)
    if compared:
        same = sum(r.identical or 0 for r in measured)
        text += f" At temperature 0, {same} of {compared} outputs are vanilla's."
    return text


def describe(setting: tuple[str, float, int]) -> str:
    part, temperature, concurrency = setting
    return f"{part}, temperature {temperature:g}, concurrency {concurrency}"
