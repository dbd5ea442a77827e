"""What `benchmarks.quick` writes and prints, and what counts as worse than before."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cost_accounting import account
from benchmarks.demo.compare import METHODS, Difference, Group
from benchmarks.demo.prompts import Prompt, dump
from benchmarks.demo.report import total
from benchmarks.machine import command, git_revision, machine, versions
from benchmarks.served import Target
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import read_json
from vllm_adadecode.heads import HeadsConfig

# Prompts by what they are to the target and its heads.
TITLES = {"second_stage": "in_domain", "held_out": "out_of_domain"}
# Counts that must not get worse, and whether more is worse.
COUNTS = {"layers_executed_per_token": True, "draft_acceptance_rate": False}
# Settings that decide what is counted.
COUNTED = ("shape", "dtype", "prompts", "new_tokens")
# Another processor or PyTorch adds in another order, which may turn a head that is right at its
# threshold; one draft of a run is about this share.
SLACK = 0.002
WASTED = {
    "rejected_drafts": "rejected drafts",
    "checks_not_followed": "checks without a draft",
    "gates": "gates",
}


def digest(prompts: Sequence[Prompt]) -> str:
    """Tells whether two runs had the same prompts."""
    return f"{len(prompts)}, sha1 {hashlib.sha1(dump(prompts).encode()).hexdigest()}"


def build(
    groups: Sequence[Group],
    differences: Sequence[Difference],
    repeats: int,
    settings: dict[str, Any],
    target: Target,
    heads: HeadsConfig,
) -> dict[str, Any]:
    """Everything that was measured; the top level holds the figures over all prompts.

    Args:
        groups: each prompt's answers ``repeats`` times, all prompts in turn.
        settings: of the run; those in `COUNTED` must be the same in runs that are compared.
        target, heads: what was served, which says what was counted has cost.
    """

    def all_figures(group: Group) -> dict[str, Any]:
        cost = account(group.stats, target, heads)
        return figures(group, repeats) | {"costs": cost.as_dict() if cost else None}

    everything = Group(
        files="all",
        answers={m: interleave(groups, m, repeats) for m in METHODS},
        stats=total([g.stats for g in groups]),
    )
    return {
        "what": "the same prompts to vllm serve with --speculative-config adadecode and without, "
        "on a widened target, temperature 0, one request at a time; times of a prompt are medians "
        "of its repeats",
        **all_figures(everything),
        "outputs": len(everything.answers["vanilla"]),
        "identical": not differences,
        "divergences": len(differences),
        "by_prompts": {TITLES[g.files]: all_figures(g) for g in groups},
        "differences": [asdict(difference) for difference in differences],
        "settings": settings,
        "command": command(),
        "git": git_revision(),
        "versions": versions(),
        "machine": machine(),
    }


def interleave(groups: Sequence[Group], method: str, repeats: int) -> list[Any]:
    """The answers of all groups, each repeat whole."""
    found = []
    for repeat in range(repeats):
        for group in groups:
            size = len(group.answers[method]) // repeats
            found += group.answers[method][repeat * size : (repeat + 1) * size]
    return found


def figures(group: Group, repeats: int) -> dict[str, Any]:
    """Ratios of times, and counts; of a group of prompts."""
    size = len(group.answers["vanilla"]) // repeats
    seconds, tokens = {}, {}
    by_repeat = {}
    for method in METHODS:
        answers = group.answers[method]
        runs = [answers[i : i + size] for i in range(0, len(answers), size)]
        by_repeat[method] = [sum(a.seconds for a in run) for run in runs]
        seconds[method] = sum(
            statistics.median(a.seconds for a in prompt) for prompt in zip(*runs, strict=True)
        )
        tokens[method] = sum(len(a.token_ids) for a in runs[0])
    return {
        "speedup": {m: seconds["vanilla"] / seconds[m] for m in METHODS},
        "speedup_by_repeat": {
            m: [v / x for v, x in zip(by_repeat["vanilla"], by_repeat[m], strict=True)]
            for m in METHODS
            if m != "vanilla"
        },
        "ms_per_token": {m: 1000 * seconds[m] / tokens[m] for m in METHODS},
        "layers_executed_per_token": group.stats["layers_executed_per_token"],
        "draft_acceptance_rate": group.stats["draft_acceptance_rate"],
        "mean_acceptance_length": group.stats["mean_acceptance_length"],
        "exits": group.stats["exits"],
    }


def load(file: Path) -> dict[str, Any]:
    """An earlier result.

    Raises:
        AdaDecodeError: it is not there, or none.
    """
    result = read_json(file)
    needed = ("speedup", "settings", "by_prompts", "versions", "machine", *COUNTS)
    if not isinstance(result, dict) or any(key not in result for key in needed):
        raise AdaDecodeError(f"{file} is no result of bench-quick: give one to --compare")
    return result


def regressions(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """One line for each count that is worse than it was.

    On the same processor with the same PyTorch any difference counts, elsewhere more than `SLACK`.

    Raises:
        AdaDecodeError: the two were measured with other settings.
    """
    for name in COUNTED:
        if new["settings"][name] != old["settings"][name]:
            raise AdaDecodeError(
                f"the earlier result has another {name} ({old['settings'][name]}, now "
                f"{new['settings'][name]}): compare with one of the same settings"
            )
    slack = 1e-9 if _same_arithmetic(new, old) else SLACK
    places = [("all", new, old)]
    places += [(p, new["by_prompts"][p], old["by_prompts"][p]) for p in old["by_prompts"]]
    found = []
    for place, mine, before in places:
        for name, more_is_worse in COUNTS.items():
            now, then = mine[name], before[name]
            if then is None:
                continue
            # No draft was verified: nothing is accepted any more.
            now = 0.0 if now is None else now
            loss = (now - then) if more_is_worse else (then - now)
            if loss > slack * then:
                found.append(f"{name} of {place} prompts: {now:.5f}, was {then:.5f}")
    return found


def _same_arithmetic(new: dict[str, Any], old: dict[str, Any]) -> bool:
    return bool(
        new["machine"].get("cpu") == old["machine"].get("cpu")
        and new["versions"].get("torch") == old["versions"].get("torch")
    )


def print_report(console: Console, result: dict[str, Any], old: dict[str, Any] | None) -> None:
    """The result as a table, with an earlier one in brackets."""
    table = Table(title="vLLM with AdaDecode and without, widened target", title_justify="left")
    table.add_column("")
    places = [("all", result, old)] + [
        (name, part, old["by_prompts"].get(name) if old else None)
        for name, part in result["by_prompts"].items()
    ]
    for name, _, _ in places:
        table.add_column(name.replace("_", " "), justify="right")

    def row(title: str, form: str, *path: str) -> None:
        cells = []
        for _, mine, before in places:
            texts = [_text(form, figures, path) for figures in (mine, before) if figures]
            cells.append(texts[0] + (f" ({texts[1]})" if len(texts) > 1 else ""))
        table.add_row(title, *cells)

    row("speed-up", "{:.2f}", "speedup", "adadecode")
    row("ms a token, vanilla", "{:.1f}", "ms_per_token", "vanilla")
    row("ms a token, AdaDecode", "{:.1f}", "ms_per_token", "adadecode")
    row("layers executed per token (vanilla: 1)", "{:.4f}", "layers_executed_per_token")
    row("draft acceptance rate", "{:.2%}", "draft_acceptance_rate")
    row("mean acceptance length", "{:.2f}", "mean_acceptance_length")
    for kind, name in (("bytes", "bytes of weights"), ("flops", "FLOPs")):
        row(f"{name} a token (vanilla: 1)", "{:.3f}", "costs", kind, "of_vanilla")
        for why, wasted in WASTED.items():
            row(f"  of them for {wasted}", "{:.1%}", "costs", kind, "wasted", why)
    accepted = ("costs", "bytes", "accepted_draft_of_vanilla")
    row("bytes an accepted draft (a vanilla token: 1)", "{:.2f}", *accepted)
    row("speed-up that the bytes predict", "{:.2f}", "costs", "predicted_speedup")
    console.print(table)
    same = result["outputs"] - result["divergences"]
    style = "bold green" if result["identical"] else "bold red"
    console.print(f"identical output: {same} of {result['outputs']}", style=style)
    where, settings = result["machine"], result["settings"]
    console.print(
        f"{where['cpu']}, {settings['threads']} threads, {settings['dtype']}, "
        f"{settings['step_megabytes']} MB a step"
    )


def _text(form: str, figures: dict[str, Any], path: Sequence[str]) -> str:
    value: Any = figures
    for key in path:
        # An earlier result may lack a figure.
        value = value.get(key) if value is not None else None
    return "-" if value is None else form.format(value)
