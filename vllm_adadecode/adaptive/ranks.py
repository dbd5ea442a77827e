"""What tensor-parallel ranks tell each other, so that all come to the same choices.

Owns the exchange of the start-up profile, which waits, and the one while serving, which must not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_adadecode.adaptive.step_times import Factors


def rank_0(value: Any) -> Any:
    """The value of the first rank: all must come to the same choices."""
    group = get_tp_group()
    return value if group.world_size == 1 else group.broadcast_object(value, src=0)


class LateFactors:
    """The first rank's factors as of the last call: they have come since, so that none waits.

    The same calls on all ranks.
    """

    def __init__(self) -> None:
        # By batch size.
        self._coming: dict[int, tuple[torch.Tensor, torch.distributed.Work]] = {}

    def __call__(self, size: int, own: Factors) -> Factors:
        group = get_tp_group()
        if group.world_size == 1:
            return own
        last = self._coming.get(size)
        values = torch.tensor([torch.nan if f is None else f for f in own], dtype=torch.float64)
        work = torch.distributed.broadcast(
            values, src=group.ranks[0], group=group.cpu_group, async_op=True
        )
        self._coming[size] = values, work
        if last is None:
            return Factors(None, None)
        values, work = last
        work.wait()
        return Factors(*(None if math.isnan(f) else f for f in values.tolist()))
