"""IF nodes on a GPU: a captured step, or one inside it, runs where its condition holds."""

from __future__ import annotations

import torch

from vllm_adadecode.draft.conditional_graph import IfNode, check_conditional_nodes


def test_steps_run_where_their_condition_holds() -> None:
    check_conditional_nodes(num_ranks=1)
    outer, inner = (torch.zeros((), dtype=torch.bool, device="cuda") for _ in range(2))
    counts = torch.zeros(3, dtype=torch.int64, device="cuda")
    guard = IfNode()

    def deeper() -> None:
        counts[1].add_(1)

    def step() -> None:
        # Memory of the graph's own, allocated in a body.
        counts[0].add_((counts[0] * 0 + 1).clone())
        guard.when(inner.logical_and(outer), deeper)

    counts[0].add_(0)  # compiled and loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        guard.when(outer, step)
        counts[2].add_(1)

    for first, second in ((False, False), (True, False), (False, True), (True, True)):
        counts.zero_()
        outer.fill_(first)
        inner.fill_(second)
        for _ in range(3):
            graph.replay()
        assert counts.tolist() == [3 * first, 3 * (first and second), 3]
