"""Rounds that stay open: verified by batches that were prepared before anyone knew their drafts.

The same engine serves with rounds open and with each one settled first, which must not be told
apart by anything but the waiting. Whatever else happens to requests is in test_schedule.py.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

from tests.engine.test_graphs import get_engine as graphs_engine
from tests.support.engines import (
    EnginePool,
    EveryStep,
    assert_same,
    divergences,
    generate,
    greedy,
    poll_with,
    slow_outputs,
    speculative,
    stats,
    token_ids,
)
from tests.support.op_trace import traced
from tests.support.recorded_graphs import RecordedGraph
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.engine.warmup import launch_kernels
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.spans.padded import PaddedSpans, PassShape, in_any_order
from vllm_adadecode.verify.overlapped_plan import NextBatch, OpenPlan, PrefillPart
from vllm_adadecode.verify.passes import VerificationPasses

SPEC: dict[str, Any] = {"num_speculative_tokens": 5, "draft_loop": "device"}


def get_engine(engines: EnginePool, **options: Any) -> LLM:
    """One that keeps rounds open."""
    spec = speculative(**SPEC, **options.pop("spec", {}))
    engine = engines.get(speculative_config=spec, async_scheduling=True, **options)
    stats(engine, reset=True)
    return engine


@contextmanager
def always_settled() -> Iterator[None]:
    """The host waits for every round before it prepares the next batch."""

    def verify_open(self: DeviceRounds, scheduler_output: SchedulerOutput) -> bool:
        self.settle()
        return False

    with patch.object(DeviceRounds, "verify_open", verify_open):
        yield


# --- which batches ------------------------------------------------------------------------------


def scheduled(drafts: dict[str, int], **options: Any) -> SchedulerOutput:
    """A batch of decoding, with so many drafts of each request."""
    output = SchedulerOutput.make_empty()
    output.scheduled_cached_reqs = CachedRequestData.make_empty()
    output.num_scheduled_tokens = {r: 1 + n for r, n in drafts.items()}
    output.scheduled_spec_decode_tokens = {r: [-1] * n for r, n in drafts.items() if n}
    for name, value in options.items():
        setattr(output, name, value)
    return output


NEW = [SimpleNamespace(req_id="new")]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (scheduled({"b": 5, "a": 2}), (["a", "b"], [], [], False)),
        (scheduled({"a": 0, "b": 5}), (["a", "b"], [], [], False)),
        (scheduled({"a": 5, "b": 5}, finished_req_ids={"another"}), (["a", "b"], [], [], False)),
        (scheduled({"a": 5}, finished_req_ids={"b"}), (["a"], [], ["b"], False)),
        (scheduled({"a": 5}), (["a"], ["b"], [], False)),
        # Prefill: of a request that is new, or of one that was in the midst of its prompt.
        (
            scheduled({"a": 5, "new": 20, "b": 5}, scheduled_new_reqs=NEW),
            (["a", "b"], [], [], True),
        ),
        (scheduled({"a": 5, "b": 5, "half": 30}), (["a", "b"], [], [], True)),
        (scheduled({"a": 5, "half": 30}, finished_req_ids={"b"}), (["a"], [], ["b"], True)),
        (scheduled({"a": 5, "b": 5}, finished_req_ids={"half"}), (["a", "b"], [], ["half"], False)),
        (scheduled({"half": 30}), None),
        (scheduled({"new": 20}, scheduled_new_reqs=NEW), None),
        # It was left out of an earlier batch.
        (scheduled({"a": 5, "c": 5}), None),
        (scheduled({"a": 5, "b": 5}, num_scheduled_tokens={"a": 6, "b": 20}), None),
        (scheduled({"a": 5, "b": 5}, scheduled_new_reqs=[SimpleNamespace(req_id="b")]), None),
        (scheduled({"a": 5, "b": 5}, preempted_req_ids={"c"}), None),
        (scheduled({"a": 5, "b": 5}, has_structured_output_requests=True), None),
    ],
)
def test_which_batches_go_on_unseen(
    output: SchedulerOutput, expected: tuple[list[str], list[str], list[str], bool] | None
) -> None:
    found = NextBatch.of(output, ["a", "b"], ["half"])
    assert (found and (found.decoding, found.left_out, found.gone, found.prefills)) == expected


PREFILL = PrefillPart(
    num_reqs=1,
    num_tokens=7,
    most_tokens=7,
    order=torch.tensor([2, 0, 1]),
    tokens=torch.arange(9, 16),
    starts=torch.tensor([0]),
    starts_cpu=torch.tensor([0], dtype=torch.int32),
    lengths_cpu=torch.tensor([7], dtype=torch.int32),
)


@pytest.mark.parametrize("prefill", [None, PREFILL])
def test_what_was_verified_is_counted_later(prefill: PrefillPart | None) -> None:
    plan = OpenPlan(
        drafting=None,  # type: ignore[arg-type]
        req_ids=["b", "a"] if prefill is None else ["b", "a", "new"],
        row_of=torch.tensor([1, 0, -1], dtype=torch.int32),
        # Of b's four tokens three were prepared for; a has fewer than were.
        scheduled=np.array([3, 6] if prefill is None else [3, 6, 7]),
        prefill=prefill,
    )
    windows = {
        "a": PendingWindow(np.array([2, 1]), np.array([0])),
        "b": PendingWindow(np.array([2, 2, 2, 0]), np.array([1, 1, 1])),
    }
    staged: Any = SimpleNamespace(spans=((0, 2), (2, 5), (5, 8)))
    counters = Counters.create(8, (2, 5))
    plan.count(windows, staged, counters)
    assert plan.num_places == 9
    assert (counters.overlapped_steps, counters.plain_steps) == (1, 0)
    assert counters.deferred_tokens == 5
    if prefill is None:
        assert (counters.deferred_steps, counters.prefill_steps) == (1, 0)
        # No token is at depth 0 of those that ran, one at depth 1, and the last span takes all.
        assert counters.verification_layers == 3 + 3
        assert counters.verify_token_layers == 3 * 1 + 3 * 5
    else:
        assert counters.deferred_steps == counters.verification_layers == 0
        assert counters.prefill_steps == counters.mixed_steps == 1
        assert counters.mixed_layers == 8
        assert counters.mixed_prefill_token_layers == 8 * 7
        assert counters.mixed_verify_token_layers == 3 * 1 + 3 * 5


# --- the same as when the host waits ------------------------------------------------------------


def all_kinds() -> list[SamplingParams]:
    """Greedy and sampled, of several lengths, with everything that looks at drafts."""
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.2, "seed": 2, "top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.7, "seed": 3, "presence_penalty": 1.0},
        {"bad_words": ["self", "return", " ="]},
        {"min_tokens": 20, "stop_token_ids": list(range(300, 400))},
        {"temperature": 0.8, "seed": 4, "top_k": 8},
    ]
    return [greedy(14 + 5 * i, **options) for i, options in enumerate(kinds)]


def everything(outputs: list[Any]) -> list[Any]:
    """What a user sees of outputs."""
    return [
        (
            list(o.outputs[0].token_ids),
            o.outputs[0].finish_reason,
            [sorted(position) for position in o.outputs[0].logprobs or ()],
            [sorted(position) for position in o.prompt_logprobs or () if position],
        )
        for o in outputs
    ]


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_nothing_but_the_waiting_differs(
    engines: EnginePool, prompts: list[str], method: str
) -> None:
    """Tokens, log-probabilities and counts, in batches that get smaller."""
    engine = get_engine(engines, spec={"draft_sample_method": method})
    params = all_kinds()
    found = {}
    for name, manner in (("open", nullcontext()), ("settled", always_settled())):
        with manner:
            outputs = generate(engine, prompts[:9], [p.clone() for p in params])
            found[name] = everything(outputs), stats(engine, reset=True)
    (seen, counts), (settled_seen, settled_counts) = found["open"], found["settled"]
    assert seen == settled_seen
    assert settled_counts["overlapped_steps"] == 0
    decoding = counts["deferred_steps"] + counts["plain_steps"]
    assert counts["overlapped_steps"] > 0.9 * decoding
    assert counts["draft_tokens"] > counts["accepted_tokens"] > 50
    # Of requests that have ended, drafts that nobody will verify are not made any more.
    assert counts["draft_tokens"] <= settled_counts["draft_tokens"]
    assert_same_counts(counts, settled_counts)


def assert_same_counts(counts: dict[str, Any], settled: dict[str, Any]) -> None:
    """Of verification: what is drafted for requests that have ended may differ."""
    for name in (
        *(
            "verification_steps",
            "generated_tokens",
            "sampled_tokens",
            "deferred_tokens",
            "deferred_steps",
        ),
        *("plain_steps", "prefill_steps", "verification_layers", "verify_token_layers"),
        *("mixed_steps", "mixed_layers", "mixed_prefill_token_layers"),
        *("mixed_verify_token_layers", "accepted_tokens", "draft_acceptance_rate"),
    ):
        assert counts[name] == settled[name], name
    for layer, settled_exit in settled["exits"].items():
        for name in ("accepted_tokens", "rejected_tokens"):
            assert counts["exits"][layer][name] == settled_exit[name], (layer, name)


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_prompts_go_through_beside_open_rounds(
    engines: EnginePool, prompts: list[str], method: str
) -> None:
    """Requests that come while others decode, their prompts in chunks; few seats."""
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 40}
    engine = get_engine(engines, spec={"draft_sample_method": method}, **options)
    params = [p for _ in range(2) for p in all_kinds()]
    texts = [prompts[i] * (1 + i % 3) for i in range(len(params))]
    found = {}
    for name, manner in (("open", nullcontext()), ("settled", always_settled())):
        with manner:
            outputs = generate(engine, texts, [p.clone() for p in params])
            found[name] = everything(outputs), stats(engine, reset=True)
    (seen, counts), (settled_seen, settled_counts) = found["open"], found["settled"]
    assert seen == settled_seen
    # Of a prompt that went through in chunks.
    assert max(len(of_prompt) for *_, of_prompt in seen) > 40
    assert_same_counts(counts, settled_counts)
    assert counts["mixed_steps"] > 20
    decoding = counts["deferred_steps"] + counts["plain_steps"]
    assert counts["overlapped_steps"] > 0.8 * (decoding + counts["mixed_steps"])
    vanilla = engines.get(**options)
    is_greedy = [i for i, p in enumerate(params) if p.temperature == 0.0]
    reference = generate(vanilla, [texts[i] for i in is_greedy], [params[i] for i in is_greedy])
    assert_same(vanilla, [outputs[i] for i in is_greedy], reference)


def test_passes_with_prefill_have_rows_for_no_more_requests_than_there_are(
    engines: EnginePool, prompts: list[str]
) -> None:
    """Attention backends keep room for as many; each request's tokens are together."""
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 40}
    engine = get_engine(engines, **options)
    run_rows, found = PaddedSpans.run_rows, []

    def noted(self: PaddedSpans, span: int, shape: PassShape, **tensors: Any) -> Any:
        if shape.is_prefilling.any():
            starts, bounds = tensors["query_start_loc"], shape.query_start_loc
            found.append(len(tensors["seq_lens"]))
            assert len(starts) == len(bounds) == len(shape.lengths) + 1 == found[-1] + 1
            assert (starts.diff() <= shape.row_tokens).all()
            assert (starts <= bounds).all()
            assert starts[-1] <= len(tensors["positions"])
            assert (starts.diff() > 0)[shape.is_prefilling].all()
            assert (tensors["seq_lens"] <= shape.lengths).all()
        return run_rows(self, span, shape, **tensors)

    with patch.object(PaddedSpans, "run_rows", noted):
        generate(engine, [p * 2 for p in prompts[:12]], [greedy(8 + 3 * i) for i in range(12)])
    assert len(found) > 20
    assert max(found) == 4


