"""Bandwidth of a copy on the device, as JSON on stdout: what reading weights can't beat.

    python -m benchmarks.gpu_suite.bandwidth cuda

In a process of its own, which gives its memory back.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

# More than any cache holds.
SIZES = {"cuda": 2 << 30, "cpu": 64 << 20}
REPEATS = 5


def measure(device: str) -> dict[str, float]:
    """Bytes read and written in a second, and those that were moved."""
    source = torch.ones(SIZES[device] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device == "cuda":
        from benchmarks.gpu import median_ms

        seconds = median_ms([lambda: target.copy_(source)]) / 1e3
    else:
        seconds = statistics.median(_seconds(target, source) for _ in range(REPEATS))
    return {"bytes_per_second": SIZES[device] / seconds, "bytes": SIZES[device]}


def _seconds(target: torch.Tensor, source: torch.Tensor) -> float:
    begin = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
