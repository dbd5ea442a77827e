"""Cases whose inputs are drawn on the CPU, as the references' are, and lie on another device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _DrawnOnCPU(TorchFunctionMode):
    """Random numbers come from the case's CPU generator and are then moved."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is None:
            return function(*args, **kwargs)
        return function(*args, **{**kwargs, "device": "cpu"}).to(self.device)


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Tensors made in this context lie on ``device``, with the values they have on the CPU."""
    with torch.device(device), _DrawnOnCPU(device):
        yield
