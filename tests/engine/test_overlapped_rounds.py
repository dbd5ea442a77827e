"""Overlapped rounds: verified by batches that were prepared before anyone knew their draft tokens.

The same engine serves with rounds overlapping and with each one waited for, which must not be told
apart by anything but the waiting. tests/unit/test_round_states.py has what needs no engine;
whatever else happens to requests is in test_schedule.py.

Starts three engines of its own (WIDE, NARROW, and one with synthetic acceptance), and uses vanilla
and the engine with recorded graphs of test_graphs.py.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.core.sched.output import SchedulerOutput

from tests.support.engines import (
    DEVICE_LOOP,
    EnginePool,
    EveryStep,
    assert_same,
    divergences,
    generate,
    greedy,
    poll_with,
    slow_outputs,
    stats,
    token_ids,
)
from tests.support.graph_engines import get_graph_engine
from tests.support.op_trace import traced
from tests.support.recorded_graphs import RecordedGraph
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.spans.padded import PaddedSpans
from vllm_adadecode.spans.shapes import PassShape, PrefillPart
from vllm_adadecode.verify.overlapped_plan import OverlappedPlan
from vllm_adadecode.verify.passes import VerificationPasses

WIDE: dict[str, Any] = {}
# Requests wait for seats, and prompts come in chunks beside the others.
NARROW: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 40}


def get_engine(engines: EnginePool, options: dict[str, Any], **spec: Any) -> LLM:
    """One whose rounds overlap."""
    engine = engines.get(speculative_config=DEVICE_LOOP | spec, async_scheduling=True, **options)
    stats(engine, reset=True)
    return engine


@contextmanager
def always_waiting() -> Iterator[None]:
    """The host waits for every round before it prepares the next batch."""

    def overlap(self: DeviceRounds, scheduler_output: SchedulerOutput) -> bool:
        self.resolve()
        return False

    with patch.object(DeviceRounds, "overlap", overlap):
        yield


# --- the same as when the host waits ------------------------------------------------------------


def all_kinds() -> list[SamplingParams]:
    """Greedy and sampled, of several lengths, with everything that looks at draft tokens."""
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.2, "seed": 2, "top_p": 0.9, "min_p": 0.05, "logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.7, "seed": 3, "presence_penalty": 1.0},
        {"bad_words": ["self", "return", " ="], "logprob_token_ids": [5, 300, 1000, 7, 11]},
        {"min_tokens": 20, "stop_token_ids": list(range(300, 400)), "logit_bias": {300: 3.0}},
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


def assert_same_as_waiting(
    engine: LLM, texts: list[str], params: list[SamplingParams], overlapping: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Tokens, log-probabilities and counts; outputs and counts of overlapping.

    Args:
        overlapping: context of that generation.
    """
    found = []
    for manner in (overlapping, always_waiting()):
        with manner:
            outputs = generate(engine, texts, [p.clone() for p in params])
        found.append((outputs, stats(engine, reset=True)))
    (outputs, counts), (waited_outputs, waited) = found
    assert everything(outputs) == everything(waited_outputs)
    assert waited["overlapped_steps"] == 0
    # Of verification: for requests that have ended, draft tokens are not made any more.
    for name in (
        *("verification_steps", "generated_tokens", "sampled_tokens", "deferred_tokens"),
        *("deferred_steps", "plain_steps", "prefill_steps", "verification_layers"),
        *("verify_token_layers", "mixed_steps", "mixed_layers", "mixed_prefill_token_layers"),
        *("mixed_verify_token_layers", "accepted_tokens", "draft_acceptance_rate"),
    ):
        assert counts[name] == waited[name], name
    for layer, waited_exit in waited["exits"].items():
        for name in ("accepted_tokens", "rejected_tokens"):
            assert counts["exits"][layer][name] == waited_exit[name], (layer, name)
    assert waited["draft_tokens"] >= counts["draft_tokens"] > counts["accepted_tokens"] > 50
    return outputs, counts


@pytest.mark.parametrize(
    "method", ["probabilistic", pytest.param("greedy", marks=pytest.mark.slow)]
)
def test_nothing_but_the_waiting_differs(
    engines: EnginePool, prompts: list[str], method: str
) -> None:
    """In batches that get smaller."""
    engine = get_engine(engines, WIDE, draft_sample_method=method)
    _, counts = assert_same_as_waiting(engine, prompts[:9], all_kinds(), nullcontext())
    decoding = counts["deferred_steps"] + counts["plain_steps"]
    assert counts["overlapped_steps"] > 0.9 * decoding


