"""Fixtures shared by the tests: one pool of real engines, and the demo's prompts.

Also the report of a run on how many engines it started, with which options.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import tests.support.environment  # noqa: F401  (before vLLM)
from tests.support.engines import DEMO_MODEL, EnginePool

# In each process of a run; in the one that reports, of all.
STARTED: Counter[str] = Counter()


@pytest.fixture(scope="session")
def engines() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    STARTED.update(pool.started)
    pool.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["engines_started"] = dict(STARTED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    STARTED.update(getattr(node, "workeroutput", {}).get("engines_started", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Engines are what a run's time goes into: tests should share them."""
    if STARTED:
        terminalreporter.section(f"{STARTED.total()} engines, {len(STARTED)} kinds", sep="-")
        for options, count in STARTED.most_common():
            terminalreporter.line(f"{count:4} {options}")


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Held-out and trained prompts of the demo target, in turn."""
    data = json.loads((DEMO_MODEL.parent / "prompts.json").read_text())
    held_out, trained = (
        [p["text"] for p in data if p["files"] == files] for files in ("held_out", "second_stage")
    )
    return [text for pair in zip(held_out, trained, strict=True) for text in pair]
