"""A report on heads: its JSON and its tables.

Owns how numbers are laid out; what they mean is `metrics.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from vllm_adadecode.evaluation.calibrate import Calibration
from vllm_adadecode.evaluation.costs import Costs
from vllm_adadecode.evaluation.metrics import OWN_TEXT, ExitMetrics, Metrics
from vllm_adadecode.evaluation.simulate import Setting


def setting_json(setting: Setting, exit_layers: Sequence[int]) -> dict[str, Any]:
    """A setting as config.json and the command line spell it."""
    found: dict[str, Any] = {
        "exit_layers": [e for e, use in zip(exit_layers, setting.used, strict=True) if use],
        "confidence_threshold": list(setting.thresholds),
        "num_speculative_tokens": setting.max_drafts,
    }
    if setting.gate_thresholds is not None:
        found["gate_threshold"] = list(setting.gate_thresholds)
    return found


def sets_table(sets: Mapping[str, Metrics], title: str) -> Table:
    """One column a set: all heads together, under one setting."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in sets:
        table.add_column(name, justify="right")
    rows: dict[str, list[str]] = {
        "sequences": [f"{m.sequences:,}" for m in sets.values()],
        "tokens": [f"{m.tokens:,}" for m in sets.values()],
        "ideal speed-up in layers executed": [f"{m.ideal_speedup:.2f}" for m in sets.values()],
        "ideal speed-up, heads counted": [
            f"{m.ideal_speedup_with_head_cost:.2f}" for m in sets.values()
        ],
        "mean acceptance length": [f"{m.mean_acceptance_length:.2f}" for m in sets.values()],
        "draft acceptance rate": [_share(m.draft_acceptance_rate) for m in sets.values()],
        "heads evaluated per token": [f"{m.heads_evaluated_per_token:.2f}" for m in sets.values()],
    }
    if any(m.gates_evaluated_per_token for m in sets.values()):
        rows["gates evaluated per token"] = [
            f"{m.gates_evaluated_per_token:.2f}" for m in sets.values()
        ]
    if any(m.own_text < OWN_TEXT for m in sets.values()):
        rows["text is the target's own"] = [_share(m.own_text) for m in sets.values()]
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def exits_table(sets: Mapping[str, Metrics]) -> Table:
    """One row per set and exit layer, see `ExitMetrics`; checks are an emitted token."""
    table = Table(title="Heads, each by itself", title_justify="left")
    table.add_column("set")
    for column in (
        "exit",
        "from",
        "agrees",
        "covers",
        "precise",
        "ECE",
        "checks",
        "draft tokens",
        "acceptance rate",
    ):
        table.add_column(column, justify="right")
    for name, metrics in sets.items():
        for i, e in enumerate(metrics.exits):
            table.add_row(name if i == 0 else "", *_exit_cells(e))
        table.add_section()
    return table


def _exit_cells(e: ExitMetrics) -> list[str]:
    return [
        str(e.layer),
        "off" if e.threshold >= 1.0 else f"{e.threshold:g}",
        f"{e.agreement:.2f}",
        f"{e.coverage:.2f}",
        "-" if e.precision is None else f"{e.precision:.2f}",
        f"{e.calibration_error:.3f}",
        f"{e.heads_evaluated_per_token:.2f}",
        f"{e.draft_tokens:,}",
        _share(e.draft_acceptance_rate),
    ]


def costs_line(costs: Costs) -> str:
    """Costs in words."""
    gate = f", a gate {costs.gate:.3f}" if costs.gate else ""
    return (
        f"costs in passes of one of {costs.num_layers} layers: a head {costs.head:.2f}{gate}, the "
        f"LM head {costs.lm_head:.2f} ({costs.source})"
    )


def setting_line(setting: Setting, exit_layers: Sequence[int]) -> str:
    """A setting in words."""
    if not any(setting.used):
        return "no drafting"
    gates = setting.gate_thresholds or (None,) * len(exit_layers)
    parts = [
        f"{layer} at {t:g}" + (f" (gate {g:g})" if g else "")
        for layer, t, g, use in zip(
            exit_layers, setting.thresholds, gates, setting.used, strict=True
        )
        if use
    ]
    return f"exits {', '.join(parts)}; K = {setting.max_drafts}"


def calibration_table(found: Calibration) -> Table:
    """Predictions: the choice beside the paper's setting and the heads' own so far."""
    table = Table(title="Ideal speed-up, heads counted", title_justify="left")
    table.add_column("set")
    columns = ("calibrated", "paper", "before")
    for column in (
        *columns,
        "in layers executed",
        "mean acceptance length",
        "draft acceptance rate",
    ):
        table.add_column(column, justify="right")
    for name, p in found.predictions.items():
        table.add_row(
            name,
            *(f"{m.ideal_speedup_with_head_cost:.3f}" for m in (p.calibrated, p.paper, p.current)),
            f"{p.calibrated.ideal_speedup:.3f}",
            f"{p.calibrated.mean_acceptance_length:.2f}",
            _share(p.calibrated.draft_acceptance_rate),
        )
    return table


def calibration_json(
    found: Calibration, paper: Setting, current: Setting, exit_layers: Sequence[int]
) -> dict[str, Any]:
    """What is written beside calibrated heads."""
    return {
        "pays": found.pays,
        "setting": setting_json(found.setting, exit_layers),
        "costs": found.costs.model_dump(),
        "settings_tried": found.settings_tried,
        "settings": {
            "calibrated": setting_json(found.setting, exit_layers),
            "paper": setting_json(paper, exit_layers),
            "before": setting_json(current, exit_layers),
        },
        "predictions": {
            name: {
                "calibrated": p.calibrated.as_dict(),
                "paper": p.paper.as_dict(),
                "before": p.current.as_dict(),
            }
            for name, p in found.predictions.items()
        },
    }


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
