"""``python -m benchmarks.demo.train``: makes the demo target and its heads from nothing.

A killed run goes on where it was when started again: unfinished work is kept in ``.demo-build/``.
The model folder is replaced only when everything has been made.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.demo import corpus as text
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.export import card, export, provenance
from benchmarks.demo.files import write_file, write_folder
from benchmarks.demo.heads import Heads, train_heads
from benchmarks.demo.measure import NEW_TOKENS, Report, generate, generations, report, report_sets
from benchmarks.demo.recipe import Recipe
from benchmarks.demo.stages import Tokens, new_model, rows_at, text_loss, train_target

HERE = Path(__file__).parent
CHOOSING_PROMPTS = 64


def windows(tokens: Tokens, count: int, length: int, seed: int) -> torch.Tensor:
    """[count, length], drawn anywhere in `tokens`."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return rows_at(tokens, starts, length)


def make_heads(
    model: Any, tokens: dict[str, Tokens], choosing: list[list[int]], recipe: Recipe, show: Progress
) -> tuple[Heads, dict[str, Report]]:
    """The best of the trained variants and the identity, and what all of them reached."""
    half, length = recipe.heads.generations // 2, recipe.heads.length
    sets = ("heads_train", "heads_second_stage")
    prompt = length // 4
    show.console.print("heads: generating text of the target's own")
    starts = [windows(tokens[f], half, prompt, recipe.seed) for f in sets]
    own = generate(model, torch.cat(starts), length - prompt)
    plain = [windows(tokens[f], 512, length, recipe.seed + 1) for f in sets]
    args = (torch.cat(plain), own, recipe.exit_layers, recipe.heads, recipe.seed, show)
    candidates = [Heads(recipe.exit_layers), *train_heads(model, *args)]

    written = generations(model, choosing, NEW_TOKENS)
    reports = {heads.name: report(model, heads, written) for heads in candidates}
    for name, r in reports.items():
        show.console.print(
            f"heads: {name}: {r.tokens_per_verification:.2f} tokens a verification, "
            f"{r.layer_passes_per_token:.3f} layer passes a token"
        )
    best = min(candidates, key=lambda heads: reports[heads.name].layer_passes_per_token)
    return best, reports


def run(
    recipe: Recipe,
    corpus: text.Corpus,
    build: Path,
    model_folder: Path,
    prompts_file: Path,
    show: Progress,
) -> None:
    """Everything, from text to the two outputs."""
    started = time.process_time()
    digest = text.digest(corpus)
    show.console.print(
        f"{len(corpus.train)} files to train on, {len(corpus.second_stage)} of them in the second "
        f"stage, {len(corpus.held_out)} held out"
    )
    tokenizer = text.train_tokenizer((s.text for s in corpus.train), recipe.shape.vocab_size)
    tokens = {
        name: text.encode(tokenizer, getattr(corpus, name))
        for name in ("train", "second_stage", "held_out")
    }
    tokens_for_heads = {
        f"heads_{name}": text.encode(tokenizer, corpus.for_heads(name))
        for name in ("train", "second_stage")
    }
    torch.manual_seed(recipe.seed)
    model = new_model(recipe.shape)
    preparing = time.process_time() - started
    training = train_target(model, tokens, recipe, digest, build, show)
    trained = time.process_time()

    # From here on, the weights that will be stored. Parameters only: model.to() would also round
    # the rotary frequencies, which a loaded model computes afresh.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.eval()
    losses = {name: text_loss(model, ids, recipe.exit_layers) for name, ids in tokens.items()}
    for name, values in losses.items():
        show.console.print(f"loss on {name}: " + " ".join(f"{x:.3f}" for x in values))
    choosing_files, _ = demo_prompts.split_held_out(corpus)
    choosing = demo_prompts.draw(
        tokenizer, choosing_files, "held_out", CHOOSING_PROMPTS, recipe.seed + 2
    )
    choosing_ids = demo_prompts.encoded_sets(choosing, tokenizer)["held_out"]
    heads, variants = make_heads(model, tokens_for_heads, choosing_ids, recipe, show)
    prompts = demo_prompts.demo_prompts(tokenizer, corpus, seed=recipe.seed)
    measured = report_sets(model, heads, demo_prompts.encoded_sets(prompts, tokenizer))

    made_with = provenance(recipe, digest)
    minutes = (preparing + training + time.process_time() - trained) / 60
    readme = card(model, recipe, corpus, variants, losses, measured, made_with, minutes)
    write_file(
        prompts_file, lambda path: path.write_text(demo_prompts.dump(prompts), encoding="utf-8")
    )
    with write_folder(model_folder, scratch=build) as folder:
        export(folder, model, tokenizer, heads, readme, made_with)
    show.console.print(f"written: {model_folder} ({heads.name} heads), {minutes:.0f} CPU minutes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.train", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build", type=Path, default=HERE.parents[1] / ".demo-build")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder to write")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.json", help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as show:
        run(Recipe(), text.load_corpus(), args.build, args.model, args.prompts, show)


if __name__ == "__main__":
    main()
