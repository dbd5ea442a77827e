"""Heads by the fused kernels (here their references), without an engine (test_cheap_heads.py).

What they must give is what the module of a head gives (test_head_parts.py).
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from tests.support.heads_samples import HIDDEN, heads_fields, random_tensors
from vllm_adadecode.heads import EarlyHead, HeadsConfig
from vllm_adadecode.heads import make_heads as new_heads
from vllm_adadecode.model.draft_sampler import DraftSampler, draft_columns
from vllm_adadecode.model.fused_head import FusedHeads, fused_features


def make_head(**changes: Any) -> EarlyHead:
    config = HeadsConfig(**heads_fields(gate=True, **changes))
    head = new_heads(config, torch.float32, "cpu")[1]
    tensors = random_tensors(config)
    for name, parameter in head.checkpoint_parameters().items():
        parameter.data = tensors[f"exit_1.{name}"]
    return head


@pytest.fixture(scope="module")
def norm() -> RMSNorm:
    with set_current_vllm_config(VllmConfig()):
        layer = RMSNorm(HIDDEN, eps=1e-5)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.weight, 1.0, 0.1)
    return layer


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("plain", [True, False], ids=["rms_norm", "other_norm"])
@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("transform", ["identity", "full", "low_rank"])
@torch.inference_mode()
def test_features(norm: RMSNorm, transform: str, placement: str, plain: bool, gated: bool) -> None:
    rank = 4 if transform == "low_rank" else None
    head = make_head(norm=placement, transform=transform, rank=rank)
    used: Any = norm if plain else lambda x: 2 * norm(x).tanh()
    # States of very different sizes: the norms' epsilons and the order of steps count.
    sizes = torch.logspace(-3, 2, 6)[:, None]
    hidden, residual = torch.randn(6, HIDDEN) * sizes, torch.randn(6, HIDDEN) * sizes
    given = hidden.clone(), residual.clone()
    x, gate = fused_features(head, hidden, residual, used, use_gate=gated)
    torch.testing.assert_close(x, head.features(hidden + residual, used), rtol=1e-5, atol=1e-6)
    if gated:
        logit = head.gate_logit(hidden + residual)
        assert gate is not None
        assert logit is not None
        torch.testing.assert_close(gate, logit.sigmoid(), rtol=1e-5, atol=1e-6)
        assert gate.max() - gate.min() > 0.1
    else:
        assert gate is None
    assert torch.equal(hidden, given[0])
    assert torch.equal(residual, given[1])


@pytest.mark.parametrize("in_pass", [None, torch.tensor([True, False] * 10)], ids=["all", "half"])
@pytest.mark.parametrize(
    "threshold", [None, 0.5, torch.tensor(0.5)], ids=["none", "host", "device"]
)
@torch.inference_mode()
def test_which_rows_are_evaluated(
    norm: RMSNorm, threshold: float | torch.Tensor | None, in_pass: torch.Tensor | None
) -> None:
    """Those in the pass that pass the gate; the LM head is spared for the gate's sake alone."""
    head, given = make_head(), []

    def top1(x: torch.Tensor, other: None, **rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given.append(rows)
        return torch.arange(len(x)), torch.ones(len(x))

    staged: Any = SimpleNamespace(
        head=lambda exit_index: head,
        inner=SimpleNamespace(norm=norm),
        projection=SimpleNamespace(top1=top1),
    )
    hidden, residual = torch.randn(2, 20, HIDDEN)
    nothing = torch.empty(0)
    found = FusedHeads(staged, None).check(
        0,
        hidden,
        residual,
        slots=nothing,
        positions=nothing,
        draft=0,
        gate_threshold=threshold,
        in_pass=in_pass,
    )
    if threshold is None:
        assert given == [{}]
        assert found.live is in_pass
        return
    logit = head.gate_logit(hidden + residual)
    assert logit is not None
    expected = (logit > 0) & (torch.tensor(True) if in_pass is None else in_pass)
    assert 0 < expected.sum() < 20
    assert found.live is not None
    assert torch.equal(found.live, expected)
    ((order, num_live),) = (rows.values() for rows in given)
    assert order[: int(num_live)].tolist() == expected.nonzero()[:, 0].tolist()


def make(
    *, use_kernels: bool = True, fits: bool = True, ranks: int = 1, fp64: bool | None = None
) -> FusedHeads | None:
    """For draft tokens that are drawn with noise of that precision; None: the most likely ones."""
    projection = SimpleNamespace(
        use_kernels=use_kernels,
        kernel_weight=lambda dtype: object() if fits else None,
        num_ranks=lambda: ranks,
    )
    staged: Any = SimpleNamespace(projection=projection)
    empty = torch.empty(0)
    sampler = None if fp64 is None else DraftSampler(empty, empty, empty, [], fp64)
    return FusedHeads.make(staged, sampler, torch.float32)


def test_where_kernels_can_not_do_it_logits_are_stored() -> None:
    assert make() is not None
    assert make(use_kernels=False) is None
    assert make(fits=False) is None
    # Ranks merge what they found, but can't draw from each other's tokens.
    assert make(ranks=2) is not None
    assert make(fp64=False) is not None
    assert make(fp64=False, ranks=2) is None
    assert make(fp64=True) is None


def test_columns_of_drafts() -> None:
    """Addresses that are multiples of 16: one kernel for all of them."""
    columns = draft_columns(5, torch.device("cpu"))
    assert [int(column) for column in columns] == list(range(5))
    assert all(column.data_ptr() % 16 == 0 for column in columns)
