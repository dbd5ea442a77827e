"""The draft loop on the device: the same as the host's, and the same work whatever the data.

First without an engine, on the hand-made confidences of test_draft_loop.py, where padding is NaN;
then on the demo target with its heads, gates and draft vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM

from tests.support.engines import (
    EnginePool,
    EveryStep,
    assert_same,
    generate,
    greedy,
    poll_with,
    set_draft_loop,
    speculative,
    stats,
    token_ids,
)
from tests.support.op_trace import OpTrace, first_difference, traced
from tests.unit.test_host_loop import (
    EXIT_LAYERS,
    HALF,
    MAX_SLOTS,
    NUM_LAYERS,
    VOCAB,
    FakeFusedHeads,
    FakeTarget,
    Run,
    draft,
)
from vllm_adadecode.draft.buffers import LoopBuffers, padded_size, pass_states
from vllm_adadecode.draft.device_loop import DeviceLoop
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_state import KVBlocks, PassInputs
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.model.fused_head import HeadCheck
from vllm_adadecode.spans.padded import PaddedSpans

MAX_DRAFTS = 5
BLOCK = 16
POLLS: list[type[StatusPoll]] = [StatusPoll, EveryStep]


# --- without an engine -------------------------------------------------------------------------


class PaddedTarget(FakeTarget):
    """A target some of whose rows are padding: NaN, which nothing may come of."""

    def _real(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.isfinite().all(dim=1)

    def head_logits(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        real = self._real(hidden)
        logits = torch.full((len(hidden), VOCAB), float("nan"))
        logits[real] = super().head_logits(exit_index, hidden[real], residual[real])[0]
        return logits, None

    def gate_probability(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        real = self._real(hidden)
        gate = torch.full((len(hidden),), float("nan"))
        gate[real] = super().gate_probability(exit_index, hidden[real], residual[real])
        return gate


@dataclass
class PaddedFusedHeads:
    """`FakeFusedHeads` for a padded batch: rows that are no token's say nonsense."""

    target: FakeTarget

    def check(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        *,
        slots: torch.Tensor,
        positions: torch.Tensor,
        draft: int | torch.Tensor,
        gate_threshold: torch.Tensor | None,
        in_pass: torch.Tensor,
    ) -> HeadCheck:
        num_rows = len(slots)
        assert torch.equal(in_pass, slots >= 0)
        passed = in_pass.clone()
        if gate_threshold is not None:
            gate = self.target.gate_probability(exit_index, hidden[in_pass], residual[in_pass])
            passed[in_pass] = gate > gate_threshold
        token, p = torch.full((num_rows,), VOCAB), torch.ones(num_rows)
        if passed.any():
            found = FakeFusedHeads(self.target).check(
                exit_index,
                hidden[passed],
                residual[passed],
                slots=slots[passed],
                positions=positions[passed],
                draft=draft,
                gate_threshold=None,
            )
            token[passed], p[passed] = found.token, found.p
        return HeadCheck(token, p, passed)


