"""Schedules: requests of all kinds that come and go at random, and what else happens meanwhile.

Owns what is asked and when (all of it follows from a seed), how a schedule is run step by step, and
how its outputs are held against plain vLLM's. test_schedule.py runs a few, tests/soak.py hundreds.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest.mock import patch

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams, envs
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tests.support.engines import TIE_GAP, divergences

VOCAB = 2048
# After processors, so that ties are told by what was compared.
PLAIN: dict[str, Any] = {"logprobs_mode": "processed_logprobs", "max_model_len": 384}
TIGHT: dict[str, Any] = PLAIN | {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 96,
    "enable_prefix_caching": True,
    "block_size": 32,
    # 32 tokens each; 8 requests of up to 360 tokens want 96.
    "num_gpu_blocks_override": 24,
    "disable_log_stats": False,
}
GRAMMARS: list[dict[str, Any]] = [
    {"regex": r"\(self, [a-z_]{3,12}\):\n    return 1"},
    {"regex": r"[a-z]{4} [a-z]{3}"},
    {"choice": ["return None", "return self", "raise ValueError", "pass"]},
    {"json": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}}},
    {"grammar": 'root ::= "def " name "(" name "):" | "x = " name\nname ::= [a-z] [a-z_]*'},
]
# Log-probabilities in batches of another shape.
LOGPROB_GAP = 2e-3
# What happens to an engine, and how many steps later it is over.
EVENTS: list[dict[int, str]] = [
    {0: "reset cache"},
    {0: "pause", 5: "resume"},
    # By then the batches under way have come back, which a server would wait for.
    {0: "pause", 3: "sleep"},
]
STEPS_BETWEEN_EVENTS = 25


@dataclass
class Request:
    """What is asked, when it comes, and when it is aborted (steps after its arrival).

    Attributes:
        again: whether it comes a second time, under the same id, right after its abort.
        kinds: words for what is special about it.
    """

    prompt: list[int]
    params: SamplingParams
    arrival: int
    abort_after: int | None = None
    again: bool = False
    priority: int = 0
    kinds: tuple[str, ...] = ()

    @property
    def is_deterministic(self) -> bool:
        """Whether the output follows from the logits alone."""
        return self.params.temperature == 0 or self.params.top_k == 1


def random_params(rng: np.random.Generator) -> tuple[SamplingParams, tuple[str, ...]]:
    """Greedy, or sampling that can only be greedy, or (one in ten) truly sampled.

    Returns:
        the parameters, and words for what is special about them.
    """
    kinds: list[str] = []

    def maybe(kind: str, probability: float = 0.2) -> bool:
        if chosen := bool(rng.random() < probability):
            kinds.append(kind)
        return chosen

    def some_tokens(count: int) -> list[int]:
        return rng.integers(1, VOCAB, count).tolist()

    max_tokens = int(rng.integers(1, 61))
    options: dict[str, Any] = {"max_tokens": max_tokens}
    sampling = {"temperature": 1.0, "seed": int(rng.integers(1 << 30))}
    kinds.append(str(rng.choice(["greedy", "top_k", "sampled"], p=[0.7, 0.2, 0.1])))
    match kinds[0]:
        case "greedy":
            options["temperature"] = 0.0
        case "top_k":
            options |= sampling | {"top_k": 1, "min_p": 0.1}
        case "sampled":
            options |= sampling | {"temperature": 0.8, "min_p": 0.1}
    # vLLM has n > 1 for sampling only.
    if kinds[0] != "greedy" and maybe("n > 1", 0.3):
        options |= {"n": int(rng.integers(2, 4)), "output_kind": RequestOutputKind.FINAL_ONLY}
    if maybe("penalties", 0.4):
        options["presence_penalty"] = float(rng.choice([0, rng.uniform(-1, 2)]))
        options["frequency_penalty"] = float(rng.choice([0, rng.uniform(-0.5, 1)]))
        options["repetition_penalty"] = float(rng.choice([1, rng.uniform(1.02, 1.5)]))
    if maybe("logprobs", 0.3):
        options["logprobs"] = int(rng.integers(1, 4))
    elif maybe("logprob_token_ids", 0.3):
        options["logprob_token_ids"] = some_tokens(int(rng.integers(1, 9)))
    if maybe("prompt_logprobs", 0.1):
        options["prompt_logprobs"] = int(rng.integers(1, 4))
    if maybe("grammar", 0.15):
        # With what is below it may leave no token at all.
        options["structured_outputs"] = StructuredOutputsParams(**GRAMMARS[rng.integers(5)])
        return SamplingParams(**options), tuple(kinds)
    options["ignore_eos"] = maybe("ignore_eos", 0.5)
    if maybe("allowed tokens", 0.15):
        # Of few tokens, the end of the sequence (0) is soon the best.
        options["allowed_token_ids"] = [0, *sorted(set(some_tokens(int(rng.choice([3, 600])))))]
    if maybe("bad words"):
        options["bad_words"] = ["self", "return", " =", "):\n"][: rng.integers(1, 5)]
    if maybe("stop tokens", 0.3):
        # Many, so that some are met.
        options["stop_token_ids"] = some_tokens(100)
    if maybe("min_tokens", 0.3):
        options["min_tokens"] = int(rng.integers(1, max_tokens + 1))
    if maybe("stop strings", 0.15):
        options["stop"] = ["\n\n", "):"]
    if maybe("logit bias"):
        # Of many tokens, so that some become the best.
        options["logit_bias"] = {t: float(rng.uniform(-9, 9)) for t in some_tokens(300)}
    return SamplingParams(**options), tuple(kinds)


def random_requests(
    seed: int, texts: Sequence[list[int]], count: int, last_arrival: int
) -> list[Request]:
    """Requests in order of their arrival.

    Args:
        texts: token ids, of which prompts are pieces.
    """
    rng = np.random.default_rng(seed)
    # Pieces of real text; many start at the start of one, so that they share prefixes.
    stream = list(chain.from_iterable(texts))
    starts = np.cumsum([0, *map(len, texts)])[:8]
    requests = []
    for arrival in sorted(rng.integers(0, last_arrival, count).tolist()):
        # Some go on to the end of the context.
        length = int(rng.integers(1, 381)) if rng.random() < 0.3 else int(rng.integers(1, 60))
        start = int(rng.choice(starts) if rng.random() < 0.6 else rng.integers(len(stream) - 400))
        params, kinds = random_params(rng)
        requests.append(
            Request(
                prompt=stream[start : start + length],
                params=params,
                arrival=arrival,
                abort_after=int(rng.integers(0, 40)) if rng.random() < 0.15 else None,
                again=bool(rng.random() < 0.4),
                priority=int(rng.integers(0, 3)),
                kinds=kinds,
            )
        )
    return requests


def random_events(seed: int, last_arrival: int) -> dict[int, str]:
    """What happens to the engine, by step."""
    rng = np.random.default_rng(seed)
    return {
        step + later: what
        for step in range(STEPS_BETWEEN_EVENTS, last_arrival, STEPS_BETWEEN_EVENTS)
        for later, what in EVENTS[rng.integers(len(EVENTS))].items()
    }


def serve(
    engine: LLM, requests: Sequence[Request], events: Mapping[int, str] | None = None
) -> dict[int, RequestOutput]:
    """Run a schedule step by step; outputs of the requests that finished, by place."""
    core = engine.llm_engine
    scheduler_config = core.vllm_config.scheduler_config
    waiting = list(enumerate(requests))
    aborts = [(r.arrival + r.abort_after, i) for i, r in waiting if r.abort_after is not None]
    aborted: set[int] = set()
    finished: dict[int, RequestOutput] = {}

    def add(i: int) -> None:
        of = requests[i]
        priority = of.priority if scheduler_config.policy == "priority" else 0
        prompt = {"prompt_token_ids": of.prompt}
        core.add_request(str(i), prompt, of.params.clone(), priority=priority)

    step = 0
    # vLLM makes ids unique inside of an engine; here a request that comes again has the same one.
    # With async scheduling it would get outputs that are on their way to the first.
    same_ids = patch.object(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", True)
    with nullcontext() if scheduler_config.async_scheduling else same_ids:
        while waiting or core.has_unfinished_requests():
            happen(engine, (events or {}).get(step))
            while waiting and waiting[0][1].arrival <= step:
                add(waiting.pop(0)[0])
            due = [i for when, i in aborts if when == step and i not in finished]
            core.abort_request([str(i) for i in due])
            aborted.update(i for i in due if not requests[i].again)
            for i in due:
                if requests[i].again:
                    add(i)
            for output in core.step() if core.has_unfinished_requests() else ():
                i = int(output.request_id)
                assert i not in finished, "an output after the last"
                assert i not in aborted, "an output after its abort"
                if output.finished:
                    finished[i] = output
            step += 1
    core.wake_up(["scheduling"])
    assert set(finished) == set(range(len(requests))) - aborted
    return finished


def twins(vanilla: LLM, requests: Sequence[Request]) -> list[RequestOutput]:
    """The references: vanilla, all at once, with room for all.

    Two faults of vLLM's V1 runner, which vanilla has on a CPU, are kept out. It ends when a seeded
    request is prefilled in chunks: what is compared does not depend on seeds. Beside a request with
    `logprob_token_ids` it gives others' token 0 a probability of 0: they do not meet.
    """
    found: dict[int, RequestOutput] = {}
    for is_named in (False, True):
        some = [i for i, r in enumerate(requests) if bool(r.params.logprob_token_ids) == is_named]
        params = [requests[i].params.clone() for i in some]
        for each in params:
            each.seed = None
        prompts = [{"prompt_token_ids": requests[i].prompt} for i in some]
        found |= zip(some, vanilla.generate(prompts, params, use_tqdm=False), strict=True)
    return [found[i] for i in range(len(requests))]


def happen(engine: LLM, what: str | None) -> None:
    """An event of `EVENTS`."""
    core = engine.llm_engine
    match what:
        case "reset cache":
            core.reset_prefix_cache(reset_running_requests=True)
        case "pause":
            core.sleep(0, mode="keep")
        case "resume":
            core.wake_up(["scheduling"])
        case "sleep":
            core.sleep(2, mode="keep")
            core.wake_up()


@dataclass(frozen=True)
class Difference:
    """How an output differs from its plain twin; a "tie" may (see `TIE_GAP`)."""

    request: int
    kind: str
    detail: str = ""


def compare(
    vanilla: LLM,
    requests: Sequence[Request],
    finished: Mapping[int, RequestOutput],
    reference: Sequence[RequestOutput],
) -> list[Difference]:
    """All differences of outputs that follow from the logits; of the others, a wrong length.

    Args:
        vanilla: gave the reference, with the log-probabilities of `PLAIN`.
        finished: outputs by place in ``requests``.
        reference: of all requests.
    """
    found: list[Difference] = []
    whose: list[int] = []
    pairs: list[tuple[RequestOutput, RequestOutput]] = []
    for i, output in sorted(finished.items()):
        params, outputs, twins = requests[i].params, output.outputs, reference[i].outputs
        if len(outputs) != params.n:
            found.append(Difference(i, "completions", f"{len(outputs)}, not {params.n}"))
        elif requests[i].is_deterministic:
            whose += [i] * params.n
            pairs += [
                (_with(output, mine), _with(reference[i], its))
                for mine, its in zip(outputs, twins, strict=True)
            ]
        elif not all(1 <= len(c.token_ids) <= (params.max_tokens or 0) for c in outputs):
            found.append(Difference(i, "length"))
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    diverged = divergences(vanilla, ours, theirs, [requests[i].params for i in whose])
    for d in diverged:
        kind = "tie" if d.gap <= TIE_GAP else "tokens"
        found.append(Difference(whose[d.request], kind, f"at {d.position}, {d.gap:.2g} apart"))
    for at in sorted(set(range(len(pairs))) - {d.request for d in diverged}):
        a, b = ours[at].outputs[0], theirs[at].outputs[0]
        for kind, mine, its in (
            ("text", a.text, b.text),
            ("finish", (a.finish_reason, a.stop_reason), (b.finish_reason, b.stop_reason)),
        ):
            if mine != its:
                found.append(Difference(whose[at], kind, f"{mine!r}, not {its!r}"))
        for kind, mine, its in (
            ("logprobs", a.logprobs, b.logprobs),
            ("prompt_logprobs", ours[at].prompt_logprobs, theirs[at].prompt_logprobs),
        ):
            # Of tokens that the request names all have to be there.
            all_named = kind == "logprobs" and bool(requests[whose[at]].params.logprob_token_ids)
            if wrong := _logprobs_differ(mine, its, all_named):
                found.append(Difference(whose[at], kind, wrong))
    return found


def _with(output: RequestOutput, completion: Any) -> RequestOutput:
    """One completion of an output."""
    single = copy(output)
    single.outputs = [completion]
    return single


def _logprobs_differ(ours: Any, theirs: Any, same_tokens: bool) -> str:
    """Where and by how much; empty: they are the same, what is unlikely apart."""
    if (ours is None) != (theirs is None) or len(ours or ()) != len(theirs or ()):
        return f"of {len(ours or ())} tokens, not {len(theirs or ())}"
    for at, (x, y) in enumerate(zip(ours or (), theirs or (), strict=True)):
        if (x is None) != (y is None):
            return f"at {at} on one side only"
        if same_tokens and set(x or ()) != set(y or ()):
            return f"at {at} of tokens {sorted(x)}, not {sorted(y)}"
        for token in set(x or ()) & set(y or ()):
            # A difference of infinities is no number.
            if (gap := abs(x[token].logprob - y[token].logprob)) > LOGPROB_GAP:
                return f"at {at} of token {token}: {gap:.2g} apart"
    return ""
