"""Thousands of requests in random schedules, each compared with its plain twin.

    python -m tests.soak [--requests 10000] [--out results/soak] [--seed N,N]

A schedule is 50 requests of all kinds (tests/support/schedules.py), the engine's mode and what
happens to it meanwhile; all of it follows from its seed. Each output is held against that of vLLM
without the method, at temperature 0 (or top_k 1) token for token. After each schedule nothing of it
may be left in the engine, and a probe prompt must give the same tokens from the same draft tokens
as ever.

Goes on where it was stopped, from the last whole schedule. For every difference it prints the
command that repeats the schedule; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha1
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tests.support.environment  # noqa: F401  (before vLLM)

# isort: split
import numpy as np
import psutil
from rich.console import Console
from vllm import LLM
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks import machine
from benchmarks.arguments import list_of, make_parser, run
from benchmarks.tables import figure, make_console, table
from benchmarks.workload import load_demo_prompts
from tests.support import schedules
from tests.support.engines import (
    EnginePool,
    generate,
    greedy,
    set_thresholds,
    slow_outputs,
    speculative,
    stats,
    token_ids,
)
from tests.support.schedules import (
    PLAIN,
    TIGHT,
    compare,
    random_events,
    random_requests,
    serve,
    twins,
)
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_json, write_whole
from vllm_adadecode.training.provenance import git_revision

SIZE = 50
LAST_ARRIVAL = 90
LOGIT_LENS = {"num_speculative_tokens": 5, "exit_layers": [2, 4, 6]}
DRAWN = {"draft_sample_method": "probabilistic"}
DEVICE, HOST = {"draft_loop": "device"}, {"draft_loop": "host"}
ASYNC: dict[str, Any] = {"async_scheduling": True}
PRIORITY: dict[str, Any] = {"scheduling_policy": "priority"}
# By name: options of the engine over TIGHT, and of the method. In turn, by seed.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "host, priority": (PRIORITY, HOST),
    "host, async": (ASYNC, HOST),
    "device": ({}, {"num_speculative_tokens": 10} | DEVICE),
    "device, async": (ASYNC, LOGIT_LENS | DEVICE),
    "host, async, priority": (ASYNC | PRIORITY, LOGIT_LENS | DRAWN | HOST),
    "device, async, priority": (ASYNC | PRIORITY, DRAWN | {"num_speculative_tokens": 8} | DEVICE),
}
THRESHOLDS = [0.0, 0.3, 0.6, 0.9]
# Every draft token accepted unseen.
BROKEN = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.0] * 5}
COUNTED = ("draft_tokens", "accepted_tokens", "deferred_steps", "mixed_steps", "overlapped_steps")
# Of resident memory in one process, after every mode has run once.
MOST_GROWTH = 0.1
# What a seed means; results of another are not gone on with.
MEANING = sha1(Path(schedules.__file__).read_bytes()).hexdigest()[:12]
# What tells one run of the command from another.
PROCESS = f"{time.time():.0f}"
Line = dict[str, Any]


class Soak:
    """The engines of all modes, and the plain one that gives the twins.

    Args:
        size: requests of a schedule.
        is_broken: whether verification is (a control).
    """

    def __init__(self, pool: EnginePool, size: int = SIZE, is_broken: bool = False) -> None:
        self.pool, self.size = pool, size
        self.broken = LOGIT_LENS | BROKEN if is_broken else {}
        tokenizer = self.plain.get_tokenizer()
        self.texts = [tokenizer.encode(prompt.text) for prompt in load_demo_prompts()]

    @property
    def plain(self) -> LLM:
        return self.pool.get(**PLAIN, max_num_seqs=64)

    def schedule(self, seed: int) -> Line:
        """Run one and compare it: a line of the results."""
        begin = time.monotonic()
        line: Line = {"seed": seed, "mode": mode_of(seed), "counts": {"requests": self.size}}
        try:
            line |= self._compared(seed, *MODES[mode_of(seed)])
        except Exception as error:
            traceback.print_exc()
            line["differences"] = [[None, "error", f"{type(error).__name__}: {error}"]]
            self.pool.restart()
        gc.collect()
        line["megabytes"] = psutil.Process().memory_info().rss >> 20
        line["seconds"] = round(time.monotonic() - begin, 1)
        return line | {"process": PROCESS, "meaning": MEANING, "git": git_revision()}

    def _compared(self, seed: int, options: dict[str, Any], spec: dict[str, Any]) -> Line:
        rng = np.random.default_rng(seed)
        last_arrival = LAST_ARRIVAL * self.size // SIZE
        requests = random_requests(seed, self.texts, self.size, last_arrival)
        events = random_events(seed, last_arrival)
        spec = speculative(**spec | self.broken)
        engine = self.pool.get(speculative_config=spec, **TIGHT, **options)
        set_thresholds(engine, float(rng.choice(THRESHOLDS)))
        stats(engine, reset=True)
        is_late = "async_scheduling" in options and rng.random() < 0.5
        counting_calls = {"autospec": True, "side_effect": Scheduler._preempt_request}
        with (
            slow_outputs() if is_late else nullcontext(),
            patch.object(Scheduler, "_preempt_request", **counting_calls) as preempt,
        ):
            finished = serve(engine, requests, events)
        counts = stats(engine)
        reference = twins(self.plain, requests)
        found = compare(self.plain, requests, finished, reference)
        differences = [[d.request, d.kind, d.detail] for d in found if d.kind != "tie"]
        differences += [[None, "left over", what] for what in left_over(engine)]
        probe, is_plain = self._probe(engine)
        differences += [] if is_plain else [[None, "probe", str(probe)]]
        aborted = [r for r in requests if r.abort_after is not None]
        of_all = {
            "requests": self.size,
            "outputs": sum(len(output.outputs) for output in finished.values()),
            "ties": sum(d.kind == "tie" for d in found),
            "aborted": len(aborted),
            "same id again": sum(r.again for r in aborted),
            "preemptions": preempt.call_count,
            "prefix hits": sum((o.num_cached_tokens or 0) > 0 for o in finished.values()),
            **Counter(kind for r in requests for kind in r.kinds),
            **Counter(events.values()),
            **{name: counts[name] for name in COUNTED},
        }
        return {"counts": of_all, "differences": differences, "probe": probe}

    def _probe(self, engine: LLM) -> tuple[list[int], bool]:
        """The same prompt as ever, alone and with an empty cache: draft tokens and those accepted;
        whether the output is plain vLLM's.
        """
        set_thresholds(engine, 0.5)
        stats(engine, reset=True)
        prompt = [{"prompt_token_ids": self.texts[0][:100]}]
        ours, theirs = (token_ids(generate(e, prompt, greedy(64))) for e in (engine, self.plain))
        counts = stats(engine)
        return [counts[name] for name in COUNTED[:2]], ours == theirs


def mode_of(seed: int) -> str:
    return list(MODES)[seed % len(MODES)]


def left_over(engine: LLM) -> list[str]:
    """What an idle engine still holds, but for the windows of who left last."""
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    windows = engine.collective_rpc(lambda worker: worker.model_runner.speculator.ledger.windows)[0]
    found = {
        "KV blocks": not engine.llm_engine.reset_prefix_cache(),
        "requests": bool(scheduler.requests or scheduler.running or scheduler.waiting),
        "windows": len(windows._windows) > TIGHT["max_num_seqs"],
    }
    return [what for what, is_left in found.items() if is_left]


def load(file: Path) -> list[Line]:
    """Lines of an earlier run.

    Raises:
        AdaDecodeError: its schedules are not these.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if any((x["mode"], x.get("meaning")) != (mode_of(x["seed"]), MEANING) for x in lines):
        raise AdaDecodeError(f"{file} is of other schedules: give another --out")
    return lines