def test_backends_that_run_prefill_apart_have_rounds_settled_beside_it(
    engines: EnginePool, prompts: list[str]
) -> None:
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 40}
    engine, vanilla = get_engine(engines, **options), engines.get()
    params = [greedy(8 + 3 * i) for i in range(12)]

    def take(worker: Any, prefill: bool) -> None:
        worker.model_runner.speculator.verification_passes.static.takes_prefill = prefill

    engine.collective_rpc(take, args=(False,))
    try:
        with patch.object(PrefillPart, "of", None):
            outputs = generate(engine, prompts[:12], params)
    finally:
        engine.collective_rpc(take, args=(True,))
    assert_same(vanilla, outputs, generate(vanilla, prompts[:12], params))
    assert stats(engine)["overlapped_steps"] > 10


@pytest.mark.parametrize(("thresholds", "expected"), [((None, None), True), ((None, 1), False)])
def test_which_backends_run_prefill_apart(
    thresholds: tuple[int | None, ...], expected: bool
) -> None:
    """FlashInfer's builder has such a threshold, FlashAttention's and Triton's have none."""
    groups: Any = [
        [
            SimpleNamespace(
                get_metadata_builder=lambda t=t: SimpleNamespace(reorder_batch_threshold=t)
            )
        ]
        for t in thresholds
    ]
    assert in_any_order(groups) == expected


