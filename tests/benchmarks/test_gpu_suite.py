"""The GPU suite: outputs that differ, parts that fail, efficiency, waits in workers, and a run of
all of it without a GPU."""

from __future__ import annotations

import json
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import load
from benchmarks.gpu_suite import __main__ as command
from benchmarks.gpu_suite import parts, report, settings, suite, syncs
from benchmarks.gpu_suite.parts import Part
from benchmarks.gpu_suite.suite import INVARIANT, PLAIN, Suite
from benchmarks.load import Measurement
from benchmarks.server import ServerError, without_plugin
from tests.support.engines import DEMO_MODEL
from vllm_adadecode.evaluation.costs import Costs
from vllm_adadecode.metrics.counters import Counters, ExitCounters

SETTINGS = replace(
    settings.on_cpu(), batches={1: 2, 4: 4}, levels=(1, 2), tokens=4, repeats=3, tie_bound=0.5
)
COSTS = Costs(num_layers=32, head=1.5, gate=0.01, lm_head=2.0)
SCORES = {"token_id:2": -0.7, "token_id:7": -0.9, "token_id:8": -1.5, "token_id:5": -0.6}


class FakeServer:
    """Continues a prompt p with [p, 1, 2, 3], or as told by batch size and number in the batch."""

    def __init__(self, changes: dict[tuple[int, int], list[int]] | None = None) -> None:
        self.changes = changes or {}
        self.calls: list[str] = []

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        prompts = body["prompt"]
        ids = [self.changes.get((len(prompts), i), [p[0], 1, 2, 3]) for i, p in enumerate(prompts)]
        choices = [{"index": i, "token_ids": of} for i, of in enumerate(ids)]
        return {"choices": choices[::-1]}

    def complete(self, ids: list[int], tokens: int, **_: Any) -> dict[str, Any]:
        self.calls.append(f"asked {ids}")
        return {"logprobs": {"top_logprobs": [SCORES]}}

    def call(self, method: str, *_: Any) -> Any:
        return {"runner": "fake"}

    def wait_until_ready(self, timeout: float) -> None:
        self.calls.append("wait")

    def stop(self) -> None:
        self.calls.append("stop")

    def __enter__(self) -> None:
        self.calls.append("start")

    def __exit__(self, *_: object) -> None:
        self.stop()


def make_suite(**servers: FakeServer) -> Suite:
    made = Suite(SETTINGS, servers, COSTS)  # type: ignore[arg-type]
    made.prompts = [[10 * i, 1, 2] for i in range(1, 5)]
    return made


# --- correctness ----------------------------------------------------------------------------------


def test_ties_are_told_from_differences() -> None:
    """Each output against vanilla's of the same batch size; vanilla says how close the two were."""
    found: dict[str, Any] = {}
    parts.compare(make_suite(vanilla=FakeServer(), adadecode=FakeServer()), PLAIN, found)
    assert (found["identical"], found["outputs"], found["divergences"]) == (True, 6, 0)
    assert (found["beyond_bound"], found["largest_gap"]) == (0, None)
    # Vanilla itself differs at batch 4, and ours in the same way: that is no divergence.
    same = {(4, 1): [20, 1, 9, 9]}
    vanilla = FakeServer(same)
    ours = FakeServer(same | {(4, 2): [30, 1, 7, 3], (4, 3): [40, 1, 8, 3]})
    found = {}
    parts.compare(make_suite(vanilla=vanilla, adadecode=ours), PLAIN, found)
    assert (found["identical"], found["divergences"], found["beyond_bound"]) == (False, 2, 1)
    gaps = [difference.pop("gap") for difference in found["differences"]]
    assert gaps == pytest.approx([0.3, 0.9])
    assert found["differences"][0] == {"batch": 4, "prompt": 2, "position": 2}
    assert found["largest_gap"] == gaps[1]
    # Vanilla was asked after what both agree on.
    assert vanilla.calls == ["asked [30, 1, 2, 30, 1]", "asked [40, 1, 2, 40, 1]"]


