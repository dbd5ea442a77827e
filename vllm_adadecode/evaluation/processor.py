"""The name of what costs were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


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
        return torch.cuda.get_device_name(device)
    return cpu()
