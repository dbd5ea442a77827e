"""The data of the paper, one name each: XSum, code (MBPP, HumanEval) and GSM8K.

Owns which rows they are and how a row becomes a prompt. The counts are the paper's (arXiv
2506.03700, section "Experiments"); it does not print its prompts, these are the usual zero-shot
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Rows of one split of a hub data set.

    Attributes:
        path, config, split: as `datasets.load_dataset` takes them.
        form: the prompt of a row.
        count: the first so many rows; None: all.
    """

    path: str
    config: str | None
    split: str
    form: Callable[[Mapping[str, Any]], str]
    count: int | None = None


def _xsum(row: Mapping[str, Any]) -> str:
    return f"Article: {row['document'].strip()}\n\nSummary in one sentence:"


def _mbpp(row: Mapping[str, Any]) -> str:
    # The task and one of its tests in a docstring, the form that models without examples get.
    return f'"""\n{row["text"].strip()}\n{row["test_list"][0].strip()}\n"""\n'


def _humaneval(row: Mapping[str, Any]) -> str:
    prompt: str = row["prompt"]
    return prompt


def _gsm8k(row: Mapping[str, Any]) -> str:
    return f"Question: {row['question'].strip()}\nAnswer:"


_MBPP, _GSM8K, _XSUM = "google-research-datasets/mbpp", "openai/gsm8k", "EdinburghNLP/xsum"

PAPER_SETS: dict[str, dict[str, tuple[Part, ...]]] = {
    "xsum": {
        "train": (Part(_XSUM, None, "train", _xsum, 10_000),),
        "test": (Part(_XSUM, None, "test", _xsum, 1_000),),
    },
    # HumanEval has no rows to train on: the paper trains on all 974 of MBPP.
    "code": {
        "train": (Part(_MBPP, "full", "train+validation+test+prompt", _mbpp),),
        "test": (Part("openai/openai_humaneval", None, "test", _humaneval),),
    },
    "gsm8k": {
        "train": (Part(_GSM8K, "main", "train", _gsm8k),),
        "test": (Part(_GSM8K, "main", "test", _gsm8k, 1_000),),
    },
}