def test_prompts_and_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    found, full = suite.load_prompts(), settings.on_gpu()
    assert len(found) == 352 == len({tuple(ids) for ids in found}) == max(full.batches.values())
    # What is asked first is of all lengths.
    assert {len(ids) for ids in found[:8]} == {48, 64, 96, 112}
    assert max(map(len, found)) + full.tokens < 512
    servers = suite.make_servers(full, DEMO_MODEL, Path("logs"), {"num_speculative_tokens": 3})
    assert servers.keys() == {*PLAIN, *INVARIANT}
    options = '{"method": "adadecode", "num_speculative_tokens": 3}'
    for names in (PLAIN, INVARIANT):
        vanilla, ours = (servers[name] for name in names)
        assert ours.arguments == [*vanilla.arguments, "--speculative-config", options]
        invariant = {"VLLM_BATCH_INVARIANT": "1"} if names is INVARIANT else {}
        for server, plain in ((vanilla, servers["vanilla"]), (ours, servers["adadecode"])):
            assert server.environment == {**plain.environment, **invariant}
        assert vanilla.environment == {**ours.environment, **without_plugin()}
    # vLLM imports FlashInfer's sampler on CUDA whatever is installed.
    for spec, switch in ((None, "0"), (object(), None)):
        monkeypatch.setattr(settings, "find_spec", lambda name, spec=spec: spec)
        assert settings.on_gpu().environment.get("VLLM_USE_FLASHINFER_SAMPLER") == switch


# --- parts ----------------------------------------------------------------------------------------


def test_a_part_that_fails_does_not_end_the_others() -> None:
    """Servers start at once, and stop when no part to come needs them."""
    servers = {name: FakeServer() for name in (*PLAIN, *INVARIANT)}

    def broken(_: Suite, found: dict[str, Any]) -> None:
        found["before"] = 1
        raise ServerError("vllm serve ended with code 1\nlog")

    written: dict[str, Any] = {}
    todo = {
        "a": Part(broken, INVARIANT, 1),
        "b": Part(lambda _, found: found.update(x=2), PLAIN, 1),
    }
    with make_suite(**servers) as made:
        parts.run_all(made, todo, lambda name, part: written.update({name: part}))
    assert written["a"]["data"] == {"before": 1}
    assert written["a"]["error"].startswith("vllm serve ended")
    assert written["b"]["data"] == {"x": 2}
    assert "error" not in written["b"]
    assert written["b"]["servers"]["vanilla"] == {"runner": "fake"}
    assert servers["vanilla"].calls == ["start", "wait", "stop"]
    assert servers["vanilla_invariant"].calls[:3] == ["start", "wait", "stop"]


def counts() -> dict[str, Any]:
    exits = {
        8: ExitCounters(
            gates_evaluated=30, heads_evaluated=20, head_batches=20, accepted_tokens=9,
            rejected_tokens=1,
        ),
        16: ExitCounters(gates_evaluated=10, heads_evaluated=5, head_batches=4, accepted_tokens=2),
    }  # fmt: skip
    return Counters(
        32,
        exits,
        draft_layers=100,
        verification_layers=60,
        deferred_steps=8,
        plain_steps=2,
        verification_steps=10,
        generated_tokens=42,
    ).snapshot()


READ = 160 + 24 * 1.5 + 40 * 0.01 + 10 * 2.0


