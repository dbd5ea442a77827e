"""The options of ``adadecode train`` by group.

Owns no meaning: `train.py` makes a request of them.
"""

from __future__ import annotations

import argparse
from typing import Any

from vllm_adadecode.cli.arguments import json_object, positive, share


def add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SPEC",
        help=".jsonl (fields prompt, messages, text, or prompt_ids with output_ids), .txt (a "
        "prompt a line), xsum, code or gsm8k (the paper's), or a hub data set NAME[@CONFIG]:SPLIT",
    )
    group.add_argument("--field", metavar="NAME", help="field of the prompt, if it has another")
    group.add_argument(
        "--chat", action="store_true", help="put prompts into the target's chat template"
    )
    group.add_argument(
        "--skip-malformed", action="store_true", help="leave malformed lines out, do not refuse"
    )
    group.add_argument("--max-records", type=positive, metavar="N", help="of each data set")
    group.add_argument(
        "--max-prompt-tokens",
        type=positive,
        default=1024,
        metavar="N",
        help="longer prompts are left out",
    )
    group.add_argument(
        "--max-length", type=positive, default=2048, metavar="N", help="tokens of a sequence"
    )
    group.add_argument(
        "--held-out", type=share, default=0.05, metavar="SHARE", help="not trained on"
    )
    group.add_argument(
        "--outputs-only", action="store_true", help="do not learn at positions inside of prompts"
    )


def add_generation(group: Any) -> None:
    group.add_argument(
        "--generate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the target continue the prompts, with vLLM; else take the data as it is",
    )
    group.add_argument(
        "--max-tokens", type=positive, default=512, metavar="N", help="of a continuation"
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    group.add_argument("--top-p", type=float, default=1.0, help="at a temperature above 0")
    group.add_argument("--ignore-eos", action="store_true", help="go on behind the end of text")
    group.add_argument(
        "--engine-args",
        dest="engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="more arguments of vllm.LLM, e.g. '{\"tensor_parallel_size\": 4}'",
    )


def add_heads(group: Any) -> None:
    group.add_argument(
        "--exit-layers",
        type=int,
        nargs="+",
        metavar="E",
        help="heads sit after so many layers (default: 1/4, 1/2 and 3/4 of the depth)",
    )
    group.add_argument(
        "--transform",
        choices=("full", "low_rank", "identity"),
        default="full",
        help="T of a head; full is the paper's",
    )
    group.add_argument("--rank", type=positive, help="of low_rank (default: 64)")
    group.add_argument(
        "--norm",
        choices=("before", "after"),
        default="after",
        help="where the target's final norm is applied, relative to T",
    )
    group.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.75,
        help="draft where a head's confidence is above it",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=positive,
        default=5,
        metavar="K",
        help="draft tokens at most",
    )
    group.add_argument("--gate", action="store_true", help="predict where a head is confident")
    group.add_argument(
        "--draft-vocab",
        dest="draft_vocab_size",
        type=positive,
        metavar="N",
        help="predict the N most frequent tokens only",
    )
    group.add_argument(
        "--lm-head-quantization", choices=("int8",), help="of the heads' copy of the LM head"
    )


def add_training(group: Any) -> None:
    group.add_argument(
        "--loss-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="below 1 heads learn a sharper final distribution",
    )
    group.add_argument("--learning-rate", type=float, default=1e-3, help="the highest; cosine")
    group.add_argument("--epochs", type=float, default=4.0, help="passes over the data")
    group.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="sequences of a step"
    )
    group.add_argument(
        "--micro-batch-tokens", type=positive, default=8192, metavar="N", help="of a forward pass"
    )
    group.add_argument(
        "--eval-every",
        type=positive,
        metavar="N",
        help="steps between evaluations (default: a tenth of all)",
    )
    group.add_argument(
        "--patience",
        type=positive,
        default=3,
        metavar="N",
        help="evaluations without a better one",
    )
    group.add_argument("--checkpoint-every", type=positive, default=100, metavar="N", help="steps")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of products; auto is bf16 on a GPU, fp32 without one",
    )
    group.add_argument(
        "--device-map", help='"auto" spreads a large target over all devices, with accelerate'
    )
