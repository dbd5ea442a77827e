"""The demo's heads: their data, made here; their training and settings, the package's own.

What `adadecode train` and `adadecode calibrate` would do on the command line, in one go, so that
the shipped heads are what a user of these commands gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.demo.recipe import HeadRecipe, Recipe
from benchmarks.demo.stages import Tokens, native_bf16, rows_at
from vllm_adadecode.evaluation import report
from vllm_adadecode.evaluation.calibrate import Calibration, calibrate
from vllm_adadecode.evaluation.costs import choose_costs
from vllm_adadecode.evaluation.data import DataSet, continue_prompts
from vllm_adadecode.evaluation.publish import card_section, publish
from vllm_adadecode.evaluation.session import Session, open_session
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.training.card import CARD_NAME, make_card
from vllm_adadecode.training.request import DataSettings, HeadSettings, Request
from vllm_adadecode.training.run import run_training
from vllm_adadecode.training.sequences import Sequence as TokenSequence
from vllm_adadecode.training.trainer import TrainSettings

NEW_TOKENS = 128
GENERATED_TOGETHER = 128


def windows(tokens: Tokens, count: int, length: int, seed: int) -> torch.Tensor:
    """[count, length], drawn anywhere in `tokens`."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return rows_at(tokens, starts, length)


@torch.no_grad()
def generate(model: Any, rows: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy, a batch of equally long prompts; an end-of-text token does not end a row."""
    cache, newest, columns = None, rows, [rows]
    for _ in range(new_tokens):
        out = model(newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, newest = out.past_key_values, out.logits[:, -1:].argmax(-1)
        columns.append(newest)
    return torch.cat(columns, 1)


def make_sequences(
    model: Any, tokens: Mapping[str, Tokens], recipe: HeadRecipe, seed: int, show: Progress
) -> list[TokenSequence]:
    """What heads learn from: rows of each of the sets, and what the target makes of prompts."""
    found = []
    prompt = recipe.length // 4
    starts = [windows(ids, recipe.generations // 2, prompt, seed) for ids in tokens.values()]
    parts = torch.cat(starts).split(GENERATED_TOGETHER)
    for part in show.track(parts, description="text of the target's own"):
        for row in generate(model, part, recipe.length - prompt).tolist():
            found.append(TokenSequence(tuple(row[:prompt]), tuple(row[prompt:]), "own"))
    for name, ids in tokens.items():
        for row in windows(ids, recipe.text // 2, recipe.length, seed + 1).tolist():
            found.append(TokenSequence((), tuple(row), name))
    return found


def train_heads(
    target: Path, output: Path, sequences: Path, recipe: Recipe, cache: Path, show: Progress
) -> HeadsConfig:
    """`adadecode train`; goes on where it was if it was killed."""
    heads = recipe.heads
    request = Request(
        target=str(target),
        output=output,
        data=DataSettings((str(sequences),), generate=False, max_length=heads.length),
        cache=cache,
        heads=HeadSettings(
            exit_layers=recipe.exit_layers,
            norm=heads.norm,
            gate=heads.gate,
            draft_vocab_size=heads.draft_vocab_size,
        ),
        training=TrainSettings(
            loss_temperature=heads.temperature,
            learning_rate=heads.rate,
            epochs=heads.epochs,
            seed=recipe.seed,
        ),
        target_name="..",
        precision="bf16" if native_bf16() else "fp32",
    )
    return run_training(request, show)


def choose_setting(
    session: Session,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    recipe: HeadRecipe,
    show: Progress,
) -> Calibration:
    """`adadecode calibrate` on the target's continuations of `prompts`, by set of files."""
    task = show.add_task("choosing settings", total=sum(map(len, prompts.values())))
    sets = []
    for name, ids in prompts.items():
        continued = continue_prompts(
            session.target, ids, NEW_TOKENS, name, lambda n: show.advance(task, n)
        )
        sets.append(DataSet(name, tuple(s for s in continued if len(s.output_ids) > 1)))
    costs = choose_costs("bytes", session.config, session.target, session.readout)
    costs = costs.model_copy(update={"verification": recipe.round_cost})
    traces = session.traces(sets)
    return calibrate(
        traces,
        costs,
        session.setting,
        session.readout.has_gate,
        recipe.least_acceptance,
        recipe.most_drafts,
    )


def make_heads(
    target: Path,
    sequences: Path,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    recipe: Recipe,
    made_with: Mapping[str, Any],
    cache: Path,
    show: Progress,
) -> Session:
    """Trained heads with chosen settings in `target`/adadecode, ready to be asked."""
    folder = target / "adadecode"
    config = train_heads(target, folder, sequences, recipe, cache, show)
    session = open_session(str(folder), str(target), "float32")
    found = choose_setting(session, prompts, recipe.heads, show)
    exits = session.config.exit_layers
    result = report.calibration_json(found, exits)
    result |= {"data": list(prompts), "made_with": dict(made_with)}
    told = _told(config, made_with)
    publish(replace(session, config=told), found.setting, folder, result)
    # What the card says of held-out data is of the setting before.
    card = make_card(told).rstrip() + "\n" + card_section(result)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    show.console.print(report.setting_line(found.setting, exits), markup=False)
    return open_session(str(folder), str(target), "float32")


def _told(config: HeadsConfig, made_with: Mapping[str, Any]) -> HeadsConfig:
    """The provenance in terms of the demo: the folders it was made in mean nothing elsewhere."""
    trained = config.provenance
    settings = {k: v for k, v in trained["settings"].items() if k != "data"}
    data = {k: v for k, v in trained["data"].items() if k != "from"}
    provenance = dict(made_with) | {"target": "..", "text": data, "settings": settings}
    provenance |= {k: trained[k] for k in ("steps", "held_out")}
    return HeadsConfig(**(config.model_dump() | {"provenance": provenance}))
