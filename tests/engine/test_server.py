"""The method as users meet it: a real `vllm serve` process and its HTTP API, and the command line.

The server is the demo's, one for all tests of this module; the last of them stops it.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import Server, ServerError, free_port, vllm_command
from tests.support.engines import DEMO_MODEL

TOKENS = 48


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    # Drafts in every round, whatever other work makes them cost.
    method = json.dumps({"method": "adadecode", "cost_aware": False})
    # As of a model whose generation_config.json has it: every request that samples does.
    defaults = json.dumps({"min_p": 0.1})
    arguments = ["--speculative-config", method, "--override-generation-config", defaults]
    with Server(DEMO_MODEL, arguments, log) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def alone(server: Server, prompts: list[str]) -> list[list[int]]:
    """What each of 16 prompts gives when nothing else is running."""
    return [server.complete(prompt, TOKENS)["token_ids"] for prompt in prompts[:16]]


def stream(server: Server, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The first choice of each event of a streamed answer."""
    with server.client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[len("data: ") :])["choices"][0]


def counter(server: Server, name: str) -> float:
    """A vLLM counter as /metrics shows it."""
    text = server.client.get("/metrics").text
    found = re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
    assert found, f"/metrics has no {name}"
    return float(found[1])


def test_lists_its_model(server: Server) -> None:
    models = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["demo"]


def test_uses_the_method(server: Server) -> None:
    """The heads were found beside the model, and the log says what runs."""
    log = server.log.read_text()
    assert "AdaDecodeSpeculativeConfig(heads=" in log
    assert "logit lens" not in log


def test_streaming_is_the_same_text(server: Server, prompts: list[str]) -> None:
    body = {"model": "demo", "prompt": prompts[0], "max_tokens": TOKENS, "temperature": 0}
    whole = server.post("/v1/completions", body)["choices"][0]
    events = list(stream(server, "/v1/completions", body))
    assert "".join(event["text"] for event in events) == whole["text"]
    assert events[-1]["finish_reason"] == whole["finish_reason"]
    # Accepted drafts arrive together: fewer events than tokens.
    assert 1 < len(events) < TOKENS


def test_chat(server: Server, prompts: list[str]) -> None:
    """The demo's chat template is the bare message, so a chat continues it like a completion."""
    body: dict[str, Any] = {"model": "demo", "max_tokens": TOKENS, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": prompts[0]}]}
    answer = server.post("/v1/chat/completions", body | chat)["choices"][0]
    completion = server.post("/v1/completions", body | {"prompt": prompts[0]})["choices"][0]
    assert answer["message"]["content"] == completion["text"]
    deltas = stream(server, "/v1/chat/completions", body | chat)
    assert "".join(d["delta"].get("content") or "" for d in deltas) == completion["text"]


def test_sixteen_at_once(server: Server, prompts: list[str], alone: list[list[int]]) -> None:
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: server.complete(prompt, TOKENS), prompts[:16]))
    assert [choice["token_ids"] for choice in together] == alone