def test_bytes_that_steps_read() -> None:
    """Layers and LM head by batches, heads by batches in which they run, gates by requests."""
    assert suite.layers_read(COSTS, counts()) == pytest.approx(READ)
    # A step without draft tokens reads what a vanilla step does.
    plain = Counters(32, {8: ExitCounters()}, plain_steps=10, verification_layers=320)
    assert suite.layers_read(COSTS, plain.snapshot()) == 10 * COSTS.vanilla_token
    d, layer = 256, 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704
    found = suite.read_costs(DEMO_MODEL)
    assert found.head == pytest.approx((d * d + 1024 * d) / layer)
    assert found.lm_head == pytest.approx(2048 * d / layer)


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn and turned round; decoding over the ratio of bytes, throughput over requests."""
    order: list[tuple[str, int, int]] = []
    tpot = {"vanilla": [4.0, 6.0], "adadecode": [2.0, 3.0]}

    def measure(server: Any, prompts: Any, tokens: int, level: int, *_: Any) -> Measurement:
        name = PLAIN[server is servers["adadecode"]]
        order.append((name, level, len(prompts)))
        seconds = 1.0 if name == "vanilla" else 0.8
        stats = counts() if name == "adadecode" else None
        return Measurement(seconds, 100, [1.0], tpot[name], 1, 0, 0, [], stats)

    monkeypatch.setattr(load, "measure", measure)
    monkeypatch.setattr(load, "send", lambda *_: None)
    servers = {name: FakeServer() for name in PLAIN}
    found: dict[str, Any] = {}
    parts.speed(make_suite(**servers), found)
    names = ["vanilla", "adadecode", "adadecode", "vanilla", "vanilla", "adadecode"]
    assert [name for name, level, _ in order if level == 2] == names
    assert {(level, count) for _, level, count in order} == {(1, 8), (2, 4)}
    cell = found["2"]
    assert (cell["speedup"], cell["ratio"]) == (pytest.approx(2.0), pytest.approx(1.25))
    # 42 tokens of two requests at a time are 21 steps of vanilla's.
    ideal = 21 * 34 / READ
    assert cell["ideal_speedup"] == pytest.approx(ideal)
    assert cell["efficiency"] == pytest.approx(2.0 / ideal)
    assert cell["layers_of_vanilla"] == pytest.approx(160 / (32 * 21))
    assert cell["draft_acceptance_rate"] == 11 / 12
    assert found["1"]["ideal_speedup"] == pytest.approx(2 * ideal)


def result_of(**data: dict[str, Any]) -> dict[str, Any]:
    made = {name: {"data": of} for name, of in data.items()}
    about = {"gpu": None, "machine": {"cpu": "a CPU"}, "target": {"shape": "a shape"}}
    return {**about, "settings": {"dtype": "float32"}, "parts": made, **report.summary(made)}


def test_goals_and_table() -> None:
    """No number stands in for what was not measured."""
    cell: dict[str, Any] = {name: 1.5 for name in (*report.TOP, "layers_of_vanilla")}
    cell["tokens_per_s"] = dict.fromkeys(PLAIN, 10.0)
    speed = {
        "1": cell | {"efficiency": 0.96, "ratio": 1.4},
        "8": cell | {"efficiency": 0.85, "ratio": 0.97},
    }
    waits = {"1": {name: {"syncs_per_step": 0.0} for name in PLAIN}}
    result = result_of(speed=speed, host_syncs=waits, ties={"outputs": 4, "divergences": 0})
    assert result["efficiency"] == {"1": 0.96, "8": 0.85}
    assert [goal["met"] for goal in result["goals"].values()] == [True, False, False, True]
    nothing = result_of()
    assert all(goal["met"] is None for goal in nothing["goals"].values())
    assert (nothing["efficiency"], nothing["bit_identical"]) == ({}, None)
    for shown, texts in ((result, ["0.96", "waits a step"]), (nothing, ["not measured"])):
        stream = StringIO()
        report.show(Console(file=stream, width=150), shown)
        assert all(text in stream.getvalue() for text in ("no GPU", *texts))


def test_exit_codes() -> None:
    fine = {"ties": {"beyond_bound": 0, "divergences": 3}, "bit_identical": True, "errors": {}}
    assert report.exit_code(fine) == 0
    wrong: list[dict[str, Any]] = [
        {"bit_identical": False},
        {"ties": {"beyond_bound": 1}},
        {"errors": {"a": "failed"}},
    ]
    assert [report.exit_code(fine | change) for change in wrong] == [1, 1, 1]


def test_bad_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA device answers here"):
        command.main([])
    for given in (["--parts", "speed,magic"], ["--speculative-config", "[1]"]):
        with pytest.raises(SystemExit):
            command.main(["--device", "cpu", *given])
        assert capsys.readouterr().err.splitlines()[-1].startswith("python -m benchmarks.gpu_suite")


# --- waits in workers -----------------------------------------------------------------------------


def step(worker: Any, tokens: int = 1, new: int = 0) -> None:
    new_reqs = [None] * new
    worker.execute_model(
        SimpleNamespace(total_num_scheduled_tokens=tokens, scheduled_new_reqs=new_reqs)
    )
    worker.sample_tokens()


def test_waits_are_counted_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's warnings, each time, and explicit waits; other warnings and threads not."""
    modes = []

    @contextmanager
    def debug_mode() -> Iterator[None]:
        modes.append("warn")
        yield
        modes.append("default")

    class Event:
        """Not PyTorch's own: an engine of an earlier test may have put vLLM's in its place."""

        def synchronize(self) -> None:
            return None

    original = Event.synchronize
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(syncs, "_debug_mode", debug_mode)
    monkeypatch.setattr(syncs, "WAITS", (Event,))

    def in_step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        Event().synchronize()
        thread = threading.Thread(target=Event().synchronize)
        thread.start()
        thread.join()

    class Worker:
        def execute_model(self, output: Any) -> None:
            in_step()

        def sample_tokens(self) -> None:
            in_step()

    worker = Worker()
    counter = syncs.StepCounter(worker)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(worker, new=1)
        step(worker, tokens=0)
    assert (counter.steps, counter.sites.total()) == (0, 0)
    step(worker)
    counter.remove()
    found = counter.as_dict()
    assert (found["steps"], found["syncs"], found["syncs_per_step"]) == (1, 2 * 3, 6.0)
    assert len(found["places"]) == 2
    assert all("test_gpu_suite.py" in n and "in_step" in n for n in found["places"])
    assert modes == ["warn", "default"] * 2
    assert Event.synchronize is original