@pytest.mark.parametrize(
    "method", ["probabilistic", pytest.param("greedy", marks=pytest.mark.slow)]
)
def test_prompts_go_through_beside_overlapped_rounds(
    engines: EnginePool, prompts: list[str], method: str
) -> None:
    """Requests that come while others decode, their prompts in chunks; few seats.

    Attention backends keep room for rows of as many requests as there may be; each request's tokens
    are together.
    """
    engine = get_engine(engines, NARROW, draft_sample_method=method)
    vanilla = engines.get()
    params = [p for _ in range(2) for p in all_kinds()]
    texts = [prompts[i] * (1 + i % 3) for i in range(len(params))]
    run_rows, rows = PaddedSpans.run_rows, []

    def noted(self: PaddedSpans, span: int, shape: PassShape, **tensors: Any) -> Any:
        if shape.is_prefilling.any():
            starts, bounds = tensors["query_start_loc"], shape.query_start_loc
            rows.append(len(tensors["seq_lens"]))
            assert len(starts) == len(bounds) == len(shape.lengths) + 1 == rows[-1] + 1
            assert (starts.diff() <= shape.row_tokens).all()
            assert (starts <= bounds).all()
            assert starts[-1] <= len(tensors["positions"])
            assert (starts.diff() > 0)[shape.is_prefilling].all()
            assert (tensors["seq_lens"] <= shape.lengths).all()
        return run_rows(self, span, shape, **tensors)

    noting = patch.object(PaddedSpans, "run_rows", noted)
    outputs, counts = assert_same_as_waiting(engine, texts, params, noting)
    assert len(rows) > 20
    assert max(rows) == NARROW["max_num_seqs"]
    # Of a prompt that went through in chunks.
    assert max(len(of_prompt) for *_, of_prompt in everything(outputs)) > 40
    assert counts["mixed_steps"] > 20
    decoding = counts["deferred_steps"] + counts["plain_steps"]
    assert counts["overlapped_steps"] > 0.8 * (decoding + counts["mixed_steps"])
    is_greedy = [i for i, p in enumerate(params) if p.temperature == 0.0]
    reference = generate(vanilla, [texts[i] for i in is_greedy], [params[i] for i in is_greedy])
    assert_same(vanilla, [outputs[i] for i in is_greedy], reference)


def test_backends_that_run_prefill_apart_have_rounds_waited_for_beside_it(
    engines: EnginePool, prompts: list[str]
) -> None:
    engine, vanilla = get_engine(engines, NARROW), engines.get()
    params = [greedy(8 + 3 * i) for i in range(12)]

    def take(worker: Any, prefill: bool) -> None:
        worker.model_runner.speculator.verification_passes.padded.takes_prefill = prefill

    engine.collective_rpc(take, args=(False,))
    try:
        with patch.object(PrefillPart, "of", None):
            outputs = generate(engine, prompts[:12], params)
    finally:
        engine.collective_rpc(take, args=(True,))
    assert_same(vanilla, outputs, generate(vanilla, prompts[:12], params))
    assert stats(engine)["overlapped_steps"] > 10


def test_kv_caches_may_be_initialised_twice(engines: EnginePool, prompts: list[str]) -> None:
    """As where vLLM profiles CUDA graphs before it makes those that stay."""
    engine, vanilla = get_engine(engines, NARROW), engines.get()
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
    engine, vanilla = get_engine(engines, WIDE), engines.get()
    params = [greedy(20 + 3 * i) for i in range(10)]
    with slow_outputs():
        outputs = generate(engine, prompts[:10], params)
    assert_same(vanilla, outputs, generate(vanilla, prompts[:10], params))
    assert stats(engine)["overlapped_steps"] > 10


def allow(worker: Any, token_slots: int | None) -> None:
    """So many token slots of an overlapped batch, or as many as ever."""
    rounds = worker.model_runner.speculator.device_rounds
    if token_slots is None:
        del rounds.most_token_slots
    else:
        rounds.most_token_slots = token_slots


