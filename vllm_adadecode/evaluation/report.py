"""A report on heads: its JSON and its tables.

Owns how numbers are laid out; what they mean is `metrics.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_adadecode.evaluation.calibrate import Calibration
from vllm_adadecode.evaluation.costs import Costs
from vllm_adadecode.evaluation.metrics import OWN_TEXT, Metrics
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
    found = list(sets.values())
    table = _table(title, "", sets)
    rows: dict[str, list[str]] = {
        "sequences": [f"{m.sequences:,}" for m in found],
        "generated tokens": [f"{m.generated_tokens:,}" for m in found],
        "ideal speed-up, layers alone": [f"{m.ideal_speedup:.2f}" for m in found],
        "ideal speed-up, heads counted": [f"{m.ideal_speedup_with_head_cost:.2f}" for m in found],
        "mean acceptance length": [f"{m.mean_acceptance_length:.2f}" for m in found],
        "draft acceptance rate": [_share(m.draft_acceptance_rate) for m in found],
        "layers executed per token": [f"{m.layers_executed_per_token:.3f}" for m in found],
        "heads evaluated per token": [f"{m.heads_evaluated_per_token:.2f}" for m in found],
    }
    if any(m.gates_evaluated_per_token for m in found):
        rows["gates evaluated per token"] = [f"{m.gates_evaluated_per_token:.2f}" for m in found]
    if any(m.own_text < OWN_TEXT for m in found):
        rows["text is the target's own"] = [_share(m.own_text) for m in found]
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def exits_table(name: str, metrics: Metrics) -> Table:
    """One row per exit layer, see `ExitMetrics`."""
    columns = ("agreement", "coverage", "precision", "ECE")
    counted = ("evaluated\nper token", "draft\ntokens", "acceptance\nrate")
    table = _table(f"Each head by itself: {name}", "exit", (*columns, *counted))
    for e in metrics.exits:
        table.add_row(
            f"{e.layer}, off" if e.threshold >= 1.0 else str(e.layer),
            f"{e.agreement:.2f}",
            f"{e.coverage:.2f}",
            "-" if e.precision is None else f"{e.precision:.2f}",
            f"{e.calibration_error:.3f}",
            f"{e.heads_evaluated_per_token:.2f}",
            f"{e.draft_tokens:,}",
            _share(e.draft_acceptance_rate),
        )
    return table


def costs_line(costs: Costs) -> str:
    """Costs in words."""
    gate = f", a gate {costs.gate:.3f}" if costs.gate else ""
    return (
        f"costs in units of one of {costs.num_layers} layers: a head {costs.head:.2f}{gate}, the "
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
    more = ("layers\nalone", "mean accept-\nance length", "draft accept-\nance rate")
    table = _table("Ideal speed-up, heads counted", "set", (*found.settings, *more))
    for name, predicted in found.predictions.items():
        chosen = predicted["calibrated"]
        table.add_row(
            name,
            *(f"{m.ideal_speedup_with_head_cost:.3f}" for m in predicted.values()),
            f"{chosen.ideal_speedup:.3f}",
            f"{chosen.mean_acceptance_length:.2f}",
            _share(chosen.draft_acceptance_rate),
        )
    return table


def calibration_json(found: Calibration, exit_layers: Sequence[int]) -> dict[str, Any]:
    """What is written beside calibrated heads."""
    return {
        "pays": found.pays,
        "setting": setting_json(found.setting, exit_layers),
        "costs": found.costs.model_dump(),
        "settings_tried": found.settings_tried,
        "settings": {name: setting_json(s, exit_layers) for name, s in found.settings.items()},
        "predictions": {
            name: {which: metrics.as_dict() for which, metrics in predicted.items()}
            for name, predicted in found.predictions.items()
        },
    }


def _table(title: str, first: str, columns: Sequence[str] | Mapping[str, Any]) -> Table:
    """A table with numbers in all columns but the first."""
    # In a narrow terminal, names and numbers go over several lines; none is cut off.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
