"""Widens a small trained Llama to a given shape without changing what it computes.

    python -m benchmarks.widen SOURCE OUTPUT --shape 8b [--dtype DTYPE] [--grow-draft-vocab]

The result costs what a model of its shape costs and says what the small one says, so that speed can
be measured with real acceptance. Heads in SOURCE/adadecode are widened with it. How it is done, and
what is exact in which precision: `benchmarks/widen/__init__.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.arguments import make_parser, run
from benchmarks.widen.build import widen_shown
from benchmarks.widen.plan import PRESETS
from vllm_adadecode.cli.progress import counting

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build(options: argparse.Namespace) -> int:
    wide = PRESETS[options.shape]
    dtype = DTYPES.get(options.dtype)
    with counting(Console(stderr=True)) as progress:
        widen_shown(progress, options.source, options.output, wide, dtype, options.grow_draft_vocab)
    print(f"{options.output}: {wide}; {wide.weights / 1e6:.0f} M weights")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("benchmarks.widen", __doc__)
    parser.add_argument("source", type=Path, help="folder of the small model")
    parser.add_argument("output", type=Path, help="folder to make")
    presets = "; ".join(f"{name}: {shape}" for name, shape in PRESETS.items())
    parser.add_argument("--shape", choices=PRESETS, required=True, help=f"of these: {presets}")
    parser.add_argument(
        "--grow-draft-vocab",
        action="store_true",
        help="let the heads' draft vocabulary keep its share of the tokens (default: its tokens)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the source's)")
    options = parser.parse_args(argv)
    return run("widen", lambda: build(options), "nothing written")


if __name__ == "__main__":
    sys.exit(main())