def test_a_session_that_goes_on_has_no_window() -> None:
    """It was left out of a batch, its round is not booked, and it comes with more of a prompt."""
    rounds = DeviceRounds(None, None, keeps_open=True)  # type: ignore[arg-type]
    unsettled: Any = SimpleNamespace(left_out={"session", "other"}, copy=None)
    rounds._unsettled.append(unsettled)
    new = [SimpleNamespace(req_id="session")]
    assert not rounds.verify_open(scheduled({"session": 20}, scheduled_new_reqs=new))
    assert unsettled.left_out == {"other"}


def test_kv_caches_may_be_initialised_twice(engines: EnginePool, prompts: list[str]) -> None:
    """As where vLLM profiles CUDA graphs before it makes those that stay."""
    engine = get_engine(engines, spec={"exit_layers": [2, 4]})
    vanilla = engines.get()
    engine.collective_rpc(
        lambda worker: worker.model_runner.initialize_kv_cache(
            deepcopy(worker.model_runner.kv_cache_config)
        )
    )
    params = [greedy(8 + 3 * i) for i in range(6)]
    outputs = generate(engine, prompts[:6], params)
    assert_same(vanilla, outputs, generate(vanilla, prompts[:6], params))
    assert stats(engine)["overlapped_steps"] > 5


