"""``python -m benchmarks.head_variants``: kinds of heads, trained alike and compared.

Every variant differs from the demo's own heads in what its name says and is trained with the
package's trainer on the same data. Settings are chosen on files other than those reported. A
variant that is done is kept: a stopped run goes on with the same command.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

from benchmarks.arguments import make_parser
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.export import markdown
from benchmarks.demo.heads_prompts import CHOOSING, OUT_OF_DOMAIN, STORED
from benchmarks.demo.heads_report import LEAST_ACCEPTANCE, continue_sets
from benchmarks.demo.recipe import HeadRecipe, Recipe
from benchmarks.demo.stages import native_bf16
from benchmarks.machine import command
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.evaluation import report
from vllm_adadecode.evaluation.calibrate import calibrate, paper_setting
from vllm_adadecode.evaluation.data import DataSet
from vllm_adadecode.evaluation.metrics import Measurer
from vllm_adadecode.evaluation.session import Session, open_session
from vllm_adadecode.evaluation.timing import choose_costs
from vllm_adadecode.files import write_json
from vllm_adadecode.heads import HeadsConfig, save_heads
from vllm_adadecode.heads.files import CONFIG_NAME, WEIGHTS_NAME
from vllm_adadecode.training.losses import Loss
from vllm_adadecode.training.provenance import provenance
from vllm_adadecode.training.request import DataSettings, HeadSettings, Request
from vllm_adadecode.training.run import run_training
from vllm_adadecode.training.trainer import TrainSettings

REPORTED = (*CHOOSING, *OUT_OF_DOMAIN)


@dataclass(frozen=True)
class Variant:
    """What differs from the demo's heads.

    Attributes:
        heads: of `HeadSettings`.
        loss: of `Loss`.
        weights: name of the variant whose weights it has; None: it is trained.
        use_gate: whether settings may use the gate.
    """

    heads: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    use_gate: bool = True


BASE = "shipped kind"
ALL = "all tokens"
EVERY_TOKEN: dict[str, Any] = {"draft_vocab_size": None}
VARIANTS = {
    BASE: Variant(),
    "without the gate": Variant(weights=BASE, use_gate=False),
    "int8 copy of the LM head": Variant({"lm_head_quantization": "int8"}, weights=BASE),
    "draft vocabulary 512": Variant({"draft_vocab_size": 512}),
    ALL: Variant(EVERY_TOKEN),
    "all tokens, without the gate": Variant(weights=ALL, use_gate=False),
    "all tokens, int8 copy": Variant({"lm_head_quantization": "int8"}, weights=ALL),
    "all tokens, fp8 copy": Variant({"lm_head_quantization": "fp8"}, weights=ALL),
    "all tokens, confidence term 0.5": Variant(EVERY_TOKEN, {"confidence_weight": 0.5}),
    "all tokens, confidence term 2": Variant(EVERY_TOKEN, {"confidence_weight": 2.0}),
    "logit lens": Variant(EVERY_TOKEN | {"transform": "identity", "norm": "after", "gate": False}),
    "logit lens, gate": Variant(EVERY_TOKEN | {"transform": "identity", "norm": "after"}),
    "the paper's: norm after T, temperature 1": Variant(
        EVERY_TOKEN | {"norm": "after", "gate": False}, {"temperature": 1.0}
    ),
    "no norm": Variant({"norm": "none"}),
    "temperature 1": Variant(loss={"temperature": 1.0}),
    "temperature 0.3": Variant(loss={"temperature": 0.3}),
    "reverse KL": Variant(loss={"kind": "reverse_kl"}),
    "top-64 KL": Variant(loss={"kind": "top_k_kl", "top_k": 64}),
    "low rank 64": Variant({"transform": "low_rank", "rank": 64}),
    "adapter 64": Variant({"transform": "adapter", "rank": 64}),
    "exits at every layer": Variant({"exit_layers": "every"}),
}


@dataclass(frozen=True)
class Study:
    """One run of this command.

    Attributes:
        target: folder.
        sequences: file to train on.
        work: folder of heads and results by variant.
        recipe: of the demo's heads, which `BASE` is.
    """

    target: Path
    sequences: Path
    work: Path
    recipe: HeadRecipe = field(default_factory=HeadRecipe)

    def heads_folder(self, name: str) -> Path:
        return self.work / "".join(c if c.isalnum() else "-" for c in name)

    def request(self, name: str, num_layers: int) -> Request:
        """How a variant is trained."""
        variant, recipe = VARIANTS[name], self.recipe
        own: dict[str, Any] = {"exit_layers": Recipe().exit_layers, "norm": recipe.norm}
        own |= {"gate": True, "draft_vocab_size": recipe.draft_vocab_size}
        chosen = own | variant.heads
        if chosen["exit_layers"] == "every":
            chosen["exit_layers"] = tuple(range(1, num_layers))
        return Request(
            target=str(self.target),
            output=self.heads_folder(name),
            data=DataSettings((str(self.sequences),), generate=False, max_length=recipe.length),
            cache=self.work,
            heads=HeadSettings(**chosen),
            training=TrainSettings(
                loss=replace(Loss(temperature=recipe.temperature), **variant.loss),
                learning_rate=recipe.rate,
                epochs=recipe.epochs,
            ),
            precision="bf16" if native_bf16() else "fp32",
        )

    def make(self, name: str, num_layers: int, show: Progress) -> Path:
        """The variant's heads, trained if they are not there yet."""
        folder, variant = self.heads_folder(name), VARIANTS[name]
        if (folder / CONFIG_NAME).is_file():
            return folder
        if variant.weights is None:
            run_training(self.request(name, num_layers), show)
            return folder
        source = self.make(variant.weights, num_layers, show)
        config = HeadsConfig.load(source)
        shutil.rmtree(folder, ignore_errors=True)
        changed = HeadsConfig(**(config.model_dump() | variant.heads))
        save_heads(folder, changed, load_file(source / WEIGHTS_NAME))
        return folder