def test_large_batches_wait(engines: EnginePool, prompts: list[str]) -> None:
    """They are not prepared for what may not be there."""
    engine, vanilla = get_engine(engines, WIDE), engines.get()
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
    """Their rows draft no more, and what was drafted for them is not verified.

    Attention is prepared by the passes, each for its tokens; vLLM's preparation, for the whole
    batch, would be for nothing.
    """
    engine, vanilla = get_engine(engines, WIDE), engines.get()
    # Half of them end where nobody could know, in the midst of drafting.
    stops = {"ignore_eos": False, "stop_token_ids": list(range(300, 500))}
    params = [greedy(6 + 6 * i, **(stops if i % 2 else {})) for i in range(8)]
    noted: list[str] = []
    laid_out: list[int] = []
    prepared: list[int] = []
    stop_rows = DeviceRounds._stop_rows

    def noting(self: DeviceRounds, this: Any, gone: list[str]) -> None:
        of_gone = [this.input_batch.req_ids.index(r) for r in gone]
        rows, inputs = this.run.buffers.rows, this.run.buffers.inputs
        tokens = torch.isin(inputs.token_slots, rows.slots[of_gone])
        stop_rows(self, this, gone)
        assert (rows.slots[of_gone] == -1).all()
        # Nothing is written by the pass that was laid out: their blocks may be others' by now.
        assert (inputs.token_slots[tokens] == -1).all()
        assert (inputs.slot_mapping[:, tokens] == -1).all()
        laid_out.append(int(tokens.sum()))
        noted.extend(gone)

    def note_attention(worker: Any) -> None:
        runner = worker.model_runner
        prepare = runner._prepare_all_attention

        def prepare_noted(*args: Any, **kwargs: Any) -> Any:
            prepared.append(len(args))
            return prepare(*args, **kwargs)

        runner._prepare_all_attention = prepare_noted
        runner.put_back = lambda: setattr(runner, "_prepare_all_attention", prepare)

    engine.collective_rpc(note_attention)
    try:
        with patch.object(DeviceRounds, "_stop_rows", noting):
            outputs = generate(engine, prompts[:8], params)
    finally:
        engine.collective_rpc(lambda worker: worker.model_runner.put_back())
    assert_same(vanilla, outputs, generate(vanilla, prompts[:8], params))
    # All but the last, which leaves nobody behind.
    assert len(noted) >= 5
    assert sum(laid_out) > 0
    counts = stats(engine)
    assert counts["overlapped_steps"] > max(10, 0.9 * counts["deferred_steps"])
    steps = counts["deferred_steps"] + counts["plain_steps"] + counts["prefill_steps"]
    assert len(prepared) == steps - counts["overlapped_steps"]


def test_one_request_alone_overlaps(engines: EnginePool, prompts: list[str]) -> None:
    engine, vanilla = get_engine(engines, WIDE), engines.get()
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

    engine = get_engine(engines, WIDE)
    expected = token_ids(generate(engine, prompts[:5], greedy(24)))
    engine.collective_rpc(poll_with(EverySpan()))
    try:
        assert token_ids(generate(engine, prompts[:5], greedy(24))) == expected
    finally:
        engine.collective_rpc(poll_with(StatusPoll()))


def test_a_grammar_is_asked_about_draft_tokens_that_are_known(
    engines: EnginePool, prompts: list[str]
) -> None:
    """Beside it, other requests wait for theirs; after it, they do not."""
    engine, vanilla = get_engine(engines, WIDE), engines.get()
    structured = greedy(
        12, structured_outputs=StructuredOutputsParams(regex=r"[a-z]{4} [a-z]{3}"), ignore_eos=False
    )
    params = [structured, greedy(40)]
    outputs = generate(engine, prompts[:2], [p.clone() for p in params])
    reference = generate(vanilla, prompts[:2], [p.clone() for p in params])
    assert_same(vanilla, outputs[1:], reference[1:])
    assert token_ids(outputs)[0] == token_ids(reference)[0]
    assert stats(engine)["overlapped_steps"] > 3


def test_a_round_is_dropped_with_its_requests(engines: EnginePool, prompts: list[str]) -> None:
    """Aborted between two steps, with draft tokens on their way; the next ones take their seats."""
    engine, vanilla = get_engine(engines, NARROW), engines.get()
    core, seats = engine.llm_engine, NARROW["max_num_seqs"]
    for i, prompt in enumerate(prompts[:seats]):
        core.add_request(f"aborted-{i}", prompt[:30], greedy(64))
    for _ in range(8):
        core.step()
    core.abort_request([f"aborted-{i}" for i in range(seats)])
    outputs = generate(engine, prompts[4:8], greedy(24))
    assert_same(vanilla, outputs, generate(vanilla, prompts[4:8], greedy(24)))

    def left(worker: Any) -> tuple[int, int]:
        speculator = worker.model_runner.speculator
        speculator.resolve(everything=True)
        unresolved = len(speculator.device_rounds._unresolved)
        return unresolved, len(speculator.ledger.windows._windows)

    unresolved, windows = engine.collective_rpc(left)[0]
    assert unresolved == 0
    assert windows <= seats


