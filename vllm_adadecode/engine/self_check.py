"""Trust, but verify: what was chosen for speed runs once, at the start, beside what is plain.

Owns the comparison, and what is given up where it fails: captured steps, fused kernels, the loop on
the device, captured verifications. Plain are the host's loop with heads in torch, and for a
verification all layers of the target at once. Where that fails as well, nothing is drafted.

All tensor-parallel ranks run the same passes, whatever one of them has found, and agree afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_adadecode.adaptive.profile import NO_DRAFTS, Requests, all_alike, most_requests
from vllm_adadecode.adaptive.ranks import rank_0
from vllm_adadecode.draft.head_evaluation import StoredHeads
from vllm_adadecode.draft.host_loop import HostLoop
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.errors import first_line
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.model.fused_head import FusedHeads, HeadCheck

MOST_REQUESTS = 3  # of which a batch is padded
MOST_DRAFTS = 8  # of each: the last passes would take as long as all before
ROUNDS = 2  # one that drafts, one that verifies
# Until a rank that failed alone, in the midst of a pass, ends rather than waits for the others.
WAIT = timedelta(seconds=60)


@dataclass(frozen=True)
class Way:
    """How draft tokens are made: by the loop on the device, fused kernels, captured steps."""

    on_device: bool = False
    fused: bool = False
    captured: bool = False

    @classmethod
    def of(cls, speculator: Any) -> Way:
        """The one in use."""
        graphs, heads = speculator.draft_graphs, speculator.context.device_heads()
        captured = graphs is not None and graphs.fits(speculator.ledger.thresholds)
        on_device = speculator.device_rounds is not None
        return cls(on_device, isinstance(heads, FusedHeads), captured and on_device)

    def use(self, speculator: Any) -> None:
        """Give up what it does without."""
        if not self.on_device:
            speculator.device_rounds = None
        if not self.fused:
            speculator.model.projection.use_kernels = False
        if not self.captured:
            speculator.draft_graphs = None

    def simpler(self) -> list[Way]:
        """What may be used in its place, the quickest first, the plain way last."""
        every = [Way(*parts) for parts in product((True, False), repeat=3)]
        # Captured are steps with these heads.
        return [
            way
            for way in every
            if way != self
            and way.on_device <= self.on_device
            and way.fused <= self.fused
            and way.captured <= (self.captured and way.on_device and way.fused == self.fused)
        ]

    def __str__(self) -> str:
        loop, heads = "device" if self.on_device else "host", "fused" if self.fused else "torch"
        return f"draft loop {loop}, {heads} heads, steps {'' if self.captured else 'not '}captured"


PLAIN = Way()


def tolerance(dtype: torch.dtype) -> float:
    """Of a state, relative to its norm, and of what is decided: half of the dtype's digits."""
    return float(torch.finfo(dtype).eps ** 0.5)


@dataclass
class WatchedHeads:
    """Heads in torch, and what is decided by them.

    Attributes:
        close: bool ``[max_num_reqs, K]`` by request slot and window offset, where rounding may turn
            a decision around.
        seen: confidences by exit index.
    """

    heads: StoredHeads
    thresholds: ExitThresholds
    close: torch.Tensor
    seen: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def check(
        self,
        exit_index: int,
        # hidden, residual
        *states: torch.Tensor,
        gate_threshold: float | None,
        **row: Any,
    ) -> HeadCheck:
        """As `StoredHeads.check`."""
        target, threshold = self.heads.target, self.thresholds.confidence[exit_index]
        allowed = tolerance(states[0].dtype)
        found = self.heads.check(exit_index, *states, gate_threshold=gate_threshold, **row)
        close = (found.p.to(self.close.device) - threshold).abs() <= allowed
        best = target.head_logits(exit_index, *states)[0].float().topk(2).values
        close |= best[:, 0] - best[:, 1] <= allowed * best.abs().amax(dim=1)
        if gate_threshold is not None:
            gate = target.gate_probability(exit_index, *states)
            close |= (gate - gate_threshold).abs() <= allowed
        self.close[row["slots"], row["draft"]] |= close
        self.seen[exit_index] += found.p.tolist()
        return found


@dataclass
class Drafted:
    """What a loop has drafted.

    Attributes:
        tokens, depths: ``[num_reqs, 1 + K]`` as in `DraftState`.
        exits: ``[num_reqs, K]``, -1: no draft token.
        states: ``[num_reqs, 1 + K, hidden_size]`` deferred ones, where the depth is above 0.
        close: bool ``[num_reqs, K]``, as in `WatchedHeads`.
    """

    tokens: np.ndarray
    depths: np.ndarray
    exits: np.ndarray
    states: torch.Tensor
    close: np.ndarray


