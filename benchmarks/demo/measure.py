"""What a target and its heads are worth on a set of prompts, with transformers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.demo.heads import NEW_TOKENS
from vllm_adadecode.evaluation.costs import choose_costs
from vllm_adadecode.evaluation.data import DataSet, continue_prompts
from vllm_adadecode.evaluation.metrics import ExitMetrics, measure
from vllm_adadecode.evaluation.session import Session
from vllm_adadecode.evaluation.simulate import Setting


@dataclass(frozen=True)
class Report:
    prompts: int
    new_tokens: int  # at most
    mean_acceptance_length: float
    layers_executed_per_token: float  # in whole models: 1 is plain decoding
    speedup: float  # ideal, heads and gates counted as bytes
    heads_evaluated_per_token: float
    draft_acceptance_rate: float  # share
    looping: float  # share of generations
    distinct_four_grams: float  # mean share of a generation's four-grams that differ
    exits: tuple[ExitMetrics, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def loops(tokens: NDArray, tail: int = 64, longest: int = 32) -> bool:
    """Whether the end of a generation repeats itself exactly, with a period of up to `longest`."""
    end = np.asarray(tokens)[-tail:]
    return any(np.array_equal(end[p:], end[:-p]) for p in range(1, longest + 1))


def distinct_four_grams(tokens: NDArray) -> float:
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(set(grams)) / max(1, len(grams))


def report(session: Session, continued: DataSet, new_tokens: int, setting: Setting) -> Report:
    """Of prompts that the target has continued."""
    traces = session.traces([continued])[continued.name]
    costs = choose_costs("bytes", session.config, session.target, session.readout)
    found = measure(traces, setting, costs)
    new = [np.asarray(sequence.output_ids) for sequence in continued.sequences]
    return Report(
        prompts=len(new),
        new_tokens=new_tokens,
        mean_acceptance_length=found.mean_acceptance_length,
        layers_executed_per_token=found.layers_executed_per_token,
        speedup=found.ideal_speedup_with_head_cost,
        heads_evaluated_per_token=found.heads_evaluated_per_token,
        draft_acceptance_rate=found.draft_acceptance_rate or 0.0,
        looping=float(np.mean([loops(tokens) for tokens in new])),
        distinct_four_grams=float(np.mean([distinct_four_grams(tokens) for tokens in new])),
        exits=found.exits,
    )


def report_sets(
    session: Session,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    new_tokens: int = NEW_TOKENS,
    setting: Setting | None = None,
) -> dict[str, Report]:
    """A report for each named set of prompts; without a setting, of the heads' own."""
    found = {}
    for name, ids in prompts.items():
        continued = continue_prompts(session.target, ids, new_tokens, name)
        usable = DataSet(name, tuple(s for s in continued if len(s.output_ids) > 1))
        found[name] = report(session, usable, new_tokens, setting or session.setting)
    return found
