"""``python -m benchmarks.baselines medusa,eagle3,draft TARGET``: trains other methods' drafters.

The same text and as many tokens as the demo's heads are trained on. The results lie in the target's
folder, where `benchmarks.compare` looks for them; one that is there already is left as it is, so a
stopped run goes on with the next method.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import arguments
from benchmarks.arguments import list_of, make_parser
from benchmarks.baselines.draft import DraftModel
from benchmarks.baselines.eagle3 import Eagle3
from benchmarks.baselines.medusa import Medusa
from benchmarks.baselines.training import (
    ROWS,
    Drafter,
    evaluate,
    make_data,
    train,
)
from benchmarks.demo.recipe import Recipe
from benchmarks.machine import record
from benchmarks.tables import make_console
from benchmarks.workload import DEMO_TARGET
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.files import new_folder
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.training.target_model import FrozenTarget, load_target

# By method, the learning rate that has led to the best drafter of the demo target.
RATES = {"medusa": 1e-2, "eagle3": 1e-2, "draft": 1e-3}


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("benchmarks.baselines", __doc__)
    add = parser.add_argument
    add("methods", type=list_of(_method), help=f"whose drafters: {','.join(RATES)}")
    add("target", nargs="?", default=DEMO_TARGET, help="folder or hub id of the model")
    add("--output", type=Path, help="folder of the drafters; the target's own if none is given")
    # As many rows as the heads see.
    recipe = Recipe().heads
    steps = round(3 * (recipe.text + recipe.generations) / ROWS)
    add("--steps", type=positive, default=steps, help="of the optimizer")
    add("--rate", type=float, help="of AdamW; default: what is best for the demo target")
    add("--heads", type=positive, default=5, help="of Medusa: one for each draft token")
    add("--in-a-row", type=positive, default=3, help="draft tokens that EAGLE-3 is trained to make")
    add("--layers", type=positive, default=2, help="of the draft model")
    add("--threads", type=positive, help="of PyTorch")
    return parser.parse_args(given)


def _method(text: str) -> str:
    if text not in RATES:
        raise argparse.ArgumentTypeError(f"no method {text}: use {', '.join(RATES)}")
    return text


def make(options: argparse.Namespace, method: str, target: FrozenTarget) -> Drafter:
    if method == "medusa":
        return Medusa(target, options.heads)
    if method == "eagle3":
        return Eagle3(target, options.in_a_row)
    return DraftModel(target, options.layers)


def run(options: argparse.Namespace) -> int:
    """Train what is not there yet, each folder whole or not at all."""
    recipe = Recipe()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = make_console()
    folders = {m: (options.output or Path(options.target)) / m for m in options.methods}
    missing = {m: folder for m, folder in folders.items() if not folder.exists()}
    for method in folders.keys() - missing.keys():
        console.print(f"{folders[method]} is there already: remove it to train it again")
    if not missing:
        return 0
    with counting(console, left=True) as progress:
        target = load_target(options.target, dtype=torch.float32)
        for method in missing:
            make(options, method, target)  # refuses now what it can't
        progress.console.print("preparing the data", highlight=False)
        data = make_data(target, recipe, progress)
        for method, folder in missing.items():
            torch.manual_seed(recipe.seed)
            drafter = make(options, method, target)
            untrained = evaluate(target, drafter, data)
            rate = options.rate or RATES[method]
            agreement = train(
                target,
                drafter,
                data,
                steps=options.steps,
                rate=rate,
                seed=recipe.seed,
                progress=progress,
            )
            shown = " ".join(f"{share:.2f}" for share in agreement)
            progress.console.print(f"{method}: held-out agreement by draft token {shown}")
            made_with = record() | {
                "target_fingerprint": target_fingerprint(target.name),
                "tokens": options.steps * ROWS * recipe.heads.length,
                "rate": rate,
                "held_out_agreement": agreement,
                "held_out_agreement_untrained": untrained,
            }
            with new_folder(folder) as unfinished:
                drafter.save(unfinished, made_with)
            progress.console.print(f"written: {folder}")
    return 0


def main(given: list[str] | None = None) -> int:
    options = parse(given)
    return arguments.run("baselines", lambda: run(options), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
