"""The draft loop on the device without an engine: every round is the same as the host's."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.engines import EveryStep
from tests.support.fake_target import MAX_DRAFTS, MAX_SLOTS, DeviceRuns, Run, draft
from vllm_adadecode.draft.buffers import LoopBuffers, padded_size, pass_states
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.spans.padded import PaddedSpans

POLLS: list[type[StatusPoll]] = [StatusPoll, EveryStep]


def assert_equal_rounds(device: Run, host: Run, all_passes: bool) -> None:
    for name in ("num_drafts", "depths", "exits"):
        assert np.array_equal(getattr(device.state, name), getattr(host.state, name)), name
    assert torch.equal(device.state.tokens, host.state.tokens)
    kept = host.deferred.hidden[:, :, 3] > 0
    assert torch.equal(device.deferred.hidden[kept], host.deferred.hidden[kept])
    assert torch.equal(device.deferred.residual[kept], host.deferred.residual[kept])
    assert not device.deferred.hidden.isnan().any(), "a state of padding was kept"
    # The same tokens through the same spans, in the same order.
    assert device.target.calls == host.target.calls
    if all_passes:
        device.counters.draft_layers = host.counters.draft_layers
    assert device.counters == host.counters


@pytest.mark.parametrize("poll", POLLS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_rounds_equal_the_hosts(seed: int, fused: bool, poll: type[StatusPoll]) -> None:
    """Eight rounds on the same buffers, of random batches, limits, confidences and gates."""
    rng = np.random.default_rng(seed)
    thresholds = ExitThresholds.of(
        rng.choice([0.3, 0.5, 0.8, 1.0], size=3, p=[0.3, 0.3, 0.3, 0.1]).tolist(),
        (0.5, 0.0, 0.5) if seed % 2 else None,
    )
    runs = DeviceRuns(poll(), thresholds)
    drafted = 0
    for _ in range(8):
        shape = (MAX_SLOTS, MAX_DRAFTS, 3)
        table = rng.choice([0.1, 0.4, 0.6, 0.95], size=shape, p=[0.3, 0.2, 0.3, 0.2])
        gates = rng.choice([0.1, 0.9], size=shape)
        num_reqs = int(rng.integers(1, MAX_SLOTS + 1))
        slots = rng.permutation(MAX_SLOTS)[:num_reqs].tolist()
        limits = rng.integers(0, MAX_DRAFTS + 1, num_reqs).tolist()

        def look_up(values: np.ndarray, *where: int) -> float:
            return float(values[where])

        confidence = partial(look_up, table)
        gate = partial(look_up, gates)
        host = draft(
            confidence,
            limits,
            slots=slots,
            thresholds=thresholds,
            gate=gate,
            fused=fused,
        )
        device = runs.draft(confidence, limits, slots, gate=gate, fused=fused)
        # The first pass runs unpolled.
        assert_equal_rounds(device, host, all_passes=poll is EveryStep or not any(limits))
        drafted += int(host.state.num_drafts.sum())
    assert drafted > 10 or thresholds.num_used_exits == 0


def test_steps_that_no_row_waits_for_are_skipped() -> None:
    poll = StatusPoll()
    runs = DeviceRuns(poll).draft(lambda *_: 0.9, [2, 1, 0], [3, 4, 5])
    # Two passes of span 0 and none deeper. One poll after each of them.
    assert [call.span for call in runs.target.calls] == [0, 0]
    assert runs.counters.draft_layers == 2 * 2
    assert poll.synchronisations == 2
    runs = DeviceRuns(EveryStep()).draft(lambda *_: 0.9, [2, 1, 0], [3, 4, 5])
    # Fifteen passes, all layers before the last exit five times; the tokens are the same.
    assert [call.span for call in runs.target.calls] == [0, 0]
    assert runs.counters.draft_layers == 5 * 7
    assert runs.counters.draft_token_layers == 2 * 3


@pytest.mark.parametrize("poll", POLLS)
def test_only_rows_in_the_pass_are_drawn_for(poll: type[StatusPoll]) -> None:
    """A draw caches the logits that verification divides by: of a row that waits, the earlier."""
    drawn: list[tuple[int, int]] = []

    def sample(
        logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, draft: torch.Tensor
    ) -> torch.Tensor:
        assert all(p == 7 + 13 * s + draft for s, p in zip(slots, positions, strict=True) if s >= 0)
        drawn.extend((int(s), int(draft)) for s in slots if s >= 0)
        return torch.full_like(slots, 77)

    def confidence(slot: int, offset: int, exit_index: int) -> float:
        return 0.9 if (slot, exit_index) in {(3, 0), (5, 1)} else 0.1

    run = DeviceRuns(poll()).draft(confidence, [2, 2, 1], [3, 5, 6], sample=sample)
    # 3 at once, 5 at its second head, 6 at none of three; then 3 and 5 again.
    assert sorted(drawn) == sorted(
        [(3, 0), (5, 0), (5, 0), (6, 0), (6, 0), (6, 0), (3, 1), (5, 1), (5, 1)]
    )
    assert run.state.tokens[:, 1:3].tolist() == [[77, 77], [77, 77], [0, 0]]


def test_padded_sizes() -> None:
    assert [padded_size(n, 100) for n in (1, 2, 3, 5, 8, 9, 16, 17, 33, 99)] == [
        *(1, 2, 4, 8, 8, 16, 16, 32, 40, 100),
    ]
    assert padded_size(5, 6) == 6


def test_backends_that_plan_on_the_host_are_refused() -> None:
    class PlansOnHost:
        @staticmethod
        def supports_device_cpu_query_lens_mismatch() -> bool:
            return False

    group = SimpleNamespace(backend=PlansOnHost, layer_names=["layers.0"])
    spans: Any = SimpleNamespace(attn_groups=[[group]])
    with pytest.raises(AdaDecodeError, match=r"PlansOnHost.*use draft_loop host") as error:
        PaddedSpans(spans, max_model_len=64)
    assert "\n" not in str(error.value)


def test_a_smaller_batch_uses_the_same_memory() -> None:
    states = DeferredStates(8, 4, 16, torch.float32, torch.device("cpu"))
    buffers = LoopBuffers.empty(8, 3, 3, 2, pass_states(states))
    smaller = buffers.first(2, 1)
    for group in ("rows", "inputs"):
        for name, tensor in vars(getattr(smaller, group)).items():
            assert tensor.data_ptr() == getattr(getattr(buffers, group), name).data_ptr(), name
            assert tensor.is_contiguous(), name
    # Two KV groups side by side, each as long as the pass: where the kernel writes them.
    assert smaller.inputs.slot_mapping.shape == (2, 2 * 4)
    assert smaller.rows.counts.shape == (1, 2)
