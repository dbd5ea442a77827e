"""Model Runner V2 on a CPU, end to end: its outputs against those of vLLM's V1 runner."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.cpu.tiny_model import save_tiny_model
from vllm_adadecode.cpu.install import import_replacements

ROOT = Path(__file__).parents[2]

# Sums of fp32 terms in another order.
LOGPROB_TOLERANCE = 1e-3

Outputs = dict[str, Any]
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # A function that looks into the worker.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


def _run(model: Path, *arguments: str, **environment: str) -> Outputs:
    out = model / "outputs.json"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_USE", "TRITON"))}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cpu.engine", str(model), str(out), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, **ENVIRONMENT, **environment},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    outputs = json.loads(out.read_text())
    assert isinstance(outputs, dict)
    return outputs


# vLLM's own choice, with the plugin installed.
@pytest.fixture(scope="module")
def v1(model: Path) -> Outputs:
    outputs = _run(model, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert not outputs["v2"]
    return outputs


# As installed: engine and worker in processes of their own. And in one process, without Triton.
@pytest.fixture(
    scope="module", params=[pytest.param("processes", marks=pytest.mark.slow), "without-triton"]
)
def v2(model: Path, request: pytest.FixtureRequest) -> Outputs:
    if request.param == "processes":
        outputs = _run(model, VLLM_USE_V2_MODEL_RUNNER="1")
    else:
        outputs = _run(
            model,
            "--without-triton",
            VLLM_USE_V2_MODEL_RUNNER="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        )
        assert not outputs["triton"]
    assert outputs["v2"], "the plugin is not active: is the package installed?"
    return outputs


def test_plain_vllm_is_left_alone(model: Path, v1: Outputs) -> None:
    """With the plugin and without it: the same runner, the same kernels, the same output."""
    without = _run(model, VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert v1["plugin"]
    assert without["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert without == {**v1, "plugin": False}


def test_kernels_are_replaced_where_it_was_asked_for(v1: Outputs, v2: Outputs) -> None:
    assert v2["runner"] == "vllm.v1.worker.cpu.model_runner"
    added = set(v2["replaced"]) - set(v1["replaced"])
    assert added == import_replacements().keys()


def _tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["tokens"] for output in outputs]


def test_greedy_tokens_equal_the_v1_runners(v1: Outputs, v2: Outputs) -> None:
    greedy = [name for name in v1 if name.startswith("greedy")]
    assert {n: _tokens(v2[n]) for n in greedy} == {n: _tokens(v1[n]) for n in greedy}
    # A feature that did nothing would agree as well.
    changed = [n for n in greedy if _tokens(v2[n]) != _tokens(v2["greedy"])]
    assert set(changed) == set(greedy) - {"greedy", "greedy log-probabilities"}


@pytest.mark.parametrize("kind", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_equal_the_v1_runners(v1: Outputs, v2: Outputs, kind: str) -> None:
    for expected, found in zip(
        v1["greedy log-probabilities"], v2["greedy log-probabilities"], strict=True
    ):
        assert len(expected[kind]) == len(found[kind])
        for at_v1, at_v2 in zip(expected[kind], found[kind], strict=True):
            if at_v1 is None:
                assert at_v2 is None
                continue
            assert at_v2.keys() == at_v1.keys()
            for token, (logprob, rank) in at_v1.items():
                assert at_v2[token][0] == pytest.approx(logprob, abs=LOGPROB_TOLERANCE)
                assert at_v2[token][1] == rank


def test_structured_output(v2: Outputs) -> None:
    for output in v2["greedy regex"]:
        assert re.fullmatch("[0-9]{3}-[a-f]{5}", output["text"])


def test_seeded_sampling_does_not_depend_on_the_batch(v2: Outputs) -> None:
    assert _tokens(v2["seeded alone"]) == _tokens(v2["seeded"])
    assert _tokens(v2["seeded"]) != _tokens(v2["greedy"])
    assert _tokens(v2["unseeded"]) != _tokens(v2["seeded"])


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return {}


def test_seeded_sampling_does_not_depend_on_the_process(v2: Outputs, seen: dict[str, Any]) -> None:
    found = {name: _tokens(v2[name]) for name in v2 if name.startswith("seeded")}
    assert seen.setdefault("tokens", found) == found


def test_top_k_keeps_to_the_most_likely(v2: Outputs) -> None:
    for output in v2["seeded all"]:
        ranks = [at[str(t)][1] for t, at in zip(output["tokens"], output["logprobs"], strict=True)]
        assert max(ranks) > 1
