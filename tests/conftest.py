"""Fixtures shared by the tests: one pool of real engines, and the demo's prompts."""

import json
import os
from collections.abc import Iterator

import pytest

# Before vLLM is imported, here and in the processes that tests start.
os.environ.setdefault("VLLM_ADADECODE_CHECK_KV", "1")
# Engines in the test's own process start in a second and can be looked into. What needs processes
# is tested with the real server (test_server.py).
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# The models are tiny: a second thread gains nothing and spins when something else wants its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.support.engines import DEMO_MODEL, EnginePool


@pytest.fixture(scope="session")
def engines() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Held-out and trained prompts of the demo target, in turn."""
    data = json.loads((DEMO_MODEL.parent / "prompts.json").read_text())
    held_out, trained = (
        [p["text"] for p in data if p["files"] == files] for files in ("held_out", "second_stage")
    )
    return [text for pair in zip(held_out, trained, strict=True) for text in pair]