def row(mode: str, lines: Sequence[Line]) -> dict[str, Any]:
    """What there is to say of a mode."""
    counts = sum((Counter(line["counts"]) for line in lines), Counter[str]())
    kinds = Counter(kind for line in lines for _, kind, _ in line["differences"])
    probes = [line["probe"] for line in lines if "probe" in line]
    first_last = [f"{accepted} of {drafted}" for drafted, accepted in probes[:1] + probes[-1:]]
    return {
        "mode": mode,
        "schedules": len(lines),
        "differences": ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "0",
        "probe": ", ".join(first_last) if mode in MODES else None,
        **counts,
    }


def drifts(lines: Sequence[Line]) -> list[str]:
    """Probes that are not as at first in their mode, and processes that grew."""
    found = []
    first: dict[str, list[int]] = {}
    for line in lines:
        if (probe := line.get("probe")) and probe != first.setdefault(line["mode"], probe):
            found.append(f"probe of seed {line['seed']}: {probe}, not {first[line['mode']]}")
    for process, (begin, end) in memory(lines).items():
        if end > begin * (1 + MOST_GROWTH):
            found.append(f"memory of process {process}: {begin} MB, then {end} MB")
    return found


def memory(lines: Sequence[Line]) -> dict[str, tuple[int, int]]:
    """Megabytes of each process, when it had run all modes and at last."""
    found: dict[str, list[int]] = {}
    for line in lines:
        found.setdefault(line["process"], []).append(line["megabytes"])
    warm = {process: sizes[len(MODES) :] for process, sizes in found.items()}
    return {process: (sizes[0], sizes[-1]) for process, sizes in warm.items() if sizes}


