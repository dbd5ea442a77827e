"""Is AdaDecode still as fast as it was? Under ten minutes on two cores; `make bench-quick`.

    python -m benchmarks.quick [--compare OLD.json] [--prompts N] [--tokens N] [--repeats N]

Widens the demo target until decoding is bound by memory, serves it with AdaDecode and without, and
sends both the same prompts in turns, several times. Writes results/bench-quick.json. Exit code 1 if
outputs differ (in float32 they may not), or if a count is worse than in OLD.json: these do not
depend on what else the machine does. Times are reported as ratios within the run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import costs, pair
from benchmarks.arguments import make_parser, run
from benchmarks.costs import Target
from benchmarks.demo.__main__ import ARGUMENTS
from benchmarks.pair import Group
from benchmarks.server import SMALL_ENVIRONMENT
from benchmarks.tables import Figure, make_console, text
from benchmarks.widen.build import widen_shown
from benchmarks.widen.plan import PRESETS
from benchmarks.workload import DEMO_MODEL, Prompt, by_files, dump, load_demo_prompts
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import read_json, write_json
from vllm_adadecode.heads import HeadsConfig

# The draft length that pays depends on the machine, and on what else it does: what is counted here
# must not.
COUNTED_ARGUMENTS = ARGUMENTS | {
    "adadecode": ["--speculative-config", '{"method": "adadecode", "cost_aware": false}']
}
DTYPES = ("float32", "bfloat16")
# Prompts by what they are to the target and its heads.
TITLES = {"second_stage": "in_domain", "held_out": "out_of_domain"}
# Counts that must not get worse, and whether more is worse.
COUNTS = {"layers_executed_per_token": True, "draft_acceptance_rate": False}
# Settings that decide what is counted.
COUNTED = ("shape", "dtype", "prompts", "new_tokens")
# Another processor or PyTorch adds in another order, which may turn a head that is right at its
# threshold; one draft token of a run is about this share.
SLACK = 0.002


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Build the target, ask both servers, and put together what is written."""
    import torch

    dtype: torch.dtype = getattr(torch, options.dtype)
    shape = PRESETS[options.shape]
    prompts = choose(load_demo_prompts(), options.prompts)
    with (
        tempfile.TemporaryDirectory(prefix="bench-quick-") as folder,
        counting(console) as progress,
    ):
        model = Path(folder) / "target"
        widen_shown(progress, options.model, model, shape, dtype)
        groups, differences = pair.measure(
            model,
            {m: [*given, "--dtype", options.dtype] for m, given in COUNTED_ARGUMENTS.items()},
            lambda method: options.out.with_name(f"bench-quick-{method}.log"),
            prompts * options.repeats,
            options.tokens,
            progress,
            SMALL_ENVIRONMENT | {"OMP_NUM_THREADS": str(options.threads)},
        )
        target = costs.load_target(model, options.dtype)
        heads = costs.load_heads(model, {})
    settings = {
        "shape": vars(shape),
        "dtype": options.dtype,
        "step_megabytes": round(shape.step_weights * dtype.itemsize / 10**6),
        "prompts": digest(prompts),
        "new_tokens": options.tokens,
        "threads": options.threads,
        "repeats": options.repeats,
    }

    of_group = partial(figures, target, heads)
    result = pair.build(groups, differences, TITLES, options.repeats, of_group)
    return result | {"settings": settings}


def figures(target: Target, heads: HeadsConfig, group: Group, repeats: int) -> dict[str, Any]:
    """Those of `pair.figures_of`, and what decoding has cost."""
    found = pair.figures_of(group, repeats)
    found["speedup"] = {"vanilla": 1.0, "adadecode": found["speedup"]}
    return found | {"costs": costs.account(group.stats, target, heads)}


