"""An engine's process: starts vLLM with given options, then does what the lines of stdin ask for.

    python -m benchmarks.gpu_suite.child OPTIONS_AS_JSON

Requests and answers are JSON, one a line. All that vLLM prints goes to stderr. The process ends
with stdin, and so with whoever started it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

WORKER = "benchmarks.gpu_suite.worker.SuiteWorker"


class Engine:
    """vLLM's engine and what is asked of it; each public method is a request."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**options, worker_extension_cls=WORKER)
        self.speculative = bool(options.get("speculative_config"))
        self._requests = 0

    def describe(self) -> dict[str, Any]:
        """What the engine made of its options."""
        config = self.llm.llm_engine.vllm_config
        return {
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            **self.llm.collective_rpc("suite_describe")[0],
        }

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        at_once: int,
        logprobs: int | None = None,
    ) -> dict[str, Any]:
        """Greedy continuations of so many tokens each.

        Args:
            at_once: requests in flight; when one ends the next begins.
            logprobs: so many best tokens of the first position are wanted.

        Returns:
            ``token_ids`` by prompt, ``seconds`` from the first request to the last answer,
            ``stats``, what the worker counted meanwhile, and ``logprobs`` by prompt, token id (as
            text) to log-probability.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._stats(reset=True)
        engine = self.llm.llm_engine
        inputs = engine.renderer.render_cmpl([{"prompt_token_ids": list(ids)} for ids in prompts])
        numbers: dict[str, int] = {}
        found: list[Any] = [None] * len(prompts)
        following = 0
        begin = time.perf_counter()
        while following < len(prompts) or numbers:
            while following < len(prompts) and len(numbers) < at_once:
                name = f"suite-{self._requests}"
                self._requests += 1
                numbers[name] = following
                engine.add_request(name, inputs[following], params)
                following += 1
            for output in engine.step():
                if output.finished:
                    found[numbers.pop(output.request_id)] = output.outputs[0]
        seconds = time.perf_counter() - begin
        result = {
            "token_ids": [list(output.token_ids) for output in found],
            "seconds": seconds,
            "stats": self._stats(),
        }
        if logprobs is not None:
            result["logprobs"] = [
                {str(token): score.logprob for token, score in output.logprobs[0].items()}
                for output in found
            ]
        return result

    def count_syncs(
        self, prompts: Sequence[Sequence[int]], tokens: int, at_once: int
    ) -> dict[str, Any]:
        """What the worker waited for while it continued the prompts (`worker.SuiteWorker`)."""
        self.llm.collective_rpc("suite_count_syncs", args=(True,))
        try:
            self.generate(prompts, tokens, at_once)
        finally:
            counted: dict[str, Any] = self.llm.collective_rpc("suite_count_syncs", args=(False,))[0]
        return counted

    def set_drafts(self, coverage: float, precision: float) -> None:
        """Drafts at random from now on (`worker.SuiteWorker`)."""
        self.llm.collective_rpc("suite_set_drafts", args=(coverage, precision))

    def _stats(self, reset: bool = False) -> dict[str, Any] | None:
        if not self.speculative:
            return None
        stats: dict[str, Any] = self.llm.collective_rpc("adadecode_stats", args=(reset,))[0]
        return stats


REQUESTS = ("describe", "generate", "count_syncs", "set_drafts")


def main() -> int:
    # Answers go where stdout went; stdout itself, of this process and of those it starts, is log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(do: Callable[[], Any]) -> bool:
        try:
            reply, good = {"result": do()}, True
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines()
            reply, good = {"error": f"{type(error).__name__}: {text[0] if text else ''}"}, False
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
        return good

    engines: list[Engine] = []

    def start() -> dict[str, Any]:
        engines.append(Engine(json.loads(sys.argv[1])))
        return engines[0].describe()

    if not answer(start):
        return 1
    (engine,) = engines
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        assert do in REQUESTS, do
        answer(partial(getattr(engine, do), **request))
    return 0


if __name__ == "__main__":
    sys.exit(main())
