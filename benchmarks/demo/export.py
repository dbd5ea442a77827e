"""Writes the trained demo target as a Hugging Face folder with its model card."""

from __future__ import annotations

import copy
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks.demo.corpus import (
    END_OF_TEXT,
    HEADS_CHOOSE_FILES,
    HEADS_MEASURE_FILES,
    Corpus,
)
from benchmarks.demo.evaluate import NAMES, rows
from benchmarks.demo.heads import NEW_TOKENS
from benchmarks.demo.measure import Report
from benchmarks.demo.recipe import Recipe
from benchmarks.machine import git_revision
from vllm_adadecode.evaluation import report
from vllm_adadecode.evaluation.session import Session

# The target only continues text: a chat is the text of its messages.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

CARD = """---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: code
library_name: transformers
tags: [llama, adadecode, speculative-decoding]
---

# The demo target

A Llama of {millions:.1f} M parameters ({layers} layers of {hidden}, vocabulary {vocab}) with
AdaDecode heads in `adadecode/`. It continues Python in the manner of the standard library, and
exists so that every part of vllm-adadecode can be tried and tested with real weights on any
machine. It is no useful language model: it knows {second} files nearly by heart and little else.

`python -m benchmarks.demo.train` makes this folder, from the standard library of the Python that
runs it; with {minutes:.0f} minutes of CPU time where this was made. Nothing is downloaded.

## Recipe

1. Byte-level BPE of {vocab} tokens, trained on the {train} training files. By a hash of its path,
   one file in twenty is held out: no training step of any part sees it.
2. {stages}
3. Heads: a full matrix per exit layer with the target's norm {norm}, trained to the last layer's
   distribution at temperature {temperature}, on text and on the target's own generations, with a
   gate each and a draft vocabulary of {draft_vocab} tokens (`adadecode train`).
4. Thresholds and K are those that pay best on files that neither the heads nor the figures below
   have seen, with at least {acceptance:.0%} of drafts accepted there (`adadecode calibrate`):
   {setting}.

The heads learn nothing of {left_out} files of the second stage; `make heads-report` measures on
some of these. Other kinds of heads that were tried: `docs/evaluation.md` of the repository.

Loss (nats a token) after the exits {exits} and at the last layer:

{losses}

## Measured

`python -m benchmarks.demo.evaluate`: greedy, {new} new tokens for each of {prompts} prompts;
simulated from the heads' real guesses. The held-out files are not those that chose the setting.

{measured}

## Made with

{provenance}

The training text is Python's standard library, under the PSF licence.
"""


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(recipe: Recipe, corpus_digest: str) -> dict[str, Any]:
    """The command, the versions and the commit; the corpus is named by its digest."""
    return {
        "command": "python -m benchmarks.demo.train" + " --plain" * (recipe == recipe.plain()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "data": f"standard library of Python {sys.version_info[0]}.{sys.version_info[1]}",
        "data_sha1": corpus_digest,
        "heads_left_out": [*HEADS_CHOOSE_FILES, *HEADS_MEASURE_FILES],
        "git": git_revision(),
        "recipe": asdict(recipe),
    }


def card(
    session: Session,
    recipe: Recipe,
    corpus: Corpus,
    losses: Mapping[str, list[float]],
    measured: Mapping[str, Report],
    made_with: Mapping[str, Any],
    minutes: float,
) -> str:
    stages = "; then ".join(
        f"{s.epochs:g} epochs on {len(getattr(corpus, s.files))} files in rows of {s.length}"
        + (
            f" with cross-entropy at every exit layer, weight {s.exit_weight:g}"
            * (s.exit_weight > 0)
        )
        for s in recipe.stages
    )
    return CARD.format(
        millions=session.target.model.num_parameters() / 1e6,
        layers=recipe.shape.num_hidden_layers,
        hidden=recipe.shape.hidden_size,
        vocab=recipe.shape.vocab_size,
        second=len(corpus.second_stage),
        train=len(corpus.train),
        minutes=minutes,
        stages=f"Trained with Muon and AdamW: {stages}.",
        norm=f"{recipe.heads.norm} it",
        temperature=f"{recipe.heads.temperature:g}",
        draft_vocab=recipe.heads.draft_vocab_size or recipe.shape.vocab_size,
        acceptance=recipe.heads.least_acceptance,
        setting=report.setting_line(session.setting, recipe.exit_layers),
        left_out=len(HEADS_CHOOSE_FILES + HEADS_MEASURE_FILES),
        exits=", ".join(map(str, recipe.exit_layers)),
        losses=markdown(
            ["text", *(f"layer {e}" for e in recipe.exit_layers), "last"],
            [[name, *(f"{x:.2f}" for x in values)] for name, values in losses.items()],
        ),
        new=NEW_TOKENS,
        prompts=sum(r.prompts for r in measured.values()),
        measured=markdown(["", *(NAMES[name] for name in measured)], rows(measured)),
        provenance="\n".join(f"- {k}: `{v}`" for k, v in made_with.items() if k != "recipe"),
    )


def export(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Puts the target into an empty `folder`; in float32 `model` stays what it is."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
