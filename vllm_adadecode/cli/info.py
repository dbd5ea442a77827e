"""``adadecode info``: what heads there are, and whether they fit their target.

Owns the report; the facts come from `vllm_adadecode.heads`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adadecode.cli.checks import Check, all_ok, print_checks, print_pairs
from vllm_adadecode.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm_adadecode.heads import HeadsConfig
    from vllm_adadecode.heads.target import TargetInfo

LONGEST = 200  # characters of a line of provenance that is printed


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="show heads and whether they fit their target",
        description="Show heads and whether they fit their target. Exit code 1 if they do not.",
    )
    parser.add_argument(
        "model",
        metavar="HEADS_OR_MODEL",
        help="folder or hub id of heads, or of a model (for the heads in its folder adadecode/)",
    )
    parser.add_argument(
        "--target",
        metavar="MODEL",
        help="folder or hub id of the target, instead of the one that the heads name",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


@dataclass
class Report:
    """What there is to say about one set of heads and its target.

    Attributes:
        heads: their folder; None for the training-free logit lens.
        target: None if it can't be read; the checks then say why.
    """

    heads: Path | None
    config: HeadsConfig
    target: TargetInfo | None
    checks: list[Check] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        """Heads' parameters over the target's, None if unknown."""
        total = self.target.num_parameters() if self.target else None
        return self.config.num_parameters / total if total else None


def run(args: argparse.Namespace) -> int:
    report = make_report(args.model, args.target)
    if args.json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print(report)
    return 0 if all_ok(report.checks) else 1


def make_report(model: str, target: str | None = None) -> Report:
    """Look at heads, or at a model and the heads it brings.

    Args:
        model: folder or hub id of either.
        target: the target, if not the one that the heads name.

    Raises:
        AdaDecodeError: neither heads nor a model are there, or the heads' config is not valid.
    """
    from vllm_adadecode.heads import HeadsConfig, find_heads
    from vllm_adadecode.heads.config import is_heads_folder
    from vllm_adadecode.heads.target import fetch_config, read_target

    folder = fetch_config(model)
    if is_heads_folder(folder):
        config = HeadsConfig.load(folder)
        heads: Path | None = find_heads(model, "")
        found, problem = _target_of(config, folder, target)
    else:
        found, problem = read_target(target or model), None
        heads = find_heads(None, model)
        if heads is None:
            config = HeadsConfig.logit_lens(
                found.hidden_size, found.vocab_size, found.num_hidden_layers
            )
        else:
            config = HeadsConfig.load(heads)
    report = Report(heads, config, found)
    report.checks = _checks(report, problem)
    return report


def _target_of(
    config: HeadsConfig, folder: Path, target: str | None
) -> tuple[TargetInfo | None, str | None]:
    """The target given, else the one that the heads name, else the folder they lie in."""
    from vllm_adadecode.heads.resolve import resolve_verifier
    from vllm_adadecode.heads.target import read_target

    if target is not None:
        return read_target(target), None
    try:
        return read_target(resolve_verifier(config, folder)), None
    except AdaDecodeError as error:
        try:
            return read_target(folder.absolute().parent), None
        except AdaDecodeError:
            return None, f"{error} (or give --target)"


def _checks(report: Report, problem: str | None) -> list[Check]:
    from vllm_adadecode.heads import find_mismatches, target_fingerprint
    from vllm_adadecode.model.target import check_architectures

    config, target = report.config, report.target
    checks = [_check_weights(report)]
    if target is None:
        return [*checks, Check("target", False, problem or "not found")]
    try:
        check_architectures(target.architectures)
        checks.append(Check("architecture", True, "/".join(target.architectures)))
    except AdaDecodeError as error:
        checks.append(Check("architecture", False, str(error)))
    fingerprint = target_fingerprint(target.folder) if config.target.fingerprint else None
    shape = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_hidden_layers": target.num_hidden_layers,
    }
    mismatches = {
        mismatch.what: f"heads {mismatch.heads}, target {mismatch.target}"
        for mismatch in find_mismatches(config, **shape, fingerprint=fingerprint)
    }
    found = {
        "hidden size": str(target.hidden_size),
        "vocabulary": str(target.vocab_size),
        "layer count": str(target.num_hidden_layers),
        "exit layer": f"{_numbers(config.exit_layers)} of {target.num_hidden_layers}",
    }
    for name, value in found.items():
        mismatch = next((text for what, text in mismatches.items() if what.startswith(name)), None)
        checks.append(Check(name, mismatch is None, mismatch or value))
    if different := mismatches.get("fingerprint"):
        outcome: tuple[bool | None, str] = (False, f"{different}: trained on another model")
    elif config.target.fingerprint is None:
        outcome = (None, "the heads have none")
    elif fingerprint is None:
        outcome = (None, "the target's weights are not here to compare")
    else:
        outcome = (True, fingerprint.removeprefix("sha256:")[:12])
    return [*checks, Check("fingerprint", *outcome)]


def _check_weights(report: Report) -> Check:
    import torch

    from vllm_adadecode.heads import load_draft_vocab, load_heads
    from vllm_adadecode.heads.checkpoint import tensor_shapes

    try:
        load_heads(report.heads, report.config, torch.float32, "cpu")
        load_draft_vocab(report.heads, report.config)
    except AdaDecodeError as error:
        return Check("weights", False, str(error))
    needed = bool(tensor_shapes(report.config))
    return Check("weights", True, "complete and finite" if needed else "none needed")


# --- output ------------------------------------------------------------------------------------


def _as_json(report: Report) -> dict[str, Any]:
    config = report.config
    same = ("num_speculative_tokens", "transform", "rank", "norm", "gate", "draft_vocab_size")
    return {
        "heads": str(report.heads) if report.heads else None,
        "training_free": report.heads is None,
        "target": report.target.name if report.target else None,
        "exit_layers": list(config.exit_layers),
        "confidence_threshold": list(config.thresholds),
        "gate_threshold": list(config.gate_thresholds) if config.gate_thresholds else None,
        **{name: getattr(config, name) for name in (*same, "lm_head_quantization")},
        "num_parameters": config.num_parameters,
        "share_of_target": report.share,
        "provenance": config.provenance,
        "fits": all_ok(report.checks),
        "checks": [asdict(check) for check in report.checks],
    }


def _print(report: Report) -> None:
    from rich.console import Console

    config, console = report.config, Console(highlight=False)
    size, quantized = config.draft_vocab_size, config.lm_head_quantization
    vocabulary = f"{size:,} of {config.target.vocab_size:,} tokens" if size else ""
    pairs = [
        ("heads", str(report.heads) if report.heads else "none: training-free logit lens"),
        ("target", report.target.name if report.target else "unknown"),
        ("exit layers", f"{_numbers(config.exit_layers)} of {config.target.num_hidden_layers}"),
        ("confidence threshold", _thresholds(config.thresholds)),
        ("gate threshold", _thresholds(config.gate_thresholds or ())),
        ("draft tokens", f"at most {config.num_speculative_tokens} in a step"),
        ("transform", _transform(config)),
        ("draft vocabulary", vocabulary),
        ("LM head copy", f"{quantized}, a scale per row" if quantized else ""),
        ("parameters", _parameters(report)),
    ]
    # A line for what these heads have.
    pairs = [pair for pair in pairs if pair[1]]
    if config.provenance:
        pairs.append(("provenance", ""))
        # Settings and results are a page of JSON, which the model card has as tables.
        told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.provenance.items()}
        pairs += [(f"  {k}", v) for k, v in told.items() if len(v) <= LONGEST]
        if left_out := [k for k, v in told.items() if len(v) > LONGEST]:
            pairs.append(("  more", f"{', '.join(left_out)}: in README.md, or with --json"))
    print_pairs(console, pairs)
    console.print()
    print_checks(console, report.checks)
    if report.target and report.heads is None and all_ok(report.checks):
        name = report.target.name
        console.print(f"\nTrain heads for it: adadecode train {name}", markup=False)


def _numbers(values: Any) -> str:
    return ", ".join(map(str, values))


def _thresholds(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else _numbers(values)


def _transform(config: HeadsConfig) -> str:
    kind = {
        "identity": "identity",
        "full": "full matrix",
        "low_rank": f"identity + rank {config.rank}",
    }[config.transform]
    return f"{kind}, final norm {config.norm} it"


def _parameters(report: Report) -> str:
    count = report.config.num_parameters
    share = report.share if count else None
    return f"{count:,}" + (f" ({share:.2%} of the target's)" if share is not None else "")