def test_named_tokens_and_changed_logits_at_once(server: Server, prompts: list[str]) -> None:
    """Log-probabilities of tokens that requests name, scoring, logit bias, the model's min_p."""
    named = {"logprob_token_ids": [300, 301], "return_tokens_as_token_ids": True}
    names = {"token_id:300", "token_id:301"}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 1, **named},
        {"temperature": 0, "logprobs": True, **named},
        {"temperature": 0, "logit_bias": {"300": 100}, "ignore_eos": True},
        {},
    ]
    scoring = {"query": prompts[0], "items": prompts[1:5], "label_token_ids": [300, 301]}

    def score() -> list[float]:
        return [item["score"] for item in server.post("/generative_scoring", scoring)["data"]]

    def ask(i: int) -> Any:
        if (kind := i % 5) == 4:
            return score()
        body = {"model": "demo", "max_tokens": TOKENS, "return_token_ids": True} | kinds[kind]
        if kind == 1:
            chat = {"messages": [{"role": "user", "content": prompts[i]}]}
            return server.post("/v1/chat/completions", body | chat)["choices"][0]
        return server.post("/v1/completions", body | {"prompt": prompts[i]})["choices"][0]

    alone = score()
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(20)))
    for completion in together[0::5]:
        logprobs = completion["logprobs"]
        assert len(logprobs["tokens"]) > 10
        for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
            assert top.keys() == {*names, token}
    for chat in together[1::5]:
        for position in chat["logprobs"]["content"]:
            assert {top["token"] for top in position["top_logprobs"]} == {
                *names,
                position["token"],
            }
    assert [biased["token_ids"] for biased in together[2::5]] == [[300] * TOKENS] * 4
    for scores in together[4::5]:
        assert scores == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"n": 0},
        {"max_tokens": 100_000},
        {"logprobs": -5},
        {"model": "another"},
        {"prompt": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_parameters_are_refused(server: Server, options: dict[str, Any]) -> None:
    body = {"model": "demo", "prompt": "import", "max_tokens": 4} | options
    answer = server.client.post("/v1/completions", json=body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert server.is_healthy()


def test_client_leaves_in_mid_stream(
    server: Server, prompts: list[str], alone: list[list[int]]
) -> None:
    """Requests are aborted with drafts pending; those that come after are not disturbed."""
    body = {"model": "demo", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    for prompt in prompts[:4]:
        events = stream(server, "/v1/completions", body | {"prompt": prompt})
        assert next(events)["finish_reason"] is None
        events.close()  # type: ignore[attr-defined]
    assert server.is_healthy()
    assert server.complete(prompts[0], TOKENS)["token_ids"] == alone[0]


def test_metrics_rise(server: Server, prompts: list[str]) -> None:
    names = ("drafts", "draft_tokens", "accepted_tokens")
    before = [counter(server, f"spec_decode_num_{name}") for name in names]
    counts = server.stats()
    server.complete(prompts[1], TOKENS)
    after = [counter(server, f"spec_decode_num_{name}") for name in names]
    assert all(a > b for a, b in zip(after, before, strict=True))
    # vLLM's counts and ours are of the same drafts.
    drafted = server.stats()["draft_tokens"] - counts["draft_tokens"]
    assert after[1] - before[1] == drafted


def test_metrics_by_exit_layer(server: Server, prompts: list[str]) -> None:
    def of_exits() -> dict[str, dict[str, float]]:
        """Our counters by exit layer, as the names that `adadecode_stats` gives them."""
        found: dict[str, dict[str, float]] = {}
        for metric in text_string_to_metric_families(server.client.get("/metrics").text):
            for sample in metric.samples:
                name = re.fullmatch(r"vllm:adadecode_(\w+)_total", sample.name)
                if name and "exit_layer" in sample.labels:
                    counts = found.setdefault(sample.labels["exit_layer"], {})
                    counts[name[1]] = sample.value
        return found

    def accepted() -> float:
        return sum(counts["accepted_tokens"] for counts in of_exits().values())

    # From the start of the server: whatever was aborted in between, nothing is counted twice or
    # lost on the way.
    assert of_exits() == server.stats()["exits"]
    ours, vllms = accepted(), counter(server, "spec_decode_num_accepted_tokens")
    server.complete(prompts[2], TOKENS)
    assert of_exits() == server.stats()["exits"]
    # vLLM leaves out what a step accepts for a request that ended meanwhile; here is none.
    rise = accepted() - ours
    assert rise == counter(server, "spec_decode_num_accepted_tokens") - vllms > 0
    assert counter(server, "adadecode_deferred_tokens") == server.stats()["deferred_tokens"] > 0


def test_ends_cleanly(server: Server) -> None:
    """The last test of the server: SIGTERM while a request runs; no process is left."""
    processes = server.processes()
    assert len(processes) > 1
    body = {"model": "demo", "prompt": "import", "max_tokens": 400, "ignore_eos": True}
    events = stream(server, "/v1/completions", body)
    assert next(events)
    so_far = len(server.log.read_text())
    assert server.process is not None
    server.process.terminate()
    # vLLM, with or without the method, may wait for as long as a client waits for it.
    events.close()  # type: ignore[attr-defined]
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    assert server.process.wait(5) in (0, -15)
    # The front end, where none of our code runs by then, may log that the engine is gone.
    log = server.log.read_text()[so_far:].splitlines()
    assert not [line for line in log if "Traceback" in line and "(APIServer" not in line]


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence_threshold": 2}, "confidence_threshold must lie in [0, 1], not 2"),
        ({"treshold": 0.5}, "speculative_config has unknown options for adadecode: treshold"),
    ],
    ids=["wrong", "unknown"],
)
def test_a_mistake_is_one_line(options: dict[str, Any], message: str) -> None:
    """Of the real command, without a stack of frames."""
    spec = json.dumps({"method": "adadecode"} | options)
    command = [vllm_command(), "serve", str(DEMO_MODEL), "--speculative-config", spec]
    command += ["--port", str(free_port())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    errors = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
    assert errors == ended.stderr.rstrip().splitlines()[-1:]
    assert errors[0].startswith(f"vllm: error: {message}")


def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    """By the demo: in a few lines, and soon."""
    with (
        Server(DEMO_MODEL, ["--no-such-flag"], tmp_path / "log") as server,
        pytest.raises(ServerError, match="no-such-flag") as caught,
    ):
        server.wait_until_ready(timeout=120)
    assert len(str(caught.value).splitlines()) <= 15
    assert server.processes() == []
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=5)
