"""What a case of the kernels' comparison is, and the inputs that cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    run: Callable[[torch.Generator], Outputs]
    # Kernels below vllm_adadecode.kernels that the case launches.
    kernels: tuple[str, ...]
    # For floats, relative and absolute; integers must be equal.
    tolerance: float


CASES: dict[str, Case] = {}

# Nothing is added in another order.
EXACT = 0.0
# Sums of a few hundred float32 terms in another order, and exp.
SUMS = 2e-5
# A float32 that is rounded to bfloat16 may fall on the other side: one unit in the last place.
BFLOAT16_STEP = 2**-7


def case(
    *kernels: str, tolerance: float = SUMS, **variants: dict[str, Any]
) -> Callable[[Callable[..., Outputs]], Callable[..., Outputs]]:
    """Declare a case, or one for every named set of keyword arguments."""

    def declare(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
        for variant, kwargs in (variants or {"": {}}).items():
            name = f"{function.__name__}-{variant}" if variant else function.__name__

            def run(rng: torch.Generator, kwargs: dict[str, Any] = kwargs) -> Outputs:
                return function(rng, **kwargs)

            assert name not in CASES, name
            CASES[name] = Case(run, kernels, tolerance)
        return function

    return declare


def floats(
    rng: torch.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return (torch.randn(shape, generator=rng) * scale).to(dtype)


def numbers(tokens: torch.Tensor, p: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tokens where there is a most likely one; where p is NaN, only whether the id is valid."""
    valid = (tokens >= 0) & (tokens < vocab_size)
    return torch.where(p.isnan(), torch.where(valid, -1, -2), tokens)
