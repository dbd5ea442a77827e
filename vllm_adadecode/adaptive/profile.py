"""What rounds cost on this machine, measured at start by running some, from requests of our own.

Owns the requests, which go through the worker as the scheduler's would and end before it sends any
(those of engine/self_check.py as well), and the thresholds with which all of them do the same.
Nothing is timed but whole rounds: scheduling is not in them, which makes drafting look a little
worse than it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_adadecode.adaptive.draft_length import RoundCosts
from vllm_adadecode.adaptive.ranks import rank_0
from vllm_adadecode.heads.thresholds import ExitThresholds

# Under vLLM's logger, whose level and format users know.
logger = init_logger(f"vllm.{__name__}")

PROMPT = (1, 2)
WARM_ROUNDS, TIMED_ROUNDS = 1, 5
# Larger batches are left out once so much time has gone; they are taken to be like the largest.
ENOUGH_SECONDS = 10.0
STEP = 4  # from one batch size to the next
# Of each request in a round that drafts: enough to tell what one costs.
MOST_DRAFTS = 4
NO_DRAFTS = ExitThresholds((), ())
# As thresholds: what every probability is above, and none.
ALWAYS_ABOVE, NEVER_ABOVE = -1.0, 2.0


def all_alike(
    real: ExitThresholds, accept_at: int | None = None, open_gates: bool = False
) -> ExitThresholds:
    """Thresholds with which every request does the same, at the exits and gates of the real ones.

    Args:
        accept_at: exit index at which each prediction is accepted; None: none is.
        open_gates: whether all heads are evaluated, else only those at ``accept_at``.
    """
    cuts = [ALWAYS_ABOVE if e == accept_at else NEVER_ABOVE for e in range(len(real.confidence))]
    gates = [ALWAYS_ABOVE] * len(cuts) if open_gates else cuts
    return ExitThresholds(
        tuple(cut if real.uses(e) else None for e, cut in enumerate(cuts)),
        tuple(cut if real.uses_gate(e) else None for e, cut in enumerate(gates)),
    )


@dataclass
class Requests:
    """Requests that decode together, outside of any scheduler.

    Attributes:
        worker: vLLM's worker with our runner.
        count: requests.
        max_rounds: they have blocks for.
    """

    worker: Any
    count: int
    max_rounds: int
    ids: list[str] = field(init=False)
    computed: list[int] = field(init=False)
    drafts: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = [f"_adadecode_costs_{i}_" for i in range(self.count)]
        self.computed = [len(PROMPT)] * self.count

    def start(self) -> None:
        """Prefill, and draft."""
        runner = self.worker.model_runner
        output = SchedulerOutput.make_empty()
        params = SamplingParams(temperature=0.0, max_tokens=runner.max_model_len, ignore_eos=True)
        blocks = blocks_per_request(runner, self.max_rounds)
        following = 1  # block 0 is vLLM's null block
        for request in self.ids:
            ids = []
            for needed in blocks:
                ids.append(list(range(following, following + needed)))
                following += needed
            output.scheduled_new_reqs.append(
                NewRequestData(
                    req_id=request,
                    prompt_token_ids=list(PROMPT),
                    mm_features=[],
                    sampling_params=params,
                    pooling_params=None,
                    block_ids=tuple(ids),
                    num_computed_tokens=0,
                    lora_request=None,
                    prefill_token_ids=list(PROMPT),
                )
            )
        self._run(output, dict.fromkeys(self.ids, len(PROMPT)))

    def round(self) -> float:
        """Verify what was drafted, and draft; in seconds."""
        output = SchedulerOutput.make_empty()
        cached = CachedRequestData.make_empty()
        cached.req_ids = list(self.ids)
        cached.num_computed_tokens = list(self.computed)
        cached.num_output_tokens = [1] * self.count
        cached.new_block_ids = [None] * self.count
        output.scheduled_cached_reqs = cached
        output.scheduled_spec_decode_tokens = {r: d for r, d in self.drafts.items() if d}
        tokens = {r: 1 + len(self.drafts.get(r, ())) for r in self.ids}
        begun = time.perf_counter()
        sampled = self._run(output, tokens)
        seconds = time.perf_counter() - begun
        for i, request in enumerate(self.ids):
            self.computed[i] += len(sampled[request])
        return seconds

    def end(self) -> None:
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = set(self.ids)
        self.worker.execute_model(output)

    def _run(self, output: SchedulerOutput, tokens: dict[str, int]) -> dict[str, list[int]]:
        """A step; what it sampled, by request."""
        runner = self.worker.model_runner
        output.num_spec_tokens_to_schedule = min(MOST_DRAFTS, runner.num_speculative_steps)
        output.num_scheduled_tokens = tokens
        output.total_num_scheduled_tokens = sum(tokens.values())
        result = self.worker.execute_model(output)
        if result is None:
            result = self.worker.sample_tokens(None)
        if hasattr(result, "get_output"):
            result = result.get_output()
        found = runner.take_draft_token_ids()
        self.drafts = dict(zip(found.req_ids, found.draft_token_ids, strict=True))
        return {r: result.sampled_token_ids[result.req_id_to_index[r]] for r in self.ids}


def blocks_per_request(runner: Any, rounds: int) -> list[int]:
    """KV blocks of a request that decodes so many rounds, by group."""
    steps = runner.num_speculative_steps
    length = min(len(PROMPT) + rounds * (1 + steps) + steps, runner.max_model_len)
    sizes = runner.speculator.block_tables.block_sizes
    return [-(-length // size) for size in sizes]


def most_requests(runner: Any, rounds: int) -> int:
    """As many as length, requests, tokens and KV blocks of a step allow."""
    a_round = 1 + runner.num_speculative_steps
    if len(PROMPT) + (1 + rounds) * a_round >= runner.max_model_len:
        return 0
    return min(
        runner.max_num_reqs,
        runner.max_num_tokens // max(a_round, len(PROMPT)),
        (runner.kv_cache_config.num_blocks - 1) // sum(blocks_per_request(runner, rounds)),
    )


def batch_sizes(runner: Any, rounds: int) -> list[int]:
    """1, 4, 16 ... as far as there is room."""
    most = most_requests(runner, rounds)
    found = []
    size = 1
    while size <= most:
        found.append(size)
        size *= STEP
    return found


@torch.inference_mode()
def measure_round_costs(worker: Any) -> RoundCosts | None:
    """Costs of this engine's rounds, the same on all ranks; None where there is no room to measure.

    Takes a second or so for a small model, `ENOUGH_SECONDS` and its last batch size at most.
    """
    runner = worker.model_runner
    speculator = runner.speculator
    ledger = speculator.ledger
    real: ExitThresholds = ledger.thresholds
    rounds = WARM_ROUNDS + TIMED_ROUNDS
    settings = [NO_DRAFTS, all_alike(real)]
    settings += [all_alike(real, e) for e in range(real.num_used_exits)]
    if any(gate is not None for gate in real.gate):
        settings.append(all_alike(real, open_gates=True))
    table: list[tuple[int, list[float]]] = []
    begun = time.perf_counter()
    for size in batch_sizes(runner, rounds):
        try:
            timed = [_timed(worker, size, thresholds, rounds) for thresholds in settings]
        finally:
            ledger.thresholds = real
        table.append((size, timed))
        spent = time.perf_counter() - begun
        if rank_0(spent) > ENOUGH_SECONDS:
            break
    if not table:
        return None
    drafts = min(MOST_DRAFTS, speculator.num_speculative_steps)
    costs = rank_0(_costs(table, drafts, real))
    logger.info("Measured rounds of %s requests in %.1f s", costs.batch_sizes, spent)
    return costs


def _timed(worker: Any, size: int, thresholds: ExitThresholds, rounds: int) -> float:
    """Seconds of a round with these thresholds.

    The quickest: whatever else a machine does while a server starts only ever adds."""
    worker.model_runner.speculator.ledger.thresholds = thresholds
    requests = Requests(worker, size, rounds)
    try:
        requests.start()
        return min([requests.round() for _ in range(rounds)][WARM_ROUNDS:])
    finally:
        requests.end()


def _costs(table: list[tuple[int, list[float]]], drafts: int, real: ExitThresholds) -> RoundCosts:
    """Differences of whole rounds; one that noise has made negative counts as nothing."""
    exits = real.num_used_exits
    used = [e for e in range(exits) if real.uses(e)]
    plain, failed, check, extended = [], [], [], []
    for _, (without, in_vain, *rest) in table:
        plain.append(without)
        failed.append(max(0.0, in_vain - without))
        deepest = 0.0
        row = []
        for e in range(exits):
            # A deeper exit costs no less; at one that is passed by no draft was made.
            if e in used:
                deepest = max(deepest, (rest[e] - without) / drafts)
            row.append(deepest)
        extended.append(tuple(row))
        # The last, where there are gates: in vain, with all heads evaluated.
        check.append(max(0.0, rest[exits] - in_vain) / len(used) if rest[exits:] else 0.0)
    return RoundCosts(
        batch_sizes=tuple(size for size, _ in table),
        plain=tuple(plain),
        failed=tuple(failed),
        extended=tuple(extended),
        check=tuple(check),
    )
