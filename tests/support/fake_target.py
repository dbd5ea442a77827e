"""A target without layers, and the draft loops run on it: the same on the host and on the device.

Owns the fakes: a target and span runners that note what they are asked and check that every state
they are handed is the right one. Padding is NaN, which nothing may come of.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_adadecode.draft.buffers import LoopBuffers, padded_size, pass_states
from vllm_adadecode.draft.device_loop import DeviceLoop
from vllm_adadecode.draft.head_evaluation import Heads, StoredHeads
from vllm_adadecode.draft.host_loop import HostLoop
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.draft.result import DraftResult, DraftState
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.confidence import top1_confidence
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_state import KVBlocks, PassInputs
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.model.fused_head import HeadCheck

VOCAB = 2000
MAX_SLOTS = 8
EXIT_LAYERS = (2, 3, 7)
NUM_LAYERS = 10
SPANS = ((0, 2), (2, 3), (3, 7), (7, 10))

HALF = ExitThresholds.of((0.5, 0.5, 0.5))

# Confidence of the head at (slot, window offset, exit).
Confidence = Callable[[int, int, int], float]


def head_token(slot: int, offset: int, exit_index: int) -> int:
    """The token that the head predicts after this offset: different for each head check."""
    return 1 + slot * 100 + offset * 10 + exit_index


@dataclass
class SpanCall:
    """One pass of a span: the tokens' slots and window offsets."""

    span: int
    tokens: list[tuple[int, int]]