def test_greedy_output_is_vanillas_when_outputs_are_late(
    engines: EnginePool, prompts: list[str]
) -> None:
    engine, vanilla = get_engine(engines), engines.get()
    params = [greedy(20 + 3 * i) for i in range(10)]
    with slow_outputs():
        outputs = generate(engine, prompts[:10], params)
    assert_same(vanilla, outputs, generate(vanilla, prompts[:10], params))
    assert stats(engine)["overlapped_steps"] > 10


def allow(worker: Any, places: int | None) -> None:
    """So many places of an open round, or as many as ever."""
    rounds = worker.model_runner.speculator.device_rounds
    if places is None:
        del rounds.most_places
    else:
        rounds.most_places = places


def test_large_batches_are_not_prepared_for_what_may_not_be_there(
    engines: EnginePool, prompts: list[str]
) -> None:
    engine, vanilla = get_engine(engines), engines.get()
    engine.collective_rpc(allow, args=(2 * 6,))
    try:
        outputs = generate(engine, prompts[:5], greedy(24))
        assert stats(engine, reset=True)["overlapped_steps"] < 10
        outputs += generate(engine, prompts[5:7], greedy(24))
        counts = stats(engine)
    finally:
        engine.collective_rpc(allow, args=(None,))
    assert counts["overlapped_steps"] > 0.8 * counts["deferred_steps"]
    assert_same(vanilla, outputs, generate(vanilla, prompts[:7], greedy(24)))


