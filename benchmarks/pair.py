"""The same prompts to two servers in turns, with AdaDecode and without: the demo and bench-quick.

Owns what is sent when, what is kept of the answers, the figures that follow, and their table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.counts import ratio, total
from benchmarks.machine import record
from benchmarks.server import SMALL_ENVIRONMENT, Server, without_plugin
from benchmarks.tables import Figure, figure, sideways
from benchmarks.workload import Prompt, by_files

METHODS = ("vanilla", "adadecode")
# A worker looks for work in a loop for a second after its last request, and would take a core from
# the other server.
SETTLE_S = 1.2
BLOCK = 8


@dataclass
class Answer:
    """One prompt's output from one server."""

    prompt: Prompt
    token_ids: list[int]
    text: str
    seconds: float


@dataclass
class Group:
    """The answers to one kind of prompts, by method, and what the worker counted meanwhile.

    Each method has answered all prompts in order, the whole of them as often as they were repeated.
    """

    files: str
    answers: dict[str, list[Answer]]
    stats: dict[str, Any]

    def runs(self, method: str, repeats: int) -> list[list[Answer]]:
        """The answers of each repeat."""
        answers = self.answers[method]
        size = len(answers) // repeats
        return [answers[i : i + size] for i in range(0, len(answers), size)]


@dataclass
class Difference:
    """Where an output first differs from vanilla's."""

    prompt: Prompt
    position: int
    vanilla: str
    adadecode: str
    gap: float | None  # see `tie_gap`


def measure(
    model: Path,
    arguments: Mapping[str, Sequence[str]],
    log: Callable[[str], Path],
    prompts: Sequence[Prompt],
    max_tokens: int,
    progress: Progress,
    environment: Mapping[str, str] = SMALL_ENVIRONMENT,
) -> tuple[list[Group], list[Difference]]:
    """Both servers from their start to their end.

    Args:
        arguments: of `vllm serve`, by method.
        log: the log's file of a method's server.

    Raises:
        ServerError: one did not start, or did not answer.
    """
    environments = {"vanilla": {**environment, **without_plugin()}, "adadecode": environment}
    with ExitStack() as stack:
        servers = {
            method: stack.enter_context(
                Server(model, arguments[method], log(method), environment=environments[method])
            )
            for method in METHODS
        }
        starting = progress.add_task("starting two servers", total=len(servers))
        for server in servers.values():
            server.wait_until_ready()
            progress.advance(starting)
        asking = progress.add_task("asking both in turns", total=2 * len(prompts))
        groups = in_turns(servers, prompts, max_tokens, lambda: progress.advance(asking))
        return groups, find_differences(groups, servers["vanilla"])


def ask(server: Server, prompt: Prompt, max_tokens: int) -> Answer:
    begin = time.perf_counter()
    choice = server.complete(prompt.text, max_tokens)
    seconds = time.perf_counter() - begin
    return Answer(prompt, choice["token_ids"], choice["text"], seconds)


