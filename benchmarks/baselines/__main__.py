"""``python -m benchmarks.baselines medusa,eagle3,draft TARGET``: trains other methods' drafters.

The same text and as many tokens as the demo's heads are trained on, unless told otherwise. The
results lie in the target's folder, where `benchmarks.compare` looks for them. A stopped run goes on
when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import operator
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.arguments import make_parser
from benchmarks.baselines.checkpoint import Checkpoint
from benchmarks.baselines.data import ROWS, Data, demo_data, demo_steps, file_data
from benchmarks.baselines.draft import DraftModel
from benchmarks.baselines.drafter import Drafter, evaluate, train
from benchmarks.baselines.eagle3 import Eagle3
from benchmarks.baselines.medusa import Medusa
from benchmarks.demo import DEMO_TARGET
from benchmarks.demo.recipe import Recipe
from benchmarks.machine import command
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import replaced_folder
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.training.provenance import provenance
from vllm_adadecode.training.target_model import FrozenTarget, load_target

METHODS = ("medusa", "eagle3", "draft")
# Which is best differs from method to method: all are tried.
RATES = (1e-3, 3e-3, 1e-2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    recipe = Recipe().heads
    parser = make_parser("benchmarks.baselines", __doc__)
    add = parser.add_argument
    add("methods", type=_methods, metavar="METHODS", help=f"whose drafters: {','.join(METHODS)}")
    add("target", nargs="?", default=DEMO_TARGET, help="folder or hub id of the model")
    add("--output", type=Path, help="folder; in the target's own if none is given")
    add(
        "--data",
        nargs="+",
        default=["demo"],
        help="demo: what the demo's heads are trained on; else as `adadecode eval` takes it",
    )
    add("--steps", type=positive, default=demo_steps(recipe), help="of the optimizer")
    add("--rows", type=positive, default=ROWS, help="of a step")
    add("--length", type=positive, default=recipe.length, help="tokens of a row")
    add("--rate", type=float, nargs="+", default=RATES, help="of AdamW; the best is kept")
    add("--heads", type=positive, default=5, help="of Medusa: one for each draft")
    add("--drafts", type=positive, default=3, help="of EAGLE-3 that it is trained to make in a row")
    add("--layers", type=positive, default=2, help="of the draft model")
    add("--seed", type=int, default=0, help="of everything random")
    add("--threads", type=positive, help="of PyTorch")
    options = parser.parse_args(arguments)
    if options.output and len(options.methods) > 1:
        parser.error("--output is for one method")
    return options


def _methods(text: str) -> list[str]:
    chosen = list(dict.fromkeys(text.split(",")))
    for method in chosen:
        if method not in METHODS:
            raise argparse.ArgumentTypeError(f"no method {method}: use {', '.join(METHODS)}")
    return chosen


def make(options: argparse.Namespace, method: str, target: FrozenTarget) -> Drafter:
    if method == "medusa":
        return Medusa(target, options.heads)
    if method == "eagle3":
        return Eagle3(target, options.drafts)
    return DraftModel(target, options.layers)


def worth(agreement: Sequence[float]) -> float:
    """Drafts that would be accepted in a window, were each as likely after any other."""
    return sum(accumulate(agreement, operator.mul))


def identity(options: argparse.Namespace, method: str, target: FrozenTarget, data: Data) -> str:
    """Names what the training of a drafter depends on, but for the learning rate."""
    names = ("steps", "rows", "heads", "drafts", "layers", "seed")
    settings = [getattr(options, name) for name in names]
    depends_on = (method, *settings, target_fingerprint(target.name), data)
    return hashlib.sha1(repr(depends_on).encode()).hexdigest()[:12]


def choose(
    options: argparse.Namespace,
    method: str,
    target: FrozenTarget,
    first: Drafter,
    data: Data,
    kept: Mapping[float, Checkpoint],
    show: Progress,
) -> tuple[Drafter, dict[str, list[float]]]:
    """The best drafter, and the agreement that each rate has led to.

    Args:
        first: an untrained one, which is kept if training only makes it worse.
        kept: what there is of a stopped run, by rate.
    """
    best, tried = first, {"0": evaluate(target, first, data)}
    for rate, checkpoint in kept.items():
        torch.manual_seed(options.seed)
        drafter = make(options, method, target)
        found = train(
            target,
            drafter,
            data,
            steps=options.steps,
            rows=options.rows,
            rate=rate,
            seed=options.seed,
            progress=show,
            kept=checkpoint,
        )
        shown = " ".join(f"{share:.2f}" for share in found)
        line = f"{method}, rate {rate:g}: held-out agreement by draft {shown}"
        show.console.print(line, highlight=False)
        if worth(found) > max(map(worth, tried.values())):
            best = drafter
        tried[f"{rate:g}"] = found
    return best, tried


@dataclass(frozen=True)
class Prepared:
    """What drafters of a target have in common; ``seconds`` of CPU time went into it."""

    target: FrozenTarget
    data: Data
    seconds: float


def prepare(options: argparse.Namespace, progress: Progress) -> Prepared:
    """
    Raises:
        AdaDecodeError: target, data or a method can't be used.
    """
    for method in options.methods:
        folder = output_of(options, method)
        if folder.exists() and not (folder / "config.json").is_file():
            raise AdaDecodeError(f"output {folder} holds something else: give another --output")
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = time.process_time()
    target = load_target(options.target, dtype=torch.float32)
    for method in options.methods:
        make(options, method, target)  # refuses now what it can't
    progress.console.print("preparing the data", highlight=False)
    if options.data == ["demo"]:
        data = demo_data(target, Recipe())
    else:
        data = file_data(target, options.data, options.length)
    return Prepared(target, data, time.process_time() - begin)


def output_of(options: argparse.Namespace, method: str) -> Path:
    return options.output or Path(options.target, method)


def run(options: argparse.Namespace, method: str, prepared: Prepared, progress: Progress) -> Path:
    """Train and write the folder, whole or not at all."""
    output = output_of(options, method)
    unfinished = output.parent / f".{output.name}-unfinished"
    target, data = prepared.target, prepared.data
    torch.manual_seed(options.seed)
    first = make(options, method, target)
    key = identity(options, method, target, data)
    kept = {rate: Checkpoint(unfinished / f"{key}-rate-{rate:g}.pt") for rate in options.rate}
    best, tried = choose(options, method, target, first, data, kept, progress)
    seconds = prepared.seconds + sum(checkpoint.seconds for checkpoint in kept.values())
    made_with = provenance() | {
        "command": shlex.join(command()),
        "target_fingerprint": target_fingerprint(target.name),
        "data": options.data,
        "tokens": options.steps * options.rows * options.length,
        "held_out_agreement_by_rate": tried,
        "cpu_seconds": round(seconds),
    }
    with replaced_folder(output, scratch=unfinished) as folder:
        best.save(folder, made_with)
    shutil.rmtree(unfinished)
    progress.console.print(f"written: {output}")
    return output


def main() -> int:
    options = parse()
    console = Console()
    try:
        with counting(console, left=True) as progress:
            prepared = prepare(options, progress)
            for method in options.methods:
                run(options, method, prepared, progress)
    except (AdaDecodeError, OSError) as error:
        print(f"baselines: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("baselines: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