def test_requests_that_end_do_not_stop_the_others(engines: EnginePool, prompts: list[str]) -> None:
    """Their rows draft no more, and what was drafted for them is not verified."""
    engine, vanilla = get_engine(engines), engines.get()
    params = [greedy(6 + 6 * i) for i in range(8)]
    noted: list[str] = []
    stop_rows = DeviceRounds._stop_rows

    def noting(self: DeviceRounds, this: Any, gone: list[str]) -> None:
        stop_rows(self, this, gone)
        rows = this.drafting.round_.rows
        assert (rows.slots[[this.input_batch.req_ids.index(r) for r in gone]] == -1).all()
        noted.extend(gone)

    with patch.object(DeviceRounds, "_stop_rows", noting):
        outputs = generate(engine, prompts[:8], params)
    assert_same(vanilla, outputs, generate(vanilla, prompts[:8], params))
    # All but the last, which leaves nobody behind.
    assert len(noted) >= 5
    counts = stats(engine)
    assert counts["overlapped_steps"] > 0.9 * counts["deferred_steps"]


def test_attention_is_prepared_once(engines: EnginePool, prompts: list[str]) -> None:
    """By the passes, each for its tokens; vLLM's, for the whole batch, would be for nothing."""
    engine = get_engine(engines)
    calls: list[int] = []

    def note(worker: Any) -> None:
        runner = worker.model_runner
        prepare = runner._prepare_all_attention

        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(args))
            return prepare(*args, **kwargs)

        runner._prepare_all_attention = noted
        runner.put_back = lambda: setattr(runner, "_prepare_all_attention", prepare)

    engine.collective_rpc(note)
    try:
        generate(engine, prompts[:6], [greedy(12 + 3 * i) for i in range(6)])
    finally:
        engine.collective_rpc(lambda worker: worker.model_runner.put_back())
    counts = stats(engine)
    batches = counts["deferred_steps"] + counts["plain_steps"] + counts["prefill_steps"]
    assert len(calls) == batches - counts["overlapped_steps"]
    assert counts["overlapped_steps"] > 10


def test_one_request_alone_is_verified_unseen(engines: EnginePool, prompts: list[str]) -> None:
    engine, vanilla = get_engine(engines), engines.get()
    outputs = generate(engine, prompts[:4], greedy(48), batch=1)
    counts = stats(engine)
    assert_same(vanilla, outputs, generate(vanilla, prompts[:4], greedy(48), batch=1))
    assert counts["overlapped_steps"] > 0.8 * (counts["deferred_steps"] + counts["plain_steps"])


def test_steps_and_passes_that_nobody_needs_change_nothing(
    engines: EnginePool, prompts: list[str]
) -> None:
    """All steps, and in every verification all spans over all token slots."""

    class EverySpan(EveryStep):
        def pending(self) -> list[int]:
            return [1000] * len(super().pending())

    engine = get_engine(engines)
    expected = token_ids(generate(engine, prompts[:5], greedy(24)))
    engine.collective_rpc(poll_with(EverySpan()))
    try:
        assert token_ids(generate(engine, prompts[:5], greedy(24))) == expected
    finally:
        engine.collective_rpc(poll_with(StatusPoll()))


def test_a_grammar_is_asked_about_drafts_that_are_known(
    engines: EnginePool, prompts: list[str]
) -> None:
    """Beside it, other requests wait for theirs; after it, they do not."""
    engine, vanilla = get_engine(engines), engines.get()
    structured = greedy(
        12, structured_outputs=StructuredOutputsParams(regex=r"[a-z]{4} [a-z]{3}"), ignore_eos=False
    )
    params = [structured, greedy(40)]
    outputs = generate(engine, prompts[:2], [p.clone() for p in params])
    reference = generate(vanilla, prompts[:2], [p.clone() for p in params])
    assert_same(vanilla, outputs[1:], reference[1:])
    assert token_ids(outputs)[0] == token_ids(reference)[0]
    assert stats(engine)["overlapped_steps"] > 3