def state_errors(found: torch.Tensor, plain: torch.Tensor) -> np.ndarray:
    """By how much of their norm states differ, ``[...]`` for ``[..., hidden_size]``."""
    plain = plain.float()
    return ((found.float() - plain).norm(dim=-1) / plain.norm(dim=-1)).cpu().numpy()


def difference(found: Drafted, plain: Drafted, allowed: float) -> str | None:
    """What is wrong with ``found``, in a line; None: nothing.

    What follows from a close decision that was made the other way is not compared.
    """
    differs = (found.tokens[:, 1:] != plain.tokens[:, 1:]) | (found.exits != plain.exits)
    same = ~np.logical_or.accumulate(np.pad(differs, ((0, 0), (1, 0))), axis=1)
    for row, i in np.argwhere(differs & same[:, :-1] & ~plain.close):
        one, other = (f"{d.tokens[row, i + 1]} of exit {d.exits[row, i]}" for d in (found, plain))
        return f"draft token {i + 1} of request {row} is {one} instead of {other}"
    alike = found.depths == plain.depths
    for row in np.flatnonzero(same.all(axis=1) & ~alike.all(axis=1)):
        one, other = (d.depths[row].tolist() for d in (found, plain))
        return f"the depths of request {row} are {one} instead of {other}"
    errors = state_errors(found.states, plain.states)
    for row, i in np.argwhere(same & alike & (plain.depths > 0) & ~(errors <= allowed)):
        error = f"differs by {errors[row, i]:.2g} of its norm, of which {allowed:.2g} is rounding"
        return f"the state of token {i} of request {row} {error}"
    return None


