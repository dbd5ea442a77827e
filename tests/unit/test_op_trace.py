"""The recorder of operations itself: it must see what a device would have to wait for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.op_trace import traced

X = torch.arange(6.0)


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.sum().item(),
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.to("cpu"),
        lambda: X.numpy(),
        lambda: X.nonzero(),
        lambda: torch.nonzero(X),
        lambda: torch.where(X > 2),
        lambda: X[X > 2],
        lambda: X.clone().__setitem__(X > 2, 0.0),
        lambda: X.masked_select(X > 2),
        lambda: bool(X.any()),
        lambda: int(X[1]),
        lambda: torch.equal(X, X),
        lambda: X.long().unique(),
        lambda: [0, 1, 2][X.long()[1]],
        lambda: 1 if (X > 2).all() else 0,
    ],
)
def test_reads_are_seen(read: Callable[[], Any]) -> None:
    with traced() as trace:
        read()
    assert trace.synchronisations


def test_nothing_else_is() -> None:
    with traced() as trace:
        y = (
            torch.where(X > 2, X, 0.0)
            .clamp(min=1)[torch.tensor([1, 2])]
            .index_select(0, torch.zeros(1, dtype=torch.long))
        )
        y.masked_fill_(y > 0, 1).add_(1)
        y.to("cpu", non_blocking=True, copy=True)
    assert trace.synchronisations == []
    assert len(trace.operations) > 8


def test_the_same_work_is_the_same_trace() -> None:
    buffer = torch.zeros(6)

    def work(data: torch.Tensor) -> None:
        buffer.copy_(data)
        (buffer * 2 + buffer).sum()

    def trace_of(data: torch.Tensor) -> Any:
        with traced() as trace:
            work(data)
        return trace.operations, trace.allocated

    # Data in memory of its own would be another address: it goes in before what is compared.
    one, two = torch.zeros(6), torch.ones(6)
    first, second = trace_of(one), trace_of(two)
    assert first != second
    two.copy_(torch.full((6,), 3.0))
    assert second == trace_of(two)
    assert len(second[1]) == 3


def test_shapes_scalars_and_order_are_in_a_trace() -> None:
    def trace_of(work: Callable[[], Any]) -> Any:
        with traced() as trace:
            work()
        return trace.operations

    works: list[Callable[[], Any]] = [
        lambda: X.mul(2).add(1),
        lambda: X.add(1).mul(2),
        lambda: X.mul(3).add(1),
        lambda: X[:4].mul(2).add(1),
        lambda: X.mul(2),
    ]
    found = [trace_of(work) for work in works]
    assert trace_of(works[0]) == found[0]
    assert all(found[i] != found[j] for i in range(5) for j in range(i))