def test_counts_may_be_asked_for_at_any_time(engines: EnginePool, prompts: list[str]) -> None:
    """In the midst of everything: what drafts then is resolved, and goes on as before."""
    engine, vanilla = get_engine(engines, WIDE), engines.get()
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
    """Trace batches that overlap with a round, from their start to the end of `propose`."""
    runner = worker.model_runner
    rounds, stack = runner.speculator.device_rounds, ExitStack()
    runner.waits = []

    def overlap(scheduler_output: SchedulerOutput) -> bool:
        overlaps = DeviceRounds.overlap(rounds, scheduler_output)
        if overlaps:
            trace = stack.enter_context(traced())
            runner.waits.append((bool(scheduler_output.scheduled_new_reqs), trace.places))

            def replay(graph: RecordedGraph) -> None:
                # What is in a graph happens on the device.
                with patch.object(trace, "_paused", True):
                    original(graph)

            original = RecordedGraph.replay
            stack.enter_context(patch.object(RecordedGraph, "replay", replay))
        return overlaps

    def sample_tokens(grammar_output: Any) -> Any:
        try:
            return type(runner).sample_tokens(runner, grammar_output)
        finally:
            stack.close()

    rounds.overlap, runner.sample_tokens = overlap, sample_tokens


def unwatch(worker: Any) -> list[tuple[bool, list[str]]]:
    """Of each batch whether somebody is new in it, and for what the host waited."""
    runner = worker.model_runner
    del runner.speculator.device_rounds.overlap, runner.sample_tokens
    waits: list[tuple[bool, list[str]]] = runner.waits
    return waits


def test_the_host_waits_for_nothing_but_polls(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole round, from one batch to the next, with one poll after each step.

    With all graphs, recorded, and with copies that have not come when they are looked for.
    """
    engine = get_graph_engine(engines, "device", asynchronous=True)
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
    engine, vanilla = get_engine(engines, WIDE), engines.get()
    launched: dict[str, set[str]] = {"start": set(), "serving": set()}
    launch, when = KernelOverride._launch, "start"

    def noted(self: KernelOverride, *args: Any, **compiled: Any) -> Any:
        name = self.__name__
        if name in ("verification_plan_reference", "draft_step_reference"):
            launched[when].add(f"{name} {sorted(compiled.items())}")
        return launch(self, *args, **compiled)

    with patch.object(KernelOverride, "_launch", noted):
        engine.collective_rpc(lambda worker: worker.model_runner.speculator.launch_kernels(16))
        when = "serving"
        outputs = [
            output for n in (1, 2, 3, 5, 9) for output in generate(engine, prompts[:n], greedy(10))
        ]
    assert len([kind for kind in launched["serving"] if "plan" in kind]) == 5
    assert launched["serving"] <= launched["start"]
    reference = generate(vanilla, prompts[:9], greedy(10))
    assert_same(vanilla, outputs[-9:], reference)


# --- controls -----------------------------------------------------------------------------------


def test_padding_is_no_draft_token(engines: EnginePool, prompts: list[str]) -> None:
    """Where every draft token is accepted unseen, padding must not be; and the control."""
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.0] * 5}
    engine = get_engine(engines, WIDE, **synthetic)
    with always_waiting():
        expected = token_ids(generate(engine, prompts[:4], greedy(30)))
    assert token_ids(generate(engine, prompts[:4], greedy(30))) == expected
    load = VerificationPasses.load_overlapped

    def no_padding(self: VerificationPasses, *args: Any) -> None:
        load(self, *args)
        self.is_padding.zero_()

    with patch.object(VerificationPasses, "load_overlapped", no_padding):
        assert token_ids(generate(engine, prompts[:4], greedy(30))) != expected


@pytest.mark.parametrize(
    "wrong",
    [
        "depths",
        pytest.param("lengths", marks=pytest.mark.slow),
        pytest.param("tokens", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_plan_shows(engines: EnginePool, prompts: list[str], wrong: str) -> None:
    """Controls: states at another depth, attention to one token less, another round's drafts."""
    engine, vanilla = get_engine(engines, WIDE), engines.get()
    load = VerificationPasses.load_overlapped

    def changed(self: VerificationPasses, plan: OverlappedPlan, num_token_slots: int) -> None:
        rows = plan.run.buffers.rows
        kept = rows.depths.clone(), rows.tokens.clone()
        if wrong == "depths":
            rows.depths.copy_(torch.where(rows.depths > 0, rows.depths.max(), 0))
        if wrong == "tokens":
            rows.tokens.copy_(rows.tokens.roll(1, dims=1))
        load(self, plan, num_token_slots)
        if wrong == "lengths":
            self.buffers.seq_lens.sub_(1).clamp_(min=0)
        rows.depths.copy_(kept[0])
        rows.tokens.copy_(kept[1])

    with patch.object(VerificationPasses, "load_overlapped", changed):
        outputs = generate(engine, prompts[:6], greedy(40))
    reference = generate(vanilla, prompts[:6], greedy(40))
    assert any(d.gap > 1e-3 for d in divergences(vanilla, outputs, reference))
