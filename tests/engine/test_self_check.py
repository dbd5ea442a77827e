"""The check at the start in an engine: what it finds, and that nothing is left of it.

On the engines of test_device_loop.py and test_graphs.py. tests/cuda_stand_in has it with the fused
kernels, tests/unit/test_self_check.py what is taken for a fault.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from vllm import LLM
from vllm.utils.torch_utils import set_random_seed

from tests.support.engines import (
    DEVICE_LOOP,
    EnginePool,
    assert_same,
    generate,
    greedy,
    speculative,
    stats,
)
from tests.support.graph_engines import get_graph_engine
from tests.support.vllm_log import log_of_vllm
from vllm_adadecode.draft.device_loop import DeviceLoop
from vllm_adadecode.draft.host_loop import HostLoop
from vllm_adadecode.engine.self_check import check
from vllm_adadecode.spans.padded import PaddedSpans
from vllm_adadecode.verify.forward import VerificationForward
from vllm_adadecode.verify.graphs import VerificationGraphs

KEPT = "device_rounds", "draft_graphs", "verification_graphs"


@contextmanager
def whole_again(engine: LLM) -> Iterator[None]:
    """Gives back afterwards what a fault has cost."""

    def keep(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        speculator.kept = {name: getattr(speculator, name) for name in KEPT}
        speculator.kept_thresholds = speculator.ledger.thresholds

    def give_back(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        speculator.resolve(everything=True)
        vars(speculator).update(speculator.kept)
        speculator.ledger.thresholds = speculator.kept_thresholds
        speculator.context.faults.clear()

    engine.collective_rpc(keep)
    try:
        yield
    finally:
        engine.collective_rpc(give_back)


def checked(engine: LLM) -> tuple[list[bool], list[str]]:
    """What is in use after the check, and what it has said."""

    def use(worker: Any) -> list[bool]:
        speculator = worker.model_runner.speculator
        drafts = speculator.ledger.thresholds.num_used_exits > 0
        return [*(getattr(speculator, name) is not None for name in KEPT), drafts]

    with log_of_vllm("vllm.vllm_adadecode.engine") as lines:
        engine.collective_rpc(check)
    return engine.collective_rpc(use)[0], lines


def test_nothing_is_left_of_it(engines: EnginePool) -> None:
    """No request, window, count, threshold or draw."""
    engine = engines.get(speculative_config=DEVICE_LOOP)

    def start(worker: Any) -> dict[str, Any]:
        runner, drafts = worker.model_runner, []
        ledger, start = runner.speculator.ledger, DeviceLoop.start
        # vLLM tells of the last ones that have ended with the next step.
        before, requests = ledger.thresholds, set(runner.req_states.req_id_to_index)

        def noted(*args: Any, **kwargs: Any) -> Any:
            drafts.append(start(*args, **kwargs))
            return drafts[-1]

        with patch.object(DeviceLoop, "start", noted):
            worker.compile_or_warm_up_model()
        draws = random.random(), np.random.rand(), torch.rand(()).item()
        set_random_seed(worker.model_config.seed)
        return {
            "ran": len(drafts),
            "requests": len(set(runner.req_states.req_id_to_index) - requests),
            "windows": len(ledger.windows._windows),
            "counted": bool(ledger.counters),
            "same thresholds": before is ledger.thresholds,
            "same draws": draws == (random.random(), np.random.rand(), torch.rand(()).item()),
        }

    found = engine.collective_rpc(start)[0]
    assert found.pop("ran") > 2
    same = {"counted": False, "same thresholds": True, "same draws": True}
    assert found == {"requests": 0, "windows": 0} | same


def test_says_what_was_chosen(engines: EnginePool) -> None:
    def line(engine: LLM) -> str:
        return str(engine.collective_rpc(lambda w: w.model_runner.speculator.describe())[0])

    host = line(engines.get(speculative_config=speculative()))
    assert host.startswith(
        "AdaDecode: draft loop host (nothing to wait for on cpu), heads by torch (there is no "
        "Triton), CUDA graphs: none of ours (cudagraph_mode is NONE), adaptive draft length off, "
        "heads /"
    )
    assert "/adadecode after layers [2, 4, 6] of /" in host
    device = line(engines.get(speculative_config=DEVICE_LOOP))
    assert device.startswith("AdaDecode: draft loop device (as set), heads by torch")
    captured = line(get_graph_engine(engines, "device"))
    assert " verification passes and " in captured
    assert " steps of the draft loop, adaptive" in captured


def wrong(original: Any) -> Any:
    """The first tensor that it returns is larger by a hundredth."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return (found[0] * 1.01, *found[1:]) if isinstance(found, tuple) else found * 1.01

    return run


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no such kernel\nat device.cpp:7")


@pytest.mark.parametrize(
    ("holder", "name", "fault", "use", "said"),
    [
        (PaddedSpans, "run_span", wrong(PaddedSpans.run_span), [0, 0, 0, 1], "differs by"),
        (DeviceLoop, "start", broken, [0, 0, 0, 1], "no such kernel"),
        (HostLoop, "run", broken, [1, 0, 0, 0], "nothing is drafted, for no such kernel"),
        (
            VerificationForward,
            "_run_early",
            wrong(VerificationForward._run_early),
            [1, 0, 0, 0],
            "nothing is drafted, for states differ from all layers' by",
        ),
    ],
    ids=["states", "device loop", "host loop", "verification"],
)
def test_a_fault_is_told_and_output_is_vanillas(
    engines: EnginePool,
    prompts: list[str],
    holder: type,
    name: str,
    fault: Any,
    use: list[int],
    said: str,
) -> None:
    engine, vanilla = engines.get(speculative_config=DEVICE_LOOP), engines.get()
    with whole_again(engine):
        assert checked(engine) == ([True, False, False, True], [])
        with patch.object(holder, name, fault):
            found, lines = checked(engine)
            stats(engine, reset=True)
            outputs = generate(engine, prompts[:4], greedy(24))
        assert found == [bool(part) for part in use]
        assert len(lines) == 1
        assert said in lines[0]
        assert "\n" not in lines[0]
        assert_same(vanilla, outputs, generate(vanilla, prompts[:4], greedy(24)))
        assert (stats(engine)["draft_tokens"] > 0) == bool(use[3])


def test_captured_verifications_are_checked(engines: EnginePool) -> None:
    """What is not captured is kept."""
    engine = get_graph_engine(engines, "device")
    engine.collective_rpc(
        lambda worker: vars(worker.model_runner.speculator.ledger).pop("allowed", None)
    )
    with whole_again(engine):
        assert checked(engine) == ([True] * 4, [])
        fault = wrong(VerificationGraphs.replay_plan)
        with patch.object(VerificationGraphs, "replay_plan", fault):
            found, (line,) = checked(engine)
        assert found == [True, True, False, True]
        assert "verifications not captured; captured, states differ from all layers' by" in line