def anywhere(fault: str | None) -> str | None:
    """A fault that some tensor-parallel rank has found, the same on all.

    Raises:
        SystemExit: another rank did not come so far. vLLM ends all where one ends.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return fault
    count = torch.tensor(int(fault is not None))
    try:
        torch.distributed.all_reduce(count, group=group.cpu_group, async_op=True).wait(WAIT)
    except RuntimeError:
        raise SystemExit(f"adadecode failed on one rank alone at the start: {fault}") from None
    if count == 0:
        return None
    faults: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(faults, fault, group=group.cpu_group)
    return next((f for f in faults if f is not None), None)


class SelfCheck:
    """Has the same requests drafted for, and verified, in several ways.

    Args:
        requests: prefilled, without draft tokens.
        real: the engine's thresholds.
    """

    def __init__(self, worker: Any, requests: Requests, real: ExitThresholds) -> None:
        self.runner, self.requests, self.real = worker.model_runner, requests, real
        self.speculator = self.runner.speculator
        self.allowed = tolerance(self.speculator.dtype)
        self.deepest = all_alike(real, real.num_used_exits - 1, open_gates=True)
        self.slots = np.array([self.runner.req_states.req_id_to_index[r] for r in requests.ids])
        # No two alike.
        rows = np.arange(len(self.slots))
        self.first_pos = np.array(requests.computed) - rows % 2
        self.limits = np.maximum(1, min(MOST_DRAFTS, self.speculator.num_speculative_steps) - rows)
        self.tokens = 3 + rows

    def _draft(self, way: Way, thresholds: ExitThresholds, tokens: np.ndarray) -> Drafted:
        """Run the loop, and read everything back."""
        speculator, context = self.speculator, self.speculator.context
        projection, exits = speculator.model.projection, thresholds.num_used_exits
        context.temperature.zero_()
        slots, first_pos, limits, last_sampled = (
            torch.from_numpy(numbers).to(context.temperature.device)
            for numbers in (self.slots, self.first_pos, self.limits, tokens)
        )
        close = torch.zeros_like(context.deferred.hidden[:, 1:, 0], dtype=torch.bool)
        kernels, projection.use_kernels = projection.use_kernels, way.fused
        try:
            if way.on_device:
                run = speculator.device_rounds.loop.start(
                    slots,
                    first_pos,
                    limits,
                    last_sampled,
                    thresholds=thresholds,
                    num_exits=exits,
                    max_drafts=int(self.limits.max()),
                    heads=context.device_heads(),
                    graphs=speculator.draft_graphs if way.captured else None,
                )
                run.finish()
                readback = RoundReadback.start(len(slots), run.buffers, limits, exits)
                result = readback.wait().drafted
            else:
                heads: Any = context.host_heads(context.temperature, context.seeds)
                if way == PLAIN:
                    heads = self.watched = WatchedHeads(heads, thresholds, close)
                result = HostLoop(
                    context.target, speculator.spans, context.deferred, thresholds, heads
                ).run(
                    slots=self.slots,
                    first_pos=first_pos,
                    last_sampled=last_sampled,
                    limits=self.limits,
                    used_exits=np.full(len(slots), exits),
                    max_drafts=speculator.num_speculative_steps,
                    seq_lens_upper=self.first_pos,
                )
        finally:
            projection.use_kernels = kernels
        assert result is not None
        state, deferred = result.state, context.deferred
        drafted = np.arange(state.exits.shape[1]) < state.num_drafts[:, None]
        return Drafted(
            tokens=state.tokens.cpu().numpy(),
            depths=state.depths,
            exits=np.where(drafted, state.exits, -1),
            states=deferred.hidden[slots] + deferred.residual[slots],
            close=close[slots].cpu().numpy(),
        )

    def fault(self, way: Way) -> str | None:
        """What is wrong with a way, in a line, on any rank."""
        try:
            with self.speculator.drafting():
                # What this leaves, states and KV of other tokens, must not be in what follows.
                self._draft(PLAIN, self.deepest, self.tokens + 1)
                if way == PLAIN:
                    self._mix()
                found = [self._draft(way, t, self.tokens) for t in (self.real, self.mixed)]
            if way == PLAIN:
                self.plain = found
            differences = map(difference, found, self.plain, 2 * [self.allowed])
            fault = next((d for d in differences if d is not None), None)
        except Exception as error:
            fault = first_line(error)
        return anywhere(fault)

    def _mix(self) -> None:
        """Thresholds by which all exits are used: about half of what comes to one is accepted."""
        seen, last = self.watched.seen, self.real.num_used_exits - 1
        cuts = enumerate(self.deepest.confidence)
        means = tuple(float(np.mean(seen[e])) if e in seen and e < last else cut for e, cut in cuts)
        self.mixed = rank_0(replace(self.deepest, confidence=means))

    def drafting(self) -> None:
        """Use the quickest way that drafts as the plain one does."""
        chosen = Way.of(self.speculator)
        if (fault := self.fault(chosen)) is not None:
            way = next(w for w in chosen.simpler() if w == PLAIN or self.fault(w) is None)
            way.use(self.speculator)
            self.speculator.context.fall_back(f"{way}; with {chosen}, {fault}")

    def verification(self) -> str | None:
        """Give up captured passes if they differ from all layers; what is wrong with others."""
        speculator, verification = self.speculator, self.runner.verification
        forward, deferred = verification.forward, speculator.deferred
        outputs: list[Any] = []

        def all_ways(plan: Any, ids: torch.Tensor, positions: torch.Tensor, graphs: Any) -> Any:
            slots = torch.from_numpy(np.unique(plan.slots)).to(positions.device)
            kept = deferred.hidden[slots], deferred.residual[slots]
            for captured in (graphs, None):
                deferred.hidden[slots], deferred.residual[slots] = kept
                try:
                    outputs.append(forward(plan, ids, positions, captured).clone())
                except Exception as error:
                    outputs.append(first_line(error))
            outputs.append(self.runner._all_layers(ids, positions, None, None))
            return outputs[-1]

        speculator.ledger.thresholds = self.mixed
        self.runner.verification = SimpleNamespace(forward=all_ways)
        try:
            for _ in range(ROUNDS):
                self.requests.round()
        finally:
            self.runner.verification = verification
        *ways, all_layers = outputs or [None]
        captured, others = (anywhere(self._unlike(way, all_layers)) for way in ways or 2 * [None])
        if captured is not None and speculator.verification_graphs is not None:
            speculator.verification_graphs = None
            speculator.context.fall_back(f"verifications not captured; captured, {captured}")
        return others

    def _unlike(self, found: Any, all_layers: Any) -> str | None:
        """An error, or by how much states differ."""
        if not isinstance(found, torch.Tensor):
            return found
        by = state_errors(found, all_layers).max()
        if by <= self.allowed:
            return None
        return f"states differ from all layers' by {by:.2g} of their norm"


@torch.inference_mode()
def check(worker: Any) -> None:
    """Give up what does not do as it should. Leaves no request and no counts."""
    runner = worker.model_runner
    speculator, ledger = runner.speculator, runner.speculator.ledger
    real: ExitThresholds = ledger.thresholds
    is_plain = Way.of(speculator) == PLAIN and speculator.verification_graphs is None
    count = min(MOST_REQUESTS, most_requests(runner, ROUNDS))
    if is_plain or not count or not real.num_used_exits:
        return
    ledger.thresholds = NO_DRAFTS
    requests = Requests(worker, count, ROUNDS)
    try:
        requests.start()
        found = SelfCheck(worker, requests, real)
        if (fault := found.fault(PLAIN)) is None:
            ledger.thresholds = real
            found.drafting()
            fault = found.verification()
    finally:
        requests.end()
        ledger.windows.clear()
        runner.start_counting()
        ledger.thresholds = real
    if fault is not None:
        ledger.thresholds = NO_DRAFTS
        speculator.context.fall_back(f"nothing is drafted, for {fault}")
