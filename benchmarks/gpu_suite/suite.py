"""What all parts share: the target's servers and prompts, and what a decode step must read.

Owns when servers start and stop: all at once, so that nothing starts while something is timed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer
from transformers import LlamaConfig

from benchmarks.gpu_suite.settings import Settings
from benchmarks.server import Server, without_plugin
from benchmarks.workload import DEMO_MODEL, EVAL_PROMPTS, HERE, by_files, load_demo_prompts
from vllm_adadecode.evaluation.costs import Costs, ModelShape, costs_from_bytes
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.heads.resolve import SUBFOLDER

PLAIN = ("vanilla", "adadecode")
INVARIANT = ("vanilla_invariant", "adadecode_invariant")
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 600.0, 600.0
# Of the demo's prompts, four in a row have all lengths.
LENGTHS = 4


class Suite:
    """See the module; a context manager, which stops the servers.

    Args:
        servers: by name, not started.
        costs: of each part of the target, in layers.
        advance: called after each step of a part.
    """

    def __init__(
        self,
        settings: Settings,
        servers: Mapping[str, Server],
        costs: Costs,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings, self.servers, self.costs = settings, servers, costs
        self.advance = advance
        self.prompts = load_prompts()
        self._running = dict.fromkeys(servers, False)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, names: Collection[str]) -> None:
        """Start those that do not run, and stop the others."""
        for name, server in self.servers.items():
            if name in names and not self._running[name]:
                self._stack.enter_context(server)
            elif name not in names and self._running[name]:
                server.stop()
            self._running[name] = name in names

    def wait(self, names: Collection[str]) -> None:
        """Until these answer.

        Raises:
            ServerError: one does not.
        """
        for name in names:
            self.servers[name].wait_until_ready(START_TIMEOUT_S)

    def generate(
        self, name: str, prompts: Sequence[Sequence[int]], tokens: int, batch: int
    ) -> list[list[int]]:
        """Greedy continuations of so many tokens.

        Args:
            batch: prompts of a request; each is answered before the next is sent.
        """
        body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        found: list[list[int]] = []
        for start in range(0, len(prompts), batch):
            part = body | {"prompt": [list(ids) for ids in prompts[start : start + batch]]}
            part["return_token_ids"] = True
            answer = self.servers[name].post("/v1/completions", part, ANSWER_TIMEOUT_S)
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found += [choice["token_ids"] for choice in choices]
        return found


def make_servers(
    settings: Settings, target: Path, logs: Path, options: Mapping[str, Any]
) -> dict[str, Server]:
    """All that any part needs, by name; not started.

    Args:
        options: more of the method's.
    """
    ours = ("--speculative-config", json.dumps({"method": "adadecode", **options}))
    # The worker's extension lies in this checkout.
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = settings.environment | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def server(name: str) -> Server:
        arguments, own = (ours, {}) if name.startswith(PLAIN[1]) else ((), without_plugin())
        if name in INVARIANT:
            own = own | {"VLLM_BATCH_INVARIANT": "1"}
        log = logs / f"{name}.log"
        return Server(target, arguments, log, settings.flags, environment | own)

    return {name: server(name) for name in (*PLAIN, *(INVARIANT if settings.invariant else ()))}


def load_prompts(model: Path = DEMO_MODEL) -> list[list[int]]:
    """Token ids; the first 64 are the demo's, in turn of known and of unseen files, of all lengths;
    then prose, C headers and more."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    kinds = by_files(load_demo_prompts())
    demo = [[p.text for p in kinds[name]] for name in ("second_stage", "held_out")]
    others = [
        [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
        for file in sorted(EVAL_PROMPTS.glob("*.jsonl"))
    ]
    turns = chain(*(chain.from_iterable(zip_longest(*map(_spread, of))) for of in (demo, others)))
    return [tokenizer.encode(text).ids for text in turns if text is not None]


def _spread(of_kind: list[str]) -> list[str]:
    """One of each length, then the next of each: files list their lengths one after the other."""
    step = max(1, len(of_kind) // LENGTHS)
    return [text for start in range(step) for text in of_kind[start::step]]


def read_costs(target: Path) -> Costs:
    """What a target that has heads beside it reads, in bytes of weights of one of its layers."""
    shape = ModelShape.from_config(LlamaConfig.from_pretrained(target))
    return costs_from_bytes(shape, HeadsConfig.load(target / SUBFOLDER), "bytes")


def layers_read(costs: Costs, stats: Mapping[str, Any]) -> float:
    """Layers that AdaDecode's decode steps have read, LM head, heads and gates counted in layers.

    Layers and LM head count once for every step of a batch, whatever its size; a head once for
    every batch in which it is evaluated. Left out, as of vanilla: keys and values (at a few hundred
    tokens a request well under a hundredth of an 8 B model's weights), activations, the embedding's
    rows, and prefill.
    """
    exits = stats["exits"].values()
    return float(
        stats["draft_layers"]
        + stats["verification_layers"]
        + costs.head * sum(e["head_batches"] for e in exits)
        # Gates are counted by requests; each is one vector.
        + costs.gate * sum(e["gates_evaluated"] for e in exits)
        + costs.lm_head * (stats["deferred_steps"] + stats["plain_steps"])
    )