def test_an_open_round_is_dropped_with_its_requests(
    engines: EnginePool, prompts: list[str]
) -> None:
    """Aborted between two steps, with drafts on their way; the next request takes their seat."""
    engine, vanilla = get_engine(engines, max_num_seqs=2), engines.get()
    core = engine.llm_engine
    for i, prompt in enumerate(prompts[:2]):
        core.add_request(f"aborted-{i}", prompt, greedy(64))
    for _ in range(6):
        core.step()
    core.abort_request(["aborted-0", "aborted-1"])
    outputs = generate(engine, prompts[2:6], greedy(24))
    assert_same(vanilla, outputs, generate(vanilla, prompts[2:6], greedy(24)))

    def left(worker: Any) -> tuple[int, int]:
        speculator = worker.model_runner.speculator
        speculator.settle(everything=True)
        return len(speculator.device_rounds._unsettled), len(speculator.windows._windows)

    unsettled, windows = engine.collective_rpc(left)[0]
    assert unsettled == 0
    assert windows <= 2


def test_counts_may_be_asked_for_at_any_time(engines: EnginePool, prompts: list[str]) -> None:
    """In the middle of everything: what is open then is settled, and goes on as before."""
    engine, vanilla = get_engine(engines), engines.get()
    core = engine.llm_engine
    for i, prompt in enumerate(prompts[:3]):
        core.add_request(str(i), prompt, greedy(40))
    finished: dict[str, Any] = {}
    step = 0
    while core.has_unfinished_requests():
        finished |= {o.request_id: o for o in core.step() if o.finished}
        step += 1
        if step % 3 == 0:
            stats(engine)
    reference = generate(vanilla, prompts[:3], greedy(40))
    assert_same(vanilla, [finished[str(i)] for i in range(3)], reference)


# --- what the host waits for ---------------------------------------------------------------------


def watch(worker: Any) -> None:
    """Trace batches that verify an open round, from their start to the end of `propose`."""
    runner = worker.model_runner
    rounds, stack = runner.speculator.device_rounds, ExitStack()
    runner.waits = []

    def verify_open(scheduler_output: SchedulerOutput) -> bool:
        is_open = DeviceRounds.verify_open(rounds, scheduler_output)
        if is_open:
            trace = stack.enter_context(traced())
            runner.waits.append((bool(scheduler_output.scheduled_new_reqs), trace.places))

            def replay(graph: RecordedGraph) -> None:
                # What is in a graph happens on the device.
                with patch.object(trace, "_paused", True):
                    original(graph)

            original = RecordedGraph.replay
            stack.enter_context(patch.object(RecordedGraph, "replay", replay))
        return is_open

    def sample_tokens(grammar_output: Any) -> Any:
        try:
            return type(runner).sample_tokens(runner, grammar_output)
        finally:
            stack.close()

    rounds.verify_open, runner.sample_tokens = verify_open, sample_tokens


def unwatch(worker: Any) -> list[tuple[bool, list[str]]]:
    """Of each batch whether somebody is new in it, and for what the host waited."""
    runner = worker.model_runner
    del runner.speculator.device_rounds.verify_open, runner.sample_tokens
    waits: list[tuple[bool, list[str]]] = runner.waits
    return waits