class FakeStaticSpans:
    """Stands for `PaddedSpans`: checks the layout of a pass and runs its tokens."""

    def __init__(self, target: FakeTarget) -> None:
        self.target = target
        self.table = torch.arange(MAX_SLOTS * 16, dtype=torch.int32).view(MAX_SLOTS, 16)
        self.blocks = KVBlocks(
            table_ptrs=torch.tensor([self.table.data_ptr()], dtype=torch.uint64),
            table_strides=torch.tensor([16]),
            block_sizes=torch.tensor([BLOCK], dtype=torch.int32),
            enabled=torch.tensor([True]),
        )

    def begin(self, slots: torch.Tensor, num_rows: int) -> None:
        assert num_rows == padded_size(len(slots), MAX_SLOTS)

    def run(
        self,
        span: int,
        inputs: PassInputs,
        row_tokens: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        starts = inputs.query_start_loc.numpy()
        counts, total = np.diff(starts), int(starts[-1])
        num_tokens = len(inputs.seq_lens) * row_tokens
        assert len(hidden) == num_tokens
        assert 0 <= counts.min() <= counts.max() <= row_tokens
        slots, positions = inputs.token_slots[:num_tokens], inputs.positions[:num_tokens]
        # No KV and no state is stored for padding.
        assert (slots[total:] == -1).all()
        assert (inputs.slot_mapping[:, total:] == -1).all()
        slots, positions = slots[:total], positions[:total]
        expected = self.table[slots, positions // BLOCK] * BLOCK + positions % BLOCK
        assert torch.equal(inputs.slot_mapping[0, :total], expected.long())
        out = torch.full((num_tokens, 4), float("nan"))
        ends = starts[1:][counts > 0] - 1
        lengths = np.zeros(len(counts), dtype=np.int32)
        lengths[counts > 0] = positions[ends] + 1
        assert inputs.seq_lens.tolist() == lengths.tolist()
        if total:
            result, _ = self.target.run(
                span,
                slots=slots[starts[:-1][counts > 0]].numpy(),
                num_tokens=counts[counts > 0],
                seq_lens_upper=lengths[counts > 0],
                positions=positions,
                hidden=hidden[:total],
                residual=None if residual is None else residual[:total],
            )
            out[:total] = result
        hidden.fill_(float("nan"))
        return out, -out


@dataclass
class DeviceRuns:
    """Rounds of one device loop, with what it keeps from one to the next."""

    poll: StatusPoll
    thresholds: ExitThresholds = HALF

    def __post_init__(self) -> None:
        self.deferred = DeferredStates(
            MAX_SLOTS, MAX_DRAFTS + 1, 4, torch.float32, torch.device("cpu")
        )
        self.target = PaddedTarget(lambda *_: 0.0, {})
        self.loop = DeviceLoop(
            self.target,  # type: ignore[arg-type]
            FakeStaticSpans(self.target),  # type: ignore[arg-type]
            self.deferred,
            LoopBuffers.empty(
                MAX_SLOTS, MAX_DRAFTS, len(EXIT_LAYERS), 1, pass_states(self.deferred)
            ),
            self.poll,
        )

    def draft(
        self,
        confidence: Any,
        limits: list[int],
        slots: list[int],
        gate: Any = lambda *_: 1.0,
        fused: bool = False,
        sample: Any = None,
        shift: int = 0,
    ) -> Run:
        """One round; see `tests.unit.test_host_loop.draft`.

        Args:
            shift: of all positions.
        """
        target = self.target
        target.confidence, target.gate = confidence, gate
        target.first_pos = {slot: 7 + 13 * slot + shift for slot in slots}
        target.calls, target.checks, target.gates_evaluated = [], [], []
        round_ = self.loop.begin(
            torch.tensor(slots),
            torch.tensor([target.first_pos[s] for s in slots]),
            torch.tensor(limits),
            torch.tensor([1000 + s for s in slots]),
            self.thresholds,
            self.thresholds.num_used_exits,
        )
        self.loop.start(
            round_,
            self.thresholds,
            MAX_DRAFTS,
            None if sample is None else SimpleNamespace(sample=sample),  # type: ignore[arg-type]
            PaddedFusedHeads(target) if fused else None,  # type: ignore[arg-type]
        ).finish()
        num_sampled = torch.arange(MAX_SLOTS, dtype=torch.int32)
        result = RoundReadback.start(len(slots), round_, num_sampled).wait()
        assert result.num_sampled.tolist() == list(range(len(slots)))
        assert result.first_pos.tolist() == [target.first_pos[s] for s in slots]
        assert result.limits.tolist() == limits
        assert result.state is not None
        counters = Counters.create(NUM_LAYERS, EXIT_LAYERS)
        speculator = SimpleNamespace(counters=counters, model=target, thresholds=self.thresholds)
        rounds = DeviceRounds(speculator, self.loop)  # type: ignore[arg-type]
        rounds._count(result, self.thresholds.num_used_exits)
        return Run(result.state, target, counters, self.deferred)


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


# --- with the demo target ----------------------------------------------------------------------

SPEC: dict[str, Any] = {"num_speculative_tokens": 5}


def note_rounds(worker: Any) -> None:
    """Have the worker keep every round's windows, by batch row, with their drafts."""
    speculator = worker.model_runner.speculator
    keep_windows = speculator.keep_windows
    speculator.noted = []

    def keep_and_note(
        input_batch: Any, num_sampled: Any, limits: Any, used_exits: Any, state: Any
    ) -> None:
        keep_windows(input_batch, num_sampled, limits, used_exits, state)
        if not limits.any():
            return  # the host's loop does not run in such a round
        speculator.noted.append(
            [
                (ids, state.depths[row, : len(ids) + 1].tolist(), state.exits[row, : len(ids)])
                for row, ids in enumerate(speculator.last_drafts)
            ]
        )

    speculator.keep_windows = keep_and_note


def rounds_of(
    engine: LLM, prompts: list[str], params: list[Any]
) -> tuple[list[list[int]], Any, dict[str, Any]]:
    """Outputs, every round's windows, and counts."""
    engine.collective_rpc(note_rounds)
    stats(engine, reset=True)
    outputs = token_ids(generate(engine, prompts, params))
    counts = stats(engine)

    def take(worker: Any) -> Any:
        speculator = worker.model_runner.speculator
        del speculator.keep_windows
        return speculator.noted

    return outputs, engine.collective_rpc(take)[0], counts


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_every_round_equals_the_hosts(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Tokens, drafts, depths, exits and counts, round by round, request by request."""
    # Requests end at different times, so that batches of many sizes are padded.
    params = [
        greedy(10 + 5 * i, temperature=0.0 if method == "greedy" or i % 3 == 0 else 0.8, seed=i)
        for i in range(9)
    ]
    spec = speculative(**SPEC, draft_sample_method=method, draft_loop="device")
    engine = engines.get(speculative_config=spec)
    found = {}
    for loop in ("host", "device"):
        set_draft_loop(engine, loop)
        found[loop] = rounds_of(engine, prompts[:9], params)
    tokens, windows, counts = found["host"]
    assert len(windows) > 15
    assert counts["draft_tokens"] > 100
    assert found["device"][0] == tokens
    assert str(found["device"][1]) == str(windows)
    on_device = dict(found["device"][2])
    # The first pass of a round runs unasked, also where every request is at its end.
    assert 0 <= on_device["draft_layers"] - counts["draft_layers"] <= 2 * 2
    for name in ("draft_layers", "layers_executed_per_token"):
        on_device[name] = counts[name]
    assert on_device == counts
    assert all(e["heads_evaluated"] for e in counts["exits"].values())
    assert any(e["gates_evaluated"] for e in counts["exits"].values())

    # Running everything, and booking it as late as may be, changes nothing but the passes.
    engine.collective_rpc(poll_with(EveryStep()))
    monkeypatch.setattr(RoundReadback, "has_arrived", lambda _: False)
    try:
        outputs, all_windows, all_counts = rounds_of(engine, prompts[:9], params)
    finally:
        engine.collective_rpc(poll_with(StatusPoll()))
    assert outputs == tokens
    assert str(all_windows) == str(windows)
    assert all_counts["exits"] == counts["exits"]
    assert all_counts["draft_token_layers"] == counts["draft_token_layers"]
    assert all_counts["draft_layers"] > counts["draft_layers"]


# --- the same work whatever the data -----------------------------------------------------------


@dataclass
class Round:
    """A traced round: rows after padding, the drafts, and what was asked of the device."""

    num_rows: int
    drafts: list[list[int]]
    trace: OpTrace


def trace_rounds(engine: LLM, prompts: list[str], max_tokens: int) -> list[Round]:
    """Trace `propose` for every batch of a generation; prompts are not in the rounds."""

    def install(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        propose = speculator.propose
        speculator.rounds = []

        def propose_traced(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            if input_batch.has_prefill:
                return propose(input_batch, *args, **kwargs)
            speculator.settle()
            with traced() as trace:
                drafts = propose(input_batch, *args, **kwargs)
            size = padded_size(input_batch.num_reqs, speculator.max_num_reqs)
            speculator.rounds.append(Round(size, drafts.tolist(), trace))
            return drafts

        speculator.propose = propose_traced

    def remove(worker: Any) -> Any:
        speculator = worker.model_runner.speculator
        del speculator.propose
        return speculator.rounds

    engine.collective_rpc(install)
    try:
        generate(engine, prompts, greedy(max_tokens, temperature=0.7, seed=5))
    finally:
        rounds: list[Round] = engine.collective_rpc(remove)[0]
    return rounds


TRACED = SPEC | {"draft_sample_method": "probabilistic"}


@pytest.fixture(scope="module")
def always(engines: EnginePool, prompts: list[str]) -> list[Round]:
    """Rounds of 3 and of 2 requests, on the device with all steps."""
    engine = engines.get(speculative_config=speculative(**TRACED, draft_loop="device"))
    engine.collective_rpc(poll_with(EveryStep()))
    return [r for n in (3, 2) for r in trace_rounds(engine, prompts[:n], 10)]


def test_the_device_is_asked_nothing(engines: EnginePool, always: list[Round]) -> None:
    assert len(always) > 6
    assert [r.trace.synchronisations for r in always] == [[]] * len(always)


def test_the_host_asks_at_every_head(engines: EnginePool, prompts: list[str]) -> None:
    """The controls: the host's loop, and a host that polls after each step."""
    engine = engines.get(speculative_config=speculative(**TRACED, draft_loop="device"))
    set_draft_loop(engine, "host")
    try:
        rounds = trace_rounds(engine, prompts[:2], 8)
    finally:
        set_draft_loop(engine, "device")
    assert all(len(r.trace.synchronisations) > 3 for r in rounds)
    engine.collective_rpc(poll_with(StatusPoll()))
    rounds = trace_rounds(engine, prompts[:2], 8)
    reads = [s for r in rounds for s in r.trace.synchronisations if s == "tolist"]
    assert len(reads) > 2 * len(rounds)


def loop_operations(round_: Round) -> list[tuple[Any, ...]]:
    """Of a round, what would be captured: from the first launch of a step to the last."""
    found = round_.trace.operations
    steps = [i for i, (name, *_) in enumerate(found) if name == "kernel draft_step_reference"]
    return found[steps[0] : steps[-1] + 1]


def test_work_does_not_depend_on_data(always: list[Round]) -> None:
    """Operations, shapes, scalars, addresses and allocations: equal for one batch size."""
    by_size: dict[int, list[Round]] = {}
    for r in always:
        by_size.setdefault(r.num_rows, []).append(r)
    assert set(by_size) >= {2, 4}
    for size in (2, 4):
        # The first of a size makes the host's tensors that all others read, as the warm-up before a
        # capture does.
        rounds = by_size[size][1:]
        assert len({str(r.drafts) for r in rounds}) > 1, "the rounds had the same data"
        first = loop_operations(rounds[0])
        # Five drafts through three spans: states are stored after each, and read before two.
        moved = [name for name, *_ in first].count("kernel _move_states_reference")
        assert moved == 5 * (3 + 2)
        assert len(first) > 500
        for other in rounds[1:]:
            # pytest would take minutes to tell such lists apart.
            assert first_difference(loop_operations(other), first) == ""
            assert first_difference(other.trace.allocated, rounds[0].trace.allocated) == ""
    # The control: another batch size is other work.
    two, four = by_size[2][0], by_size[4][0]
    assert first_difference(loop_operations(two), loop_operations(four))
    assert first_difference(two.trace.allocated, four.trace.allocated)


def test_polls_make_work_depend_on_data(engines: EnginePool, prompts: list[str]) -> None:
    """The control: with the host's polls, rounds of one size are not the same work."""
    engine = engines.get(speculative_config=speculative(**TRACED, draft_loop="device"))
    engine.collective_rpc(poll_with(StatusPoll()))
    rounds = trace_rounds(engine, prompts[:2], 8)
    names = {str([name for name, *_ in r.trace.operations]) for r in rounds if r.num_rows == 2}
    assert len(names) > 1


# --- in other company ----------------------------------------------------------------------------


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_output_is_vanillas_in_crowded_batches(
    engines: EnginePool,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    async_scheduling: bool,
) -> None:
    """Chunked prefill beside drafting, and more requests than rows; rounds are booked late."""
    monkeypatch.setattr(RoundReadback, "has_arrived", lambda _: False)
    options: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 64}
    engine = engines.get(
        speculative_config=speculative(**SPEC, draft_loop="device"),
        async_scheduling=async_scheduling,
        **options,
    )
    params = [greedy(6 + 3 * i) for i in range(9)]
    outputs = generate(engine, prompts[:9], params)
    vanilla = engines.get()
    assert_same(vanilla, outputs, generate(vanilla, prompts[:9], params))
    counts = stats(engine)
    assert min(counts["mixed_steps"], counts["deferred_steps"]) > 5
