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
from benchmarks.demo.simulate import Counts, Setting, loops, simulate

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


def head_guesses(model: Any, heads: Heads, text: Generation) -> tuple[NDArray, NDArray]:
    """[exits, new tokens] each: confidence of the guess at each generated token, and whether it
    is right."""
    # The last token is only ever guessed at.
    hidden, _ = hidden_states(model, text.tokens[None, :-1], heads.exit_layers)
    generated = text.tokens[text.prompt :]
    confidence, correct = [], []
    for layer, h in hidden.items():
        with torch.no_grad():
            logits = heads.logits(model, layer, h[0, text.prompt - 1 :]).float()
        best, token = logits.softmax(-1).max(-1)
        confidence.append(best.numpy())
        correct.append((token == generated).numpy())
    return np.stack(confidence), np.stack(correct)


@dataclass(frozen=True)
class ExitReport:
    layer: int
    agreement: float  # with the last layer
    coverage: float  # share of positions above the threshold
    precision: float  # agreement among those


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
    exits: tuple[ExitReport, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    layers = model.config.num_hidden_layers
    setting = Setting(heads.exit_layers, layers, threshold, max_drafts)
    guesses = [head_guesses(model, heads, text) for text in texts]
    counts = sum((simulate(*guess, setting) for guess in guesses), Counts())
    confidence, correct = (np.concatenate(part, axis=1) for part in zip(*guesses, strict=True))
    confident = confidence > threshold
    new = [text.tokens[text.prompt :].numpy() for text in texts]
    return Report(
        prompts=len(texts),
        new_tokens=len(new[0]),
        tokens_per_verification=counts.tokens / counts.verifications,
        layer_passes_per_token=counts.layer_passes / counts.tokens / layers,
        head_checks_per_token=counts.head_checks / counts.tokens,
        drafts_accepted=counts.accepted / max(1, counts.drafts),
        looping=float(np.mean([loops(tokens) for tokens in new])),
        distinct_four_grams=float(np.mean([distinct_four_grams(tokens) for tokens in new])),
        exits=tuple(
            ExitReport(
                layer,
                agreement=float(correct[i].mean()),
                coverage=float(confident[i].mean()),
                precision=float(correct[i][confident[i]].mean()) if confident[i].any() else 1.0,
            )
            for i, layer in enumerate(heads.exit_layers)
        ),
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
