"""What one round has drafted: the windows, what happened at each exit, and how it is counted.

Owns what both draft loops hand back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.metrics.counters import Counters


@dataclass
class DraftState:
    """Windows by batch row, under construction while a loop runs.

    Attributes:
        tokens: int64 ``[num_reqs, 1 + max_drafts]``: last sampled token, draft tokens, zeros; on
            the device of the loop that made them.
        num_drafts: ``[num_reqs]``.
        depths: ``[num_reqs, 1 + max_drafts]`` spans each token has been through.
        exits: ``[num_reqs, max_drafts]`` exit index whose head gave each draft token.
    """

    tokens: torch.Tensor
    num_drafts: np.ndarray
    depths: np.ndarray
    exits: np.ndarray


@dataclass
class ExitCounts:
    """What happened at each exit, int64 ``[num_exits]`` each.

    Attributes:
        rows: requests that came to the exit, once for every token that they tried to draft.
        draft_tokens: of those, predictions of its head that were accepted.
        heads_evaluated: of those, with the head evaluated.
        head_batches: evaluations of the head, each for all rows that needed it.
        span_passes: passes of the exit's span.
    """

    rows: np.ndarray
    draft_tokens: np.ndarray
    heads_evaluated: np.ndarray
    head_batches: np.ndarray
    span_passes: np.ndarray

    @staticmethod
    def zeros(num_exits: int) -> "ExitCounts":
        return ExitCounts(*(np.zeros(num_exits, dtype=np.int64) for _ in range(5)))


@dataclass
class DraftResult:
    """A round that has ended, on the host but for the tokens of the host's loop.

    Attributes:
        state: the windows.
        exits: what happened at each exit.
        limits: ``[num_reqs]`` most draft tokens that each request might have.
        used_exits: ``[num_reqs]`` exits that might give them, from the first.
    """

    state: DraftState
    exits: ExitCounts
    limits: np.ndarray
    used_exits: np.ndarray

    def count(
        self, counters: Counters, spans: Sequence[tuple[int, int]], thresholds: ExitThresholds
    ) -> None:
        """Add it to the worker's counters.

        Args:
            spans: first layer and end of each.
            thresholds: those that it drafted with.
        """
        made, depths = self.exits, self.state.depths
        exits = list(counters.exits.values())
        for e in range(len(made.rows)):
            num_layers = spans[e][1] - spans[e][0]
            counters.draft_layers += num_layers * int(made.span_passes[e])
            # Each token goes through a span once at most.
            counters.draft_token_layers += num_layers * int((depths > e).sum())
            if not thresholds.uses(e):
                continue
            exits[e].heads_evaluated += int(made.heads_evaluated[e])
            exits[e].head_batches += int(made.head_batches[e])
            exits[e].draft_tokens += int(made.draft_tokens[e])
            if thresholds.uses_gate(e):
                exits[e].gates_evaluated += int(made.rows[e])
            exits[e].next_exit += int(made.rows[e + 1 : e + 2].sum())
