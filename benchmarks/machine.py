"""What a measurement was made on and with: written next to every result."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_adadecode.training.provenance import git_revision, versions


def record() -> dict[str, Any]:
    """Command, commit, versions and machine, JSON-ready."""
    return {
        "command": command(),
        "git": git_revision(),
        "versions": versions(),
        "machine": machine(),
    }


def command() -> str:
    """The running command, as it can be given again in a checkout."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = (
        ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
    )
    return shlex.join([*program, *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """The processor, the cores that this process may use, and the GPUs if there are any."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpus": gpus()}


def gpus() -> list[str]:
    """Names of the GPUs that answer; found without loading anything that would use them."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.splitlines() if found.returncode == 0 else []