def measure(session: Session, sets: Sequence[DataSet], use_gate: bool) -> dict[str, Any]:
    """A variant's numbers by part and setting."""
    traces = session.traces(sets)
    exits, layers = session.config.exit_layers, session.config.target.num_hidden_layers
    costs = choose_costs("bytes", session.config, session.target, session.readout)
    choosing = {name: traces[name] for name in CHOOSING.values()}
    gated = use_gate and session.readout.has_gate
    settings = {"paper": paper_setting(exits, layers)} | {
        name: calibrate(choosing, costs, None, gated, least).setting
        for name, least in (("calibrated", 0.0), ("calibrated_accepting", LEAST_ACCEPTANCE))
    }
    found: dict[str, Any] = {
        "settings": {name: report.setting_json(s, exits) for name, s in settings.items()},
        "costs": costs.model_dump(),
    }
    for part in REPORTED:
        measurer = Measurer(traces[part], costs)
        found[part] = {n: measurer.measure(s).as_dict() for n, s in settings.items()}
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: speed-up with heads counted, and the share of drafts that was accepted."""
    header = ["heads", *(f"{part}: {s}" for part in CHOOSING for s in ("paper", "fast", "sure"))]
    header += [f"{part}: sure" for part in OUT_OF_DOMAIN]
    body = []
    for name, found in results.items():
        cells = [
            _cell(found[part][setting])
            for part in CHOOSING
            for setting in ("paper", "calibrated", "calibrated_accepting")
        ]
        cells += [_cell(found[part]["calibrated_accepting"]) for part in OUT_OF_DOMAIN]
        body.append([name, *cells])
    return markdown(header, body)


def _cell(metrics: dict[str, Any]) -> str:
    kept = metrics["draft_acceptance_rate"]
    accepted = "no drafts" if kept is None else f"{kept:.0%}"
    return f"{metrics['ideal_speedup_with_head_cost']:.2f} ({accepted})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmarks.head_variants", __doc__)
    parser.add_argument("target", type=Path, help="folder, for example benchmarks/demo/model")
    parser.add_argument(
        "--sequences",
        type=Path,
        required=True,
        help="to train on; `make demo-model` leaves its own in .demo-build/",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(VARIANTS),
        metavar="NAME",
        help=f"of {'; '.join(VARIANTS)}; default: all",
    )
    parser.add_argument("--prompts", type=positive, help="of each set, at most; default: all")
    parser.add_argument("--new-tokens", type=positive, default=128, help="of a prompt")
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument(
        "--out", type=Path, default=Path("results/head-variants.json"), help="JSON file"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    study = Study(args.target, args.sequences, args.work)
    prompts = demo_prompts.load(STORED, args.prompts)
    num_layers = json.loads((args.target / CONFIG_NAME).read_text())["num_hidden_layers"]
    results: dict[str, Any] = {}
    sets: list[DataSet] = []
    with counting(console) as show:
        task = show.add_task("variants", total=len(args.only or VARIANTS))
        for name in args.only or VARIANTS:
            folder = study.make(name, num_layers, show)
            kept = folder / "measured.json"
            if not kept.is_file():
                session = open_session(str(folder), str(args.target), "float32")
                sets = sets or continue_sets(session, prompts, args.new_tokens, show)
                write_json(kept, measure(session, sets, VARIANTS[name].use_gate))
            results[name] = json.loads(kept.read_text())
            show.advance(task)
    made = provenance() | {"command": shlex.join(command())}
    write_json(args.out, {"variants": results, "made_with": made})
    console.print(table(results), markup=False, soft_wrap=True)
    console.print(f"written: {args.out}", markup=False)


if __name__ == "__main__":
    main()
