"""Which positions of which sequences an optimizer step sees.

Owns the order of the data and its cutting to the memory there is. All of it follows from the seed
and the number of the step, so a resumed run needs no state of a data loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np
import torch

from vllm_adadecode.training.sequences import Sequence


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        ids: ``[N, T]`` int64, padded on the right with 0.
        trained: ``[N, T]`` bool, positions whose final distribution is learned.
    """

    ids: torch.Tensor
    trained: torch.Tensor


@dataclass(frozen=True)
class TokenRow:
    """One sequence as the trainer sees it: its ids, and the trained positions [first, len - 1).

    The last token's own distribution is not among them: behind an end-of-text token nobody decodes.
    """

    ids: tuple[int, ...]
    first: int

    @property
    def num_trained(self) -> int:
        return max(0, len(self.ids) - 1 - self.first)


def token_rows(
    sequences: ListOf[Sequence], max_length: int, outputs_only: bool = False
) -> list[TokenRow]:
    """Rows of at most ``max_length`` tokens; sequences without a trained position are left out.

    Args:
        sequences: any.
        max_length: longer ones are cut.
        outputs_only: learn only the positions that predict an output token.
    """
    rows = []
    for s in sequences:
        first = max(0, len(s.prompt_ids) - 1) if outputs_only else 0
        row = TokenRow(s.ids[:max_length], first)
        if row.num_trained:
            rows.append(row)
    return rows


def step_rows(
    rows: ListOf[TokenRow], batch_size: int, seed: int, step: int, epoch_steps: int
) -> list[TokenRow]:
    """The rows of optimizer step number ``step``; each epoch has an order of its own."""
    epoch, index = divmod(step, epoch_steps)
    order = np.random.default_rng((seed, epoch)).permutation(len(rows))
    return [rows[i] for i in order[index * batch_size : (index + 1) * batch_size]]


def micro_batches(rows: ListOf[TokenRow], max_tokens: int) -> Iterator[MicroBatch]:
    """Cut rows into batches of at most ``max_tokens`` tokens with padding (at least one row)."""
    group: list[TokenRow] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if group and (len(group) + 1) * len(row.ids) > max_tokens:
            yield _pad(group)
            group = []
        group.append(row)
    if group:
        yield _pad(group)


def _pad(rows: ListOf[TokenRow]) -> MicroBatch:
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    trained = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        trained[i, row.first : len(row.ids) - 1] = True
    return MicroBatch(ids, trained)