def choose(known: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts of each kind of files, of all lengths."""
    kinds = by_files(known)
    return [p for f in TITLES for p in kinds[f][:: max(1, len(kinds[f]) // count)][:count]]


def digest(prompts: Sequence[Prompt]) -> str:
    """Tells whether two runs had the same prompts."""
    return f"{len(prompts)}, sha1 {hashlib.sha1(dump(prompts).encode()).hexdigest()}"


def load(file: Path) -> dict[str, Any]:
    """An earlier result.

    Raises:
        AdaDecodeError: it is not there, or none.
    """
    result = read_json(file)
    needed = ("speedup", "settings", "by_prompts", "versions", "machine", *COUNTS)
    if not isinstance(result, dict) or any(key not in result for key in needed):
        raise AdaDecodeError(f"{file} is no result of bench-quick: give one to --compare")
    return result


def regressions(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """One line for each count that is worse than it was.

    On the same processor with the same PyTorch any difference counts, elsewhere more than `SLACK`.

    Raises:
        AdaDecodeError: the two were measured with other settings.
    """
    for name in COUNTED:
        if new["settings"][name] != old["settings"][name]:
            raise AdaDecodeError(
                f"the earlier result has another {name} ({old['settings'][name]}, now "
                f"{new['settings'][name]}): compare with one of the same settings"
            )
    same_arithmetic = all(
        new[where].get(name) == old[where].get(name)
        for where, name in (("machine", "cpu"), ("versions", "torch"))
    )
    slack = 1e-9 if same_arithmetic else SLACK
    places = [("all", new, old)]
    places += [(p, new["by_prompts"][p], old["by_prompts"][p]) for p in old["by_prompts"]]
    found = []
    for place, mine, before in places:
        for name, more_is_worse in COUNTS.items():
            now, then = mine[name], before[name]
            if then is None:
                continue
            # No draft token was verified: nothing is accepted any more.
            now = 0.0 if now is None else now
            loss = (now - then) if more_is_worse else (then - now)
            if loss > slack * then:
                found.append(f"{name} of {place} prompts: {now:.5f}, was {then:.5f}")
    return found


def print_report(console: Console, result: dict[str, Any], old: dict[str, Any] | None) -> None:
    """The result as a table, with an earlier one in brackets."""
    before = old["by_prompts"] if old else {}
    shown = {
        name: values | {"before": before.get(name)} for name, values in result["by_prompts"].items()
    }

    def both(title: str, form: str, *path: str) -> Figure:
        def show(values: Mapping[str, Any]) -> str:
            earlier = values["before"]
            now = text(form, values, *path)
            return f"{now} ({text(form, earlier, *path)})" if earlier else now

        return Figure(title, show)

    figures = [
        both("speed-up", "{:.2f}", "speedup", "adadecode"),
        both("ms a token, vanilla", "{:.1f}", "ms_per_token", "vanilla"),
        both("ms a token, AdaDecode", "{:.1f}", "ms_per_token", "adadecode"),
        both("mean acceptance length", "{:.2f}", "mean_acceptance_length"),
        both("draft acceptance rate", "{:.2%}", "draft_acceptance_rate"),
        both("target layers executed per token", "{:.4f}", "layers_executed_per_token"),
    ]
    for kind, name in (("bytes", "bytes of weights"), ("flops", "FLOPs")):
        figures.append(both(f"{name} a token (vanilla: 1)", "{:.3f}", "costs", kind, "of_vanilla"))
        for why, wasted in costs.WASTED.items():
            path = ("costs", kind, "wasted", why)
            figures.append(both(f"  of them for {wasted}", "{:.1%}", *path))
    accepted = ("costs", "bytes", "accepted_token_of_vanilla")
    figures.append(both("bytes an accepted draft token (a vanilla token: 1)", "{:.2f}", *accepted))
    figures.append(both("speed-up that the bytes predict", "{:.2f}", "costs", "predicted_speedup"))
    title = "vLLM with AdaDecode and without, widened target"
    pair.print_report(console, title, result | {"by_prompts": shown, "before": old}, figures)
    where, settings = result["machine"], result["settings"]
    console.print(
        f"{where['cpu']}, {settings['threads']} threads, {settings['dtype']}, "
        f"{settings['step_megabytes']} MB a step"
    )


def bench(options: argparse.Namespace) -> int:
    console = make_console()
    begin = time.monotonic()
    old = load(options.compare) if options.compare else None
    result = measure(options, console)
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_json(options.out, result)
    print_report(console, result, old)
    console.print(f"written to {options.out} after {result['seconds']:.0f} s")
    worse = regressions(result, old) if old is not None else []
    if options.dtype == "float32" and not result["identical"]:
        worse.insert(0, f"{result['divergences']} of {result['outputs']} outputs differ")
    for line in worse:
        print(f"bench-quick: worse: {line}", file=sys.stderr)
    return 1 if worse else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("benchmarks.quick", __doc__)
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier result")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="small model to widen")
    parser.add_argument("--shape", choices=PRESETS, default="cpu", help="to widen it to")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the target")
    parser.add_argument("--prompts", type=positive, default=8, help="of each kind, at most 32")
    parser.add_argument("--tokens", type=positive, default=64, help="generated for each prompt")
    parser.add_argument("--repeats", type=positive, default=3, help="of every prompt")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=positive, default=cores, help="of each server")
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench-quick.json"), help="JSON file"
    )
    options = parser.parse_args(argv)
    return run("bench-quick", lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
