"""What a target and its heads are worth on a set of prompts, with transformers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.demo.heads import Heads, hidden_states
from vllm_adadecode.evaluation.metrics import ExitMetrics, measure
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.evaluation.trace import Trace

NEW_TOKENS = 128


@dataclass(frozen=True)
class Generation:
    tokens: torch.Tensor  # [prompt + new]
    prompt: int


@torch.no_grad()
def generate(model: Any, rows: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy, a batch of equally long prompts; an end-of-text token does not end a row."""
    cache, newest, columns = None, rows, [rows]
    for _ in range(new_tokens):
        out = model(newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, newest = out.past_key_values, out.logits[:, -1:].argmax(-1)
        columns.append(newest)
    return torch.cat(columns, 1)


def generations(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
    """In order of prompt length, which need not be the order of `prompts`."""
    result = []
    for length, group in groupby(sorted(prompts, key=len), key=len):
        rows = generate(model, torch.tensor([list(p) for p in group]), new_tokens)
        result += [Generation(row, length) for row in rows]
    return result


def trace(model: Any, heads: Heads, text: Generation) -> Trace:
    """Of all generated tokens, the first one included."""
    # The last token is only ever guessed at.
    hidden, final = hidden_states(model, text.tokens[None, :-1], heads.exit_layers)
    confidence, tokens = [], []
    for layer, h in hidden.items():
        with torch.no_grad():
            logits = heads.logits(model, layer, h[0, text.prompt - 1 :]).float()
        best, token = logits.softmax(-1).max(-1)
        confidence.append(best.numpy())
        tokens.append(token.numpy())
    return Trace(
        exit_layers=heads.exit_layers,
        num_layers=model.config.num_hidden_layers,
        generated=text.tokens[text.prompt :].numpy(),
        final=final[0, text.prompt - 1 :].argmax(-1).numpy(),
        token=np.stack(tokens),
        confidence=np.stack(confidence),
        gate=np.ones_like(confidence),
    )


@dataclass(frozen=True)
class Report:
    prompts: int
    new_tokens: int
    tokens_per_verification: float
    layer_passes_per_token: float  # in whole models: 1 is plain decoding
    head_checks_per_token: float
    drafts_accepted: float  # share
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


def report(
    model: Any,
    heads: Heads,
    texts: Sequence[Generation],
    threshold: float = 0.75,
    max_drafts: int = 5,
) -> Report:
    setting = Setting.uniform(len(heads.exit_layers), threshold, max_drafts)
    found = measure([trace(model, heads, text) for text in texts], setting)
    new = [text.tokens[text.prompt :].numpy() for text in texts]
    return Report(
        prompts=len(texts),
        new_tokens=len(new[0]),
        tokens_per_verification=found.tokens_per_verification,
        layer_passes_per_token=found.layer_passes_per_token,
        head_checks_per_token=found.head_checks_per_token,
        drafts_accepted=found.acceptance or 0.0,
        looping=float(np.mean([loops(tokens) for tokens in new])),
        distinct_four_grams=float(np.mean([distinct_four_grams(tokens) for tokens in new])),
        exits=found.exits,
    )


def report_sets(
    model: Any,
    heads: Heads,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    new_tokens: int = NEW_TOKENS,
    threshold: float = 0.75,
    max_drafts: int = 5,
) -> dict[str, Report]:
    """A report for each named set of prompts."""
    return {
        name: report(model, heads, generations(model, ids, new_tokens), threshold, max_drafts)
        for name, ids in prompts.items()
    }
