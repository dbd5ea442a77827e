"""Each program in examples/ runs as its first lines say, and shows what it promises."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engines import DEMO_MODEL
from vllm_adadecode.heads import HeadsConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 39


def run(name: str, *arguments: str | Path, cache: Path, one_process: bool = False) -> str:
    """What an example prints.

    Args:
        one_process: whether the engine is in the example's own, which starts sooner.
    """
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not one_process)),
        "NO_PROXY": "127.0.0.1",
        "XDG_CACHE_HOME": str(cache),
    }
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cache,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def acceptance_length(printed: str) -> float:
    found = re.search(r"mean acceptance length: (\d+\.\d+)", printed)
    assert found, printed
    return float(found[1])


def test_offline_generation(tmp_path: Path) -> None:
    printed = run("offline_generation.py", cache=tmp_path, one_process=True)
    assert printed.count("\n--- '") + printed.startswith("--- '") == 2
    # Adaptive draft length may find that drafting does not pay on this machine.
    assert acceptance_length(printed) >= 1.0


@pytest.mark.slow
def test_compare_methods(tmp_path: Path) -> None:
    printed = run("compare_methods.py", cache=tmp_path)
    assert "identical outputs: 8 of 8" in printed
    assert acceptance_length(printed) > 1.5


@pytest.mark.slow
def test_server_and_client(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    printed = run("server_and_client.py", DEMO_MODEL, port, cache=tmp_path)
    # The text of the answer, after the log of the server's start.
    assert len(printed.splitlines()[-1]) > 0
    assert 'POST /v1/completions HTTP/1.1" 200 OK' in printed


@pytest.mark.slow
def test_train_heads(tmp_path: Path) -> None:
    printed = run("train_heads.py", tmp_path / "heads", cache=tmp_path)
    assert "held-out positions" in printed
    config = HeadsConfig.load(tmp_path / "heads")
    assert (config.gate, config.draft_vocab_size) == (True, 1024)
    assert config.target.fingerprint is not None


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_short_and_has_a_test(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
    assert f"test_{path.stem}" in globals()
