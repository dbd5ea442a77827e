"""The cache of generations: what it never mixes, and how it survives an engine that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.training_samples import silent, tiny_target
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training import generate, generate_worker
from vllm_adadecode.training.generate import (
    GenerationSettings,
    Prompt,
    generate_sequences,
    generation_key,
)
from vllm_adadecode.training.sequences import Sequence, write_sequences

FAKE = "tests.support.fake_generate_worker"
PROMPTS: list[Prompt] = [((i, i + 1), "even" if i % 2 == 0 else "odd") for i in range(10)]
SETTINGS = GenerationSettings(max_tokens=4)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SHARD_PROMPTS", 4)
    monkeypatch.setattr(generate, "WORKER", FAKE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tiny_target(tmp_path / "target"))


def expected(shard: int = 4) -> list[Sequence]:
    return [Sequence(ids, (ids[0], i % shard), name) for i, (ids, name) in enumerate(PROMPTS)]


def shards(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.glob("*/0*"))


def run(target: str, cache: Path, settings: GenerationSettings = SETTINGS) -> list[Sequence]:
    return generate_sequences(target, PROMPTS, settings, cache, silent())


def test_order_and_sources_are_kept(target: str, tmp_path: Path) -> None:
    # A context of three tokens leaves room for one.
    found = run(target, tmp_path / "cache", replace(SETTINGS, engine={"max_model_len": 3}))
    assert found == [replace(s, output_ids=s.output_ids[:1]) for s in expected()]
    assert shards(tmp_path / "cache") == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]


def test_an_engine_that_dies_loses_one_shard(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FAKE_ENGINE", "die:2")
    with pytest.raises(AdaDecodeError, match=r"failed \(exit code 9\)") as caught:
        run(target, cache)
    assert "\n" not in str(caught.value)
    assert shards(cache) == ["00000.jsonl", "00001.jsonl"]
    # What is there is not made again: this engine would die at its second shard.
    kept = [p.stat().st_mtime_ns for p in sorted(cache.glob("*/0*"))]
    monkeypatch.setenv("FAKE_ENGINE", "die:1")
    assert run(target, cache) == expected()
    assert [p.stat().st_mtime_ns for p in sorted(cache.glob("*/0*"))][:2] == kept
    # With everything there, no engine is started at all.
    monkeypatch.setattr(generate, "WORKER", "no.such.module")
    assert run(target, cache) == expected()


def test_the_working_directory_is_no_place_for_modules(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "here")
    assert run(target, tmp_path / "cache") == expected()


@pytest.mark.parametrize(
    ("engine", "asked"),
    [
        ({}, {"max_model_len": -1, "gpu_memory_utilization": 0.2}),
        ({"gpu_memory_utilization": 0.5}, {"max_model_len": -1, "gpu_memory_utilization": 0.5}),
        (
            {"kv_cache_memory_bytes": 1 << 20, "max_model_len": 9},
            {"max_model_len": 9, "kv_cache_memory_bytes": 1 << 20},
        ),
    ],
)
def test_the_engine_takes_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], asked: dict[str, Any]
) -> None:
    import vllm.platforms
    from vllm.utils import cpu_resource_utils as resources

    memory = resources.MemoryNodeInfo(total_memory=800, available_memory=200)
    monkeypatch.setattr(resources, "get_memory_node_info", lambda node: memory)
    monkeypatch.setattr(
        vllm.platforms, "current_platform", SimpleNamespace(is_cpu=lambda: True), raising=False
    )
    assert generate_worker.engine_arguments({"engine": engine, "has_tokenizer": True}) == asked


def test_no_space_in_the_engine_s_process(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "full:1")
    with pytest.raises(OSError, match="No space left"):
        run(target, tmp_path / "cache")
    assert shards(tmp_path / "cache") == ["00000.jsonl"]
    assert not list((tmp_path / "cache").glob("*/.*"))


def test_the_engine_s_complaint_is_told(target: str, tmp_path: Path) -> None:
    refused = replace(SETTINGS, engine={"refuse": 1})
    with pytest.raises(AdaDecodeError, match="the engine does not like these arguments;") as caught:
        run(target, tmp_path / "cache", refused)
    assert "\n" not in str(caught.value)
    short = replace(SETTINGS, engine={"max_model_len": 2})
    with pytest.raises(AdaDecodeError, match="10 prompts are as long as the engine's context of 2"):
        run(target, tmp_path / "cache", short)


def test_what_the_key_depends_on() -> None:
    def key(digest: str = "a", prompts: list[Prompt] = PROMPTS, **changes: Any) -> str:
        return generation_key(digest, prompts, replace(SETTINGS, **changes))

    sampled: dict[str, Any] = {"temperature": 0.5}
    different = [
        key(),
        key("b"),
        key(prompts=PROMPTS[1:]),
        key(prompts=PROMPTS[::-1]),
        key(max_tokens=5),
        key(ignore_eos=True),
        key(engine={"dtype": "float32"}),
        key(**sampled),
        key(**sampled, seed=1),
        key(**sampled, top_p=0.5),
    ]
    assert len(set(different)) == len(different)
    # Greedy decoding draws nothing, and memory does not change tokens.
    assert key() == key(seed=1) == key(top_p=0.5) == key(engine={"max_model_len": 64})


def test_targets_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder with other weights is another target."""
    answer = 1

    def answers(job: dict[str, Any], progress: Any, task: Any) -> None:
        for shard in job["shards"]:
            made = [Sequence(tuple(ids), (answer,), name) for ids, name in shard["prompts"]]
            write_sequences(shard["file"], made)

    monkeypatch.setattr(generate, "_run_worker", answers)
    folder = tiny_target(tmp_path / "target")
    assert {s.output_ids for s in run(str(folder), tmp_path / "cache")} == {(1,)}
    answer = 2
    assert {s.output_ids for s in run(str(folder), tmp_path / "cache")} == {(1,)}
    tiny_target(tmp_path / "other", initializer_range=0.02)
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    assert {s.output_ids for s in run(str(folder), tmp_path / "cache")} == {(2,)}


def test_the_worker_ends_with_the_one_who_asked(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "hang")
    worker = subprocess.Popen(
        [sys.executable, "-m", FAKE], stdin=subprocess.PIPE, env=dict(os.environ)
    )
    shard = {"file": str(tmp_path / "s"), "first": 0, "prompts": PROMPTS}
    job: dict[str, Any] = {"target": target, "engine": {}, "has_tokenizer": True}
    job |= {"sampling": SETTINGS.sampling(), "shards": [shard]}
    try:
        # Closes stdin, as the end of a process does.
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=0)
        worker.communicate((json.dumps(job) + "\n").encode(), timeout=300)
        assert worker.returncode == 1
    finally:
        worker.kill()
    assert not (tmp_path / "s").exists()