def test_the_host_waits_for_nothing_but_polls(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole round, from one batch to the next, with one poll after each step.

    With all graphs, recorded, and with copies that have not come when they are looked for.
    """
    engine = graphs_engine(engines, "device", async_scheduling=True)
    # The first of a kind makes what all others read.
    params = [greedy(10 + 3 * i) for i in range(12)]
    generate(engine, prompts[:12], params)
    monkeypatch.setattr(RoundReadback, "has_arrived", lambda _: False)
    engine.collective_rpc(watch)
    generate(engine, prompts[:12], params)
    waits = engine.collective_rpc(unwatch)[0]
    assert len(waits) > 15
    # Requests that take the seats of others, beside those that decode.
    assert sum(is_new for is_new, _ in waits) >= 3
    # vLLM's own are not ours.
    ours = [{w for w in of_round if w.startswith("vllm_adadecode/")} for _, of_round in waits]
    assert all(len(places) == 1 for places in ours)
    files = {w.split(":")[0] for places in ours for w in places}
    assert files == {"vllm_adadecode/draft/status_poll.py"}


def test_planning_is_compiled_before_the_first_request(
    engines: EnginePool, prompts: list[str]
) -> None:
    """What is compiled into the kernels that only rounds launch is launched at start, by size."""
    engine, vanilla = get_engine(engines), engines.get()
    launched: dict[str, set[str]] = {"start": set(), "serving": set()}
    launch, when = KernelOverride._launch, "start"

    def noted(self: KernelOverride, *args: Any, **compiled: Any) -> Any:
        name = self.__name__
        if name in ("verification_plan_reference", "draft_step_reference"):
            launched[when].add(f"{name} {sorted(compiled.items())}")
        return launch(self, *args, **compiled)

    with patch.object(KernelOverride, "_launch", noted):
        engine.collective_rpc(lambda worker: launch_kernels(worker.model_runner.speculator, 16))
        when = "serving"
        outputs = [
            output for n in (1, 2, 3, 5, 9) for output in generate(engine, prompts[:n], greedy(10))
        ]
    assert len([kind for kind in launched["serving"] if "plan" in kind]) == 5
    assert launched["serving"] <= launched["start"]
    reference = generate(vanilla, prompts[:9], greedy(10))
    assert_same(vanilla, outputs[-9:], reference)


# --- controls -----------------------------------------------------------------------------------


def test_vacant_places_are_not_drafts(engines: EnginePool, prompts: list[str]) -> None:
    """Where every draft is accepted unseen, what was no draft must not be; and the control."""
    spec = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.0] * 5}
    engine = get_engine(engines, spec=spec)
    with always_settled():
        expected = token_ids(generate(engine, prompts[:4], greedy(30)))
    assert token_ids(generate(engine, prompts[:4], greedy(30))) == expected
    load_open = VerificationPasses.load_open

    def no_vacancies(self: VerificationPasses, *args: Any) -> None:
        load_open(self, *args)
        self.vacant.zero_()

    with patch.object(VerificationPasses, "load_open", no_vacancies):
        assert token_ids(generate(engine, prompts[:4], greedy(30))) != expected


@pytest.mark.parametrize("wrong", ["depths", "lengths", "tokens"])
def test_a_wrong_plan_shows(engines: EnginePool, prompts: list[str], wrong: str) -> None:
    """Controls: states at another depth, attention to one token less, another round's drafts."""
    engine, vanilla = get_engine(engines), engines.get()
    load_open = VerificationPasses.load_open

    def changed(self: VerificationPasses, plan: OpenPlan, num_places: int) -> None:
        rows = plan.drafting.round_.rows
        kept = rows.depths.clone(), rows.tokens.clone()
        if wrong == "depths":
            rows.depths.copy_(torch.where(rows.depths > 0, rows.depths.max(), 0))
        if wrong == "tokens":
            rows.tokens.copy_(rows.tokens.roll(1, dims=1))
        load_open(self, plan, num_places)
        if wrong == "lengths":
            self.buffers.seq_lens.sub_(1).clamp_(min=0)
        rows.depths.copy_(kept[0])
        rows.tokens.copy_(kept[1])

    with patch.object(VerificationPasses, "load_open", changed):
        outputs = generate(engine, prompts[:6], greedy(40))
    reference = generate(vanilla, prompts[:6], greedy(40))
    assert any(d.gap > 1e-3 for d in divergences(vanilla, outputs, reference))