@dataclass
class FakeTarget:
    """Stands for `StagedTarget` and `RaggedSpans`; a state is (token, slot, offset, depth).

    The residual is the state's negative, so that a swap is seen as well.
    """

    confidence: Confidence
    # Position of the last sampled token, by slot.
    first_pos: dict[int, int]
    calls: list[SpanCall] = field(default_factory=list)
    checks: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)
    gate: Confidence = lambda *_: 1.0
    gates_evaluated: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)
    exit_layers: tuple[int, ...] = EXIT_LAYERS
    spans: tuple[tuple[int, int], ...] = SPANS

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert input_ids.dtype == torch.int32
        state = torch.zeros(len(input_ids), 4)
        state[:, 0] = input_ids
        return state

    def run_span(
        self,
        span: int,
        slots: np.ndarray,
        num_tokens: np.ndarray,
        seq_lens_upper: np.ndarray,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert (num_tokens >= 1).all()
        by_token = np.repeat(slots, num_tokens)
        offsets = [
            int(p) - self.first_pos[int(s)] for p, s in zip(positions, by_token, strict=True)
        ]
        tokens = [(int(s), o) for s, o in zip(by_token, offsets, strict=True)]
        # A bound of the length may be too high, never too low.
        ends = np.cumsum(num_tokens) - 1
        assert (seq_lens_upper > positions.numpy()[ends]).all()
        assert (hidden[:, 3] == span).all(), "a token went into a span it is not before"
        if span == 0:
            assert residual is None
        else:
            assert residual is not None
            assert torch.equal(residual, -hidden)
            assert [(int(s), int(o)) for s, o in hidden[:, 1:3]] == tokens, "another token's state"
        out = hidden.clone()
        out[:, 1] = torch.from_numpy(by_token)
        out[:, 2] = torch.tensor([offset for _, offset in tokens])
        out[:, 3] = span + 1
        # Spans work in place.
        hidden.fill_(float("nan"))
        self.calls.append(SpanCall(span, tokens))
        return out, -out

    def head_logits(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        assert torch.equal(residual, -hidden)
        assert (hidden[:, 3] == exit_index + 1).all(), "a head read a state of another depth"
        logits = torch.empty(len(hidden), VOCAB)
        rows = [(int(s), int(o)) for s, o in hidden[:, 1:3]]
        self.checks.append((exit_index, rows))
        for row, (slot, offset) in enumerate(rows):
            p = self.confidence(slot, offset, exit_index)
            logits[row] = np.log((1 - p) / (VOCAB - 1))
            logits[row, head_token(slot, offset, exit_index)] = np.log(p)
        return logits, None

    def head_top1(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return top1_confidence(*self.head_logits(exit_index, hidden, residual))

    def gate_probability(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        assert torch.equal(residual, -hidden)
        assert (hidden[:, 3] == exit_index + 1).all(), "a gate read a state of another depth"
        rows = [(int(s), int(o)) for s, o in hidden[:, 1:3]]
        self.gates_evaluated.append((exit_index, rows))
        return torch.tensor([self.gate(slot, offset, exit_index) for slot, offset in rows])

    # Stands for `HeadProjection` as well: all tokens.
    @property
    def projection(self) -> "FakeTarget":
        return self

    def over_all_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@dataclass
class FakeFusedHeads:
    """Stands for `FusedHeads`: the host reads nothing, and what is skipped says nonsense."""

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
        gate_threshold: float | torch.Tensor | None,
        in_pass: torch.Tensor | None = None,
    ) -> HeadCheck:
        rows = slots >= 0
        assert rows.all() if in_pass is None else torch.equal(in_pass, rows)
        assert hidden[rows, 1].tolist() == slots[rows].tolist()
        assert (hidden[rows, 2] == draft).all()
        first = torch.tensor([self.target.first_pos[int(s)] for s in slots[rows]])
        assert torch.equal(positions[rows], first + draft)
        live, passed = in_pass, rows
        if gate_threshold is not None:
            live = passed = rows.clone()
            gate = self.target.gate_probability(exit_index, hidden[rows], residual[rows])
            passed[rows] = gate > gate_threshold
        # Nothing that may follow a row that its head was not evaluated for.
        token, p = torch.full((len(hidden),), VOCAB), torch.ones(len(hidden))
        if passed.any():
            token[passed], p[passed] = self.target.head_top1(
                exit_index, hidden[passed], residual[passed]
            )
        return HeadCheck(token, p, live)


def fake_heads(target: FakeTarget, fused: bool, sample: Any, picks_rows: bool) -> Heads:
    """As `make_heads`; ``sample`` in place of `DraftSampler.sample`, None: no sampler."""
    if fused:
        return FakeFusedHeads(target)  # type: ignore[return-value]
    sampler: Any = None if sample is None else SimpleNamespace(sample=sample)
    return StoredHeads(target, sampler, picks_rows)  # type: ignore[arg-type]


@dataclass
class Run:
    """A draft loop that has run."""

    state: DraftState
    target: FakeTarget
    counters: Counters
    deferred: DeferredStates

    @staticmethod
    def of(
        result: DraftResult, thresholds: ExitThresholds, target: FakeTarget, deferred: Any
    ) -> "Run":
        counters = Counters.create(NUM_LAYERS, EXIT_LAYERS)
        result.count(counters, SPANS, thresholds)
        return Run(result.state, target, counters, deferred)


def draft(
    confidence: Confidence,
    limits: list[int],
    *,
    slots: list[int] | None = None,
    thresholds: ExitThresholds = HALF,
    max_drafts: int = 5,
    sample: Any = None,
    gate: Confidence = lambda *_: 1.0,
    fused: bool = False,
    used_exits: list[int] | None = None,
) -> Run:
    """Run one draft loop for ``len(limits)`` requests."""
    slots = slots or list(range(len(limits)))
    first_pos = {slot: 7 + 13 * slot for slot in slots}
    target = FakeTarget(confidence, first_pos, gate=gate)
    deferred = DeferredStates(MAX_SLOTS, max_drafts + 1, 4, torch.float32, torch.device("cpu"))
    loop = HostLoop(
        staged=target,  # type: ignore[arg-type]
        spans=target,  # type: ignore[arg-type]
        deferred=deferred,
        thresholds=thresholds,
        heads=fake_heads(target, fused, sample, picks_rows=True),
    )
    positions = torch.tensor([first_pos[s] for s in slots])
    result = loop.run(
        slots=np.array(slots, dtype=np.int32),
        first_pos=positions,
        last_sampled=torch.tensor([1000 + s for s in slots]),
        limits=np.array(limits),
        used_exits=np.array(used_exits or [len(EXIT_LAYERS)] * len(limits)),
        max_drafts=max_drafts,
        seq_lens_upper=positions.numpy(),
    )
    return Run.of(result, thresholds, target, deferred)


def at(*confident: tuple[int, int, int]) -> Confidence:
    """Confident at these (slot, offset, exit) alone."""
    return lambda *where: 0.9 if where in confident else 0.1


# --- on the device ----------------------------------------------------------------------------

MAX_DRAFTS = 5
BLOCK = 16


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


class FakePaddedSpans:
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

    def run_span(
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
            result, _ = self.target.run_span(
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
            FakePaddedSpans(self.target),  # type: ignore[arg-type]
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
        """One round, as `draft` has it on the host.

        Args:
            shift: of all positions.
        """
        target = self.target
        target.confidence, target.gate = confidence, gate
        target.first_pos = {slot: 7 + 13 * slot + shift for slot in slots}
        target.calls, target.checks, target.gates_evaluated = [], [], []
        run = self.loop.start(
            torch.tensor(slots),
            torch.tensor([target.first_pos[s] for s in slots]),
            torch.tensor(limits),
            torch.tensor([1000 + s for s in slots]),
            thresholds=self.thresholds,
            num_exits=self.thresholds.num_used_exits,
            max_drafts=MAX_DRAFTS,
            heads=fake_heads(target, fused, sample, picks_rows=False),
        )
        run.finish()
        num_sampled = torch.arange(MAX_SLOTS, dtype=torch.int32)
        readback = RoundReadback.start(len(slots), run.buffers, num_sampled, len(EXIT_LAYERS))
        found = readback.wait()
        assert found.num_sampled.tolist() == list(range(len(slots)))
        assert found.first_pos is not None
        assert found.first_pos.tolist() == [target.first_pos[s] for s in slots]
        assert found.drafted is not None
        assert found.drafted.limits.tolist() == limits
        assert found.drafted.used_exits.tolist() == [len(EXIT_LAYERS)] * len(slots)
        return Run.of(found.drafted, self.thresholds, target, self.deferred)
