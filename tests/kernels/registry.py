"""What a case of a comparison of kernels is; the cases of our own, and the inputs they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    run: Callable[[torch.Generator], Outputs]
    # Kernels that the case launches, below vllm_adadecode.kernels or vllm.v1.worker.gpu.
    kernels: tuple[str, ...]
    # For floats, relative and absolute; integers must be equal.
    tolerance: float


# Nothing is added in another order.
EXACT = 0.0
# Sums of a few hundred float32 terms in another order, and exp.
SUMS = 2e-5
# A float32 that is rounded to bfloat16 may fall on the other side: one unit in the last place.
BFLOAT16_STEP = 2**-7


class Cases(dict[str, Case]):
    """Cases by name."""

    def declare(
        self, *kernels: str, tolerance: float = EXACT, **variants: dict[str, Any]
    ) -> Callable[[Callable[..., Outputs]], Callable[..., Outputs]]:
        """Declare a case, or one for every named set of keyword arguments."""

        def add(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
            for variant, kwargs in (variants or {"": {}}).items():
                name = f"{function.__name__}-{variant}" if variant else function.__name__
                assert name not in self, name
                self[name] = Case(partial(function, **kwargs), kernels, tolerance)
            return function

        return add


CASES = Cases()
case = CASES.declare


def floats(
    rng: torch.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return (torch.randn(shape, generator=rng) * scale).to(dtype)


def numbers(tokens: torch.Tensor, p: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tokens where there is a most likely one; where p is NaN, only whether the id is valid."""
    valid = (tokens >= 0) & (tokens < vocab_size)
    return torch.where(p.isnan(), torch.where(valid, -1, -2), tokens)
