"""``adadecode calibrate``: exits, thresholds and K that pay best, as a heads folder of its own.

Owns the command line and what is written; the choice is `vllm_adadecode.evaluation.calibrate`'s.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adadecode.cli.evaluate import add_data_arguments, run_heads
from vllm_adadecode.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm_adadecode.evaluation.simulate import Setting
    from vllm_adadecode.heads import HeadsConfig

DESCRIPTION = (
    "Choose exit layers, thresholds, gate thresholds and K that give the most tokens a unit of "
    "cost, on sequences that the heads were not trained on. One half of each set chooses, the "
    "other half predicts. No set gets slower than plain decoding: if nothing pays, drafting is "
    "turned off. Writes a heads folder with the choice, and calibration.json."
)
RESULT_NAME = "calibration.json"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate", help="choose exits, thresholds and K by cost", description=DESCRIPTION
    )
    add_data_arguments(parser, costs="measured")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="heads folder to write"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_adadecode.evaluation import report
    from vllm_adadecode.evaluation.calibrate import calibrate, paper_setting
    from vllm_adadecode.evaluation.files import write_json
    from vllm_adadecode.evaluation.provenance import provenance
    from vllm_adadecode.evaluation.timing import choose_costs

    _check_output(args.output)
    session, traces, notes = run_heads(args)
    costs = choose_costs(args.costs, session.config, session.target, session.readout)
    errors = Console(stderr=True)
    with errors.status("choosing settings"):
        found = calibrate(traces, costs, session.setting, session.readout.has_gate)
    exits = session.config.exit_layers
    paper = paper_setting(exits, session.config.target.num_hidden_layers)
    result = report.calibration_json(found, paper, session.setting, exits)
    result |= {"notes": notes, "data": args.data, "made_with": provenance()}
    config = with_setting(session.config, found.setting, result)
    save_with_weights(session.folder, config, args.output, session.target.name)
    write_json(args.output / RESULT_NAME, result)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    console = Console(highlight=False)
    console.print(report.calibration_table(found))
    console.print(report.setting_line(found.setting, exits), markup=False)
    if not found.pays:
        console.print("nothing pays at these costs: drafting is turned off", markup=False)
    console.print(report.costs_line(costs), markup=False)
    for line in (*notes, f"written: {args.output}"):
        console.print(line, markup=False)
    return 0


def with_setting(config: HeadsConfig, setting: Setting, result: dict[str, Any]) -> HeadsConfig:
    """The heads' config with another setting; how it came about goes to its provenance."""
    from vllm_adadecode.heads import HeadsConfig

    data = config.model_dump(mode="json")
    data["confidence_threshold"] = list(setting.thresholds)
    if config.gate and setting.gate_thresholds is not None:
        data["gate_threshold"] = list(setting.gate_thresholds)
    if any(setting.used):
        data["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = setting.max_drafts
    data["provenance"]["calibration"] = {
        "command": result["made_with"]["command"],
        "data": result["data"],
        "costs": result["costs"],
        "predicted_speedup": {
            name: round(p["calibrated"]["ideal_speedup_with_head_cost"], 4)
            for name, p in result["predictions"].items()
        },
    }
    return HeadsConfig(**data)


def save_with_weights(source: Path, config: HeadsConfig, folder: Path, target: str) -> None:
    """Write heads with the weights of ``source`` and another config.

    A target that ``source`` names relative to itself is named by its absolute path if the new
    folder does not lie beside it.

    Raises:
        AdaDecodeError: the folder holds something else.
        OSError: the disk refuses.
    """
    from safetensors.torch import load_file

    from vllm_adadecode.heads import HeadsConfig, save_heads
    from vllm_adadecode.heads.checkpoint import WEIGHTS_NAME
    from vllm_adadecode.heads.resolve import is_relative

    verifier = config.speculators_config.verifier.name_or_path
    if is_relative(verifier) and (folder / verifier).resolve() != (source / verifier).resolve():
        data = config.model_dump(mode="json")
        local = Path(target).expanduser()
        data["speculators_config"]["verifier"]["name_or_path"] = (
            str(local.resolve()) if local.is_dir() else target
        )
        config = HeadsConfig(**data)
    weights = source / WEIGHTS_NAME
    save_heads(folder, config, load_file(weights) if weights.is_file() else {})


def _check_output(folder: Path) -> None:
    """Refuse before hours of work what would be refused after."""
    from vllm_adadecode.heads.resolve import is_heads_folder

    if folder.exists() and not folder.is_dir():
        raise AdaDecodeError(f"--output {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_heads_folder(folder):
        raise AdaDecodeError(f"--output {folder} holds something else: give a folder of its own")