def in_turns(
    servers: Mapping[str, Server],
    prompts: Sequence[Prompt],
    max_tokens: int,
    advance: Callable[[], None],
) -> list[Group]:
    """Send all prompts to both servers, one request at a time.

    The servers take turns every few prompts, and in who goes first, so that a change in what else
    the machine does falls on both.

    Args:
        servers: by method, both ready.
        advance: called after each answer.
    """
    for server in servers.values():
        for prompt in prompts[:: max(1, len(prompts) // 4)]:
            ask(server, prompt, 32)
    groups = []
    for files, of_group in by_files(prompts).items():
        servers["adadecode"].stats(reset=True)
        answers: dict[str, list[Answer]] = {method: [] for method in METHODS}
        order = list(METHODS)
        for block in (of_group[i : i + BLOCK] for i in range(0, len(of_group), BLOCK)):
            for method in order:
                time.sleep(SETTLE_S)
                for prompt in block:
                    answers[method].append(ask(servers[method], prompt, max_tokens))
                    advance()
            order.reverse()
        groups.append(Group(files, answers, servers["adadecode"].stats()))
    return groups


def find_differences(groups: Sequence[Group], vanilla: Server) -> list[Difference]:
    """All outputs that are not the same, with how far from a tie each one is."""
    return [
        _difference(mine, theirs, vanilla)
        for group in groups
        for mine, theirs in zip(*(group.answers[m] for m in reversed(METHODS)), strict=True)
        if mine.token_ids != theirs.token_ids
    ]


def _difference(mine: Answer, theirs: Answer, vanilla: Server) -> Difference:
    at = first_difference(theirs.token_ids, mine.token_ids)
    tokens = [answer.token_ids[at : at + 1] for answer in (mine, theirs)]
    gap = None
    if all(tokens):
        ids = vanilla.post("/tokenize", {"prompt": mine.prompt.text})["tokens"]
        gap = tie_gap(vanilla, ids + theirs.token_ids[:at], [of[0] for of in tokens])
    return Difference(mine.prompt, at, theirs.text, mine.text, gap)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The first position at which two outputs differ; that behind the shorter one."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def tie_gap(vanilla: Server, ids: list[int], tokens: Sequence[int]) -> float | None:
    """How far the less likely of two tokens is behind the best one, in the log-probabilities of
    what follows ``ids``; None: further than the 20 best tokens."""
    choice = vanilla.complete(ids, 1, logprobs=20, return_tokens_as_token_ids=True)
    scores = choice["logprobs"]["top_logprobs"][0]
    found = [scores.get(f"token_id:{token}") for token in tokens]
    return None if None in found else max(scores.values()) - min(found)


# --- the result -----------------------------------------------------------------------------------


def build(
    groups: Sequence[Group],
    differences: Sequence[Difference],
    titles: Mapping[str, str],
    repeats: int = 1,
    figures: Callable[[Group, int], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything that was measured; the top level holds the figures over all prompts.

    Args:
        titles: of the groups, by their files.
        repeats: of every prompt.
        figures: what is said of a group; `figures_of` by default.
    """
    show = figures or figures_of
    runs = {m: [group.runs(m, repeats) for group in groups] for m in METHODS}
    # Each repeat whole, as in a group.
    answers = {
        m: [a for i in range(repeats) for of_group in of_method for a in of_group[i]]
        for m, of_method in runs.items()
    }
    everything = Group("all", answers, total([g.stats for g in groups]))
    outputs = len(everything.answers["vanilla"])
    return {
        "what": "the same prompts to vllm serve with --speculative-config adadecode and without, "
        "temperature 0, one request at a time; times of a prompt are medians of its repeats",
        "identical": not differences,
        "identical_outputs": outputs - len(differences),
        "outputs": outputs,
        "divergences": len(differences),
        **show(everything, repeats),
        "by_prompts": {titles[g.files]: show(g, repeats) for g in groups},
        "differences": [asdict(difference) for difference in differences],
        **record(),
    }


def figures_of(group: Group, repeats: int = 1) -> dict[str, Any]:
    """Ratios of times, and counts; of a group of prompts. Times are of whole requests."""
    runs = {m: group.runs(m, repeats) for m in METHODS}
    by_repeat = {m: [sum(a.seconds for a in run) for run in runs[m]] for m in METHODS}
    # Of each prompt, the median of its repeats.
    by_prompt = {
        m: [statistics.median(a.seconds for a in each) for each in zip(*runs[m], strict=True)]
        for m in METHODS
    }
    seconds = {m: sum(by_prompt[m]) for m in METHODS}
    tokens = {m: sum(len(a.token_ids) for a in runs[m][0]) for m in METHODS}
    pairs = [
        list(zip(of["vanilla"], of["adadecode"], strict=True)) for of in (by_repeat, by_prompt)
    ]
    return {
        "prompts": len(runs["vanilla"][0]),
        "tokens_per_s": {m: tokens[m] / seconds[m] for m in METHODS},
        "ms_per_token": {m: 1000 * seconds[m] / tokens[m] for m in METHODS},
        "speedup": seconds["vanilla"] / seconds["adadecode"],
        "speedup_by_repeat": [v / a for v, a in pairs[0]],
        "median_speedup": statistics.median(v / a for v, a in pairs[1]),
        **{
            name: group.stats[name]
            for name in (
                *("mean_acceptance_length", "draft_acceptance_rate"),
                "layers_executed_per_token",
            )
        },
        "exits": {layer: _of_exit(counts) for layer, counts in group.stats["exits"].items()},
    }


def _of_exit(counts: Mapping[str, int]) -> dict[str, Any]:
    accepted, rejected = counts["accepted_tokens"], counts["rejected_tokens"]
    return dict(counts) | {
        "confident_rate": ratio(counts["draft_tokens"], counts["heads_evaluated"]),
        "draft_acceptance_rate": ratio(accepted, accepted + rejected),
    }


TIMES = (
    figure("tokens/s, vanilla", "{:.0f}", "tokens_per_s", "vanilla"),
    figure("tokens/s, AdaDecode", "{:.0f}", "tokens_per_s", "adadecode"),
    figure("speed-up", "{:.2f}", "speedup"),
    figure("speed-up, median of the prompts", "{:.2f}", "median_speedup"),
)
COUNTS = (
    figure("mean acceptance length", "{:.2f}", "mean_acceptance_length"),
    figure("draft acceptance rate", "{:.1%}", "draft_acceptance_rate"),
    figure("target layers executed per token", "{:.4f}", "layers_executed_per_token"),
)


def print_report(
    console: Console, title: str, result: Mapping[str, Any], figures: Sequence[Figure]
) -> None:
    """The result as a table, and whether outputs are the same."""
    console.print(sideways(title, figures, {**result["by_prompts"], "all": result}))
    style = "bold green" if result["identical"] else "bold red"
    same = f"{result['identical_outputs']} of {result['outputs']}"
    console.print(f"identical output: {same}", style=style)
    for difference in result["differences"][:1]:
        gap = difference["gap"]
        console.print(
            f"first difference: token {difference['position']} after a prompt from "
            f"{difference['prompt']['source']}; log-probabilities "
            + ("far apart" if gap is None else f"{gap:.1g} apart (below 0.001: a tie)")
        )
        for method in METHODS:
            console.print(f"  {method}: {difference[method]!r}", markup=False)