def test_place_is_the_callers() -> None:
    frames = [
        traceback.FrameSummary("/a/vllm_adadecode/draft/host_loop.py", 7, "run", line=""),
        traceback.FrameSummary("/a/torch/_tensor.py", 8, "__bool__", line=""),
        traceback.FrameSummary(str(syncs.SELF), 9, "note", line=""),
    ]
    stack = traceback.StackSummary.from_list(frames)
    assert syncs.place(stack) == "vllm_adadecode/draft/host_loop.py:7 run"
    for file, name in (
        ("/b/site-packages/vllm/v1/worker/gpu/input_batch.py", "vllm/v1/worker/gpu/input_batch.py"),
        (__file__, "tests/benchmarks/test_gpu_suite.py"),
    ):
        frames[0] = traceback.FrameSummary(file, 7, "run", line="")
        assert syncs.place(traceback.StackSummary.from_list(frames)) == f"{name}:7 run"


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part, with real servers, at the tiny size."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "result.json"
    code = command.main(["--device", "cpu", "--out", str(out)])
    written = json.loads(out.read_text())
    assert (written["errors"], code) == ({}, 0)
    assert list(written["parts"]) == list(command.PARTS)
    assert (written["bit_identical"], written["gpu"]) == (True, None)
    for level in ("1", "4"):
        ratio = written["speedup"][level] / written["ideal_speedup"][level]
        assert written["efficiency"][level] == pytest.approx(ratio)
        assert written["draft_acceptance_rate"][level] > 0.5
        assert written["ratio"][level] > 0
    # Of counts; the wall clock of a busy machine is not asserted on.
    assert written["ideal_speedup"]["1"] > 1
    assert written["parts"]["host_syncs"]["data"]["1"]["adadecode"]["steps"] > 0
    assert written["parts"]["speed"]["servers"]["adadecode"]["runner"].startswith("AdaDecode")
