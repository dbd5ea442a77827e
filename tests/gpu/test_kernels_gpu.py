"""The kernels on a GPU: equal to their references, bitwise equal in any batch, fit for graphs."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

import tests.kernels.head_cases as head_cases
import tests.kernels.loop_cases as loop_cases
from tests.gpu.device import on_device
from tests.kernels.checks import CHECKS
from tests.kernels.cpu.running import difference, run
from tests.kernels.registry import CASES, floats
from vllm_adadecode.kernels import draft_step, projection_reference, sampling
from vllm_adadecode.kernels.confidence import head_confidence
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.gate import head_input, live_first
from vllm_adadecode.kernels.launch import REFERENCES

assert all((loop_cases, draft_step, sampling)), "imported for their cases and references"
PACKAGE = "vllm_adadecode.kernels."


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), weight.float())


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str) -> None:
    case = CASES[name]
    references = {PACKAGE + kernel: REFERENCES[PACKAGE + kernel] for kernel in case.kernels}
    with patch.object(projection_reference, "project", exact):
        expected, _ = run(case, references)
    with on_device("cuda"):
        found, _ = run(case, {})
    differences = {
        key: text
        for key, value in expected.items()
        if (text := difference(value, found[key].cpu(), case.tolerance))
    }
    assert not differences


@pytest.mark.parametrize("name", CHECKS)
def test_of_the_kernels_alone(name: str) -> None:
    with on_device("cuda"):
        assert CHECKS[name]() == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    """Over the row tiles of the default blocks, at a real width."""
    with on_device("cuda"):
        rng = torch.Generator("cpu").manual_seed(0)
        head = head_cases.make_head(rng, 32000, 2048, dtype)
        x = floats(rng, 300, 2048, dtype=torch.bfloat16)
        alone = head_confidence(x[:1], head, 0.5)
        for rows in (2, 16, 17, 64, 128, 129, 300):
            among = head_confidence(x[:rows], head, 0.5)
            assert torch.equal(among.p[:1], alone.p)
            assert torch.equal(among.token[:1], alone.token)


@pytest.mark.parametrize("rows", [1, 16, 64, 256])
@pytest.mark.parametrize("vocab_size", [32000, 128256, 151936])
def test_real_shapes(rows: int, vocab_size: int) -> None:
    with on_device("cuda"):
        rng = torch.Generator("cpu").manual_seed(0)
        head = head_cases.make_head(rng, vocab_size, 2048, torch.bfloat16)
        x = floats(rng, rows, 2048, dtype=torch.bfloat16)
        found = head_confidence(x, head, 0.5)
        logits = exact(x, head.weight)
        p = logits.softmax(-1).amax(-1)
        # Products of bfloat16 are exact in float32; 2048 of them are added in another order.
        torch.testing.assert_close(found.p, p, rtol=1e-3, atol=1e-6)
        chosen = logits.gather(1, found.token[:, None])[:, 0]
        torch.testing.assert_close(chosen, logits.amax(-1), rtol=1e-4, atol=1e-4)


def test_a_head_check_can_be_captured() -> None:
    """Nothing is read by the host: a replay gives what a call gives, with new inputs."""
    with on_device("cuda"):
        rng = torch.Generator("cpu").manual_seed(0)
        head = head_cases.make_head(rng, 5000, 512, torch.bfloat16)
        hidden, residual = (floats(rng, 24, 512, dtype=torch.bfloat16) for _ in range(2))
        gate = {"gate_weight": floats(rng, 512, scale=0.1), "gate_bias": torch.zeros(1)}
        states = DeferredStates(24, 3, 512, torch.bfloat16, torch.device("cuda"))
        slots, offsets = torch.arange(24), torch.arange(24) % 3

        def check() -> tuple[torch.Tensor, ...]:
            x, passes = head_input(hidden, residual, norm_eps=1e-5, **gate)
            assert passes is not None
            order, num_live = live_first(passes > 0.5)
            result = head_confidence(x, head, 0.3, order=order, num_live=num_live)
            states.store(slots, offsets, hidden, residual)
            return result.token, result.p, *states.gather(slots, offsets)

        check()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = check()
        hidden.copy_(floats(rng, 24, 512, dtype=torch.bfloat16))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for found, expected in zip(replayed, check(), strict=True):
            assert torch.equal(found, expected)
