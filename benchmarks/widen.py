"""Widens a small trained Llama to a given shape without changing what it computes.

    python -m benchmarks.widen SOURCE OUTPUT --shape 8b [--dtype DTYPE] [--num-hidden-layers N ...]

The result costs what a model of its shape costs and says what the small one says, so that speed can
be measured with real acceptance. Heads in SOURCE/adadecode are widened with it, and so are drafters
in SOURCE/medusa and SOURCE/draft. How it is done, and what is exact in which precision:
`benchmarks/widening`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import DownloadColumn

from benchmarks.arguments import make_parser
from benchmarks.widening.build import read_config, total_bytes, widen
from benchmarks.widening.shape import PRESETS, Shape
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.errors import AdaDecodeError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.widen", __doc__)
    parser.add_argument("source", type=Path, help="folder of the small model")
    parser.add_argument("output", type=Path, help="folder to make")
    presets = "; ".join(f"{name}: {shape}" for name, shape in PRESETS.items())
    parser.add_argument("--shape", choices=PRESETS, help=f"start from one of these. {presets}")
    for name in SIZES:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=positive, help="instead of the shape's or the source's")
    parser.add_argument(
        "--tie",
        action=argparse.BooleanOptionalAction,
        dest="tie_word_embeddings",
        help="whether LM head and embedding are one matrix",
    )
    parser.add_argument(
        "--grow-draft-vocab",
        action="store_true",
        help="let the heads' draft vocabulary keep its share of the tokens (default: its tokens)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the source's)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        config = read_config(options.source)
        start = PRESETS[options.shape] if options.shape else Shape.of(config)
        names = (*SIZES, "tie_word_embeddings")
        wide = start.change(**{name: getattr(options, name) for name in names})
        dtype = DTYPES[options.dtype] if options.dtype else config.dtype
        with counting(console, count=DownloadColumn()) as progress:
            task = progress.add_task("widening", total=total_bytes(wide, dtype))
            plan = widen(
                options.source,
                options.output,
                wide,
                dtype,
                lambda size: progress.advance(task, size),
                options.grow_draft_vocab,
            )
    except (AdaDecodeError, OSError) as error:
        print(f"widen: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("widen: interrupted, nothing written", file=sys.stderr)
        return 130
    print(f"{options.output}: {plan.wide}; {plan.wide.weights / 1e6:.0f} M weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