def report(console: Console, lines: Sequence[Line]) -> dict[str, Any]:
    """Shows the table and what is not level; the same, JSON-ready."""
    rows = [row(mode, [line for line in lines if line["mode"] == mode]) for mode in MODES]
    rows.append(row("all", lines))
    titles = ["mode", "schedules", "requests", "outputs", "ties", "differences", "preemptions"]
    titles += ["prefix hits", *COUNTED, "probe"]
    shown = [figure(title, "{}", title) for title in titles]
    console.print(table("Requests in random schedules, and their plain twins", shown, rows))
    result = {"rows": rows, "megabytes": memory(lines), "not level": drifts(lines)}
    for name, value in (("all", rows[-1]), *list(result.items())[1:]):
        console.print(f"{name}: {value}", soft_wrap=True, markup=False)
    return result


def soak(options: argparse.Namespace) -> int:
    console = make_console()
    file = options.out / "schedules.jsonl"
    is_kept = not (options.seed or options.broken)
    lines = load(file) if is_kept else []
    done = {line["seed"] for line in lines}
    seeds = options.seed or [i for i in range(-(-options.requests // SIZE)) if i not in done]
    with counting(console, left=True) as progress:
        task = progress.add_task("requests", total=(len(lines) + len(seeds)) * SIZE)
        progress.advance(task, len(lines) * SIZE)
        subject = Soak(EnginePool(), is_broken=options.broken)
        for seed in seeds:
            line = subject.schedule(seed)
            lines.append(line)
            if is_kept:
                write_whole(file, "".join(json.dumps(x) + "\n" for x in lines).encode())
            for request, kind, detail in line["differences"]:
                again = f"python -m tests.soak --seed {seed}"
                text = f"{kind}, request {request}: {detail}; again: {again}"
                console.print(text, soft_wrap=True, markup=False)
            progress.advance(task, SIZE)
            if not console.is_terminal:
                console.print(f"seed {seed} ({line['mode']}): {line['seconds']} s")
    result = report(console, lines)
    if is_kept:
        write_json(options.out / "summary.json", result | machine.record())
    return int(result["rows"][-1]["differences"] != "0" or bool(result["not level"]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("tests.soak", __doc__)
    parser.add_argument("--requests", type=positive, default=10_000, help="in all")
    parser.add_argument("--seed", type=list_of(int), help="these schedules alone, kept nowhere")
    parser.add_argument("--out", type=Path, default=Path("results/soak"), help="folder")
    help_ = "accept every draft token unseen, as a control: must end with differences"
    parser.add_argument("--break", dest="broken", action="store_true", help=help_)
    options = parser.parse_args(argv)
    return run("soak", lambda: soak(options), "goes on with the same command")


if __name__ == "__main__":
    sys.exit(main())
