"""``python -m benchmarks.demo.heads_report``: what the demo target's heads are worth, as JSON.

Reports the shipped setting, the paper's, and two calibrated on other files than those reported: one
for speed alone, one that also keeps most of its drafts (`calibrated_accepting`). Heads are counted
as bytes that the target's shape reads. Layer passes are simulated, from the heads' real guesses on
the target's own greedy text: any machine gives these numbers.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.arguments import make_parser
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.heads_prompts import CHOOSING, OUT_OF_DOMAIN, STORED
from benchmarks.machine import command
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.evaluation import report
from vllm_adadecode.evaluation.calibrate import calibrate, paper_setting
from vllm_adadecode.evaluation.costs import choose_costs
from vllm_adadecode.evaluation.data import DataSet, continue_prompts
from vllm_adadecode.evaluation.metrics import Measurer
from vllm_adadecode.evaluation.session import Session, open_session
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.evaluation.trace import Trace
from vllm_adadecode.files import write_json
from vllm_adadecode.training.provenance import provenance

HERE = Path(__file__).parent
# Asked of `calibrated_accepting` on the files it is chosen on.
LEAST_ACCEPTANCE = 0.9


def continue_sets(
    session: Session, prompts: list[demo_prompts.Prompt], new_tokens: int, show: Progress
) -> list[DataSet]:
    """The target's greedy continuations, by set of files."""
    assert session.target.tokenizer is not None
    encode = session.target.tokenizer.backend_tokenizer
    task = show.add_task("continuing prompts", total=len(prompts))
    return [
        DataSet(
            name,
            tuple(
                continue_prompts(
                    session.target, ids, new_tokens, name, lambda n: show.advance(task, n)
                )
            ),
        )
        for name, ids in demo_prompts.encoded_sets(prompts, encode).items()
    ]


def make_traces(
    session: Session, prompts: list[demo_prompts.Prompt], new_tokens: int, show: Progress
) -> dict[str, list[Trace]]:
    """Traces by set of files, of the target's greedy continuations."""
    sets = continue_sets(session, prompts, new_tokens, show)
    running = show.add_task("heads", total=len(prompts))
    return session.traces(sets, lambda: show.advance(running))


def part(
    traces: list[Trace], settings: Mapping[str, Setting], session: Session, files: list[str]
) -> dict[str, Any]:
    """One part: the shipped setting's numbers, and below them those of the others."""
    found: dict[str, Any] = {"files": files}
    measurer = Measurer(traces, choose_costs("bytes", *_of(session)))
    metrics = {name: measurer.measure(setting) for name, setting in settings.items()}
    found |= metrics["shipped"].as_dict()
    found |= {name: m.as_dict() for name, m in metrics.items() if name != "shipped"}
    return found


def _of(session: Session) -> tuple[Any, Any, Any]:
    return session.config, session.target, session.readout


def make_report(
    session: Session, traces: Mapping[str, list[Trace]], prompts: Any
) -> dict[str, Any]:
    """The whole report, see `main`."""
    costs = choose_costs("bytes", *_of(session))
    exits, layers = session.config.exit_layers, session.config.target.num_hidden_layers
    choosing = {name: traces[name] for name in CHOOSING.values()}
    chosen, accepting = (
        calibrate(choosing, costs, session.setting, session.readout.has_gate, least)
        for least in (0.0, LEAST_ACCEPTANCE)
    )
    settings = {
        "shipped": session.setting,
        "paper": paper_setting(exits, layers),
        "calibrated": chosen.setting,
        "calibrated_accepting": accepting.setting,
    }
    files = {name: sorted({p.source for p in prompts if p.files == name}) for name in traces}
    left_out = set(session.config.provenance.get("heads_left_out", ()))
    result: dict[str, Any] = {
        name: part(traces[name], settings, session, files[name]) for name in CHOOSING
    }
    # Heads that do not say what they left out may have been trained on these files.
    result["head_held_out"]["known_to_be_held_out"] = left_out >= set(files["head_held_out"])
    result["out_of_domain"] = {
        name: part(traces[name], settings, session, files[name]) for name in OUT_OF_DOMAIN
    }
    return result | {
        "settings": {name: report.setting_json(s, exits) for name, s in settings.items()},
        "calibrated_on": {name: files[name] for name in CHOOSING.values()},
        "least_acceptance": LEAST_ACCEPTANCE,
        "costs": costs.model_dump(),
        "made_with": provenance() | {"command": shlex.join(command())},
    }


def print_report(console: Console, result: Mapping[str, Any]) -> None:
    """Speed-ups by part and setting."""
    from rich.table import Table

    table = Table(title="Ideal speed-up", title_justify="left")
    for column in ("files", "setting"):
        table.add_column(column, no_wrap=True)
    for column in ("heads counted", "layers alone", "draft acceptance rate", "acceptance length"):
        table.add_column(column, justify="right")
    parts = {name: result[name] for name in CHOOSING} | dict(result["out_of_domain"])
    for name, found in parts.items():
        for setting in result["settings"]:
            m = found if setting == "shipped" else found[setting]
            table.add_row(
                name if setting == "shipped" else "",
                setting,
                f"{m['ideal_speedup_with_head_cost']:.3f}",
                f"{m['ideal_speedup']:.3f}",
                "-" if m["draft_acceptance_rate"] is None else f"{m['draft_acceptance_rate']:.1%}",
                f"{m['mean_acceptance_length']:.2f}",
            )
        table.add_section()
    console.print(table)
    for name, setting in result["settings"].items():
        console.print(f"{name}: {setting}", markup=False, soft_wrap=True)
    if not result["head_held_out"]["known_to_be_held_out"]:
        console.print("head_held_out: these heads do not say that they left these files out")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmarks.demo.heads_report", __doc__)
    parser.add_argument("--heads", type=Path, default=HERE / "model" / "adadecode", help="folder")
    parser.add_argument("--target", type=Path, default=HERE / "model", help="folder")
    parser.add_argument("--prompts", type=positive, help="of each set, at most; default: all")
    parser.add_argument("--new-tokens", type=positive, default=128, help="of a prompt")
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch")
    parser.add_argument("--out", type=Path, default=Path("results/heads.json"), help="JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    # The stored weights are bf16; computing in fp32 makes the numbers those of every machine.
    session = open_session(str(args.heads), str(args.target), "float32")
    prompts = demo_prompts.load(STORED, args.prompts)
    with counting(console) as show:
        traces = make_traces(session, prompts, args.new_tokens, show)
        result = make_report(session, traces, prompts)
    write_json(args.out, result)
    print_report(console, result)
    console.print(f"written: {args.out}", markup=False)


if __name__ == "__main__":
    main()
