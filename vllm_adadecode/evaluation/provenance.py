"""What a result was made with and on: written next to every number."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adadecode import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "numpy")


def provenance() -> dict[str, Any]:
    """The command, the versions and the processor of this process."""
    versions = {"vllm-adadecode": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
        "processor": cpu(),
    }


def cpu() -> str:
    """The processor's name and the cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def processor(device: torch.device) -> str:
    """The name of what a device is."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu()
