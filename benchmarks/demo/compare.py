"""The demo's measurement: the same prompts to two servers, with AdaDecode and without.

Owns what is sent when, and what is kept of the answers; what it comes to is `report.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.demo.prompts import Prompt
from benchmarks.demo.server import Server

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
    """The answers to one kind of prompts, by method, and what the worker counted meanwhile."""

    files: str
    answers: dict[str, list[Answer]]
    stats: dict[str, Any]


def ask(server: Server, prompt: Prompt, max_tokens: int) -> Answer:
    begin = time.perf_counter()
    choice = server.complete(prompt.text, max_tokens)
    seconds = time.perf_counter() - begin
    return Answer(prompt, choice["token_ids"], choice["text"], seconds)


def compare(
    servers: dict[str, Server],
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
    for files in dict.fromkeys(p.files for p in prompts):
        servers["adadecode"].stats(reset=True)
        answers: dict[str, list[Answer]] = {method: [] for method in METHODS}
        order = list(METHODS)
        of_group = [p for p in prompts if p.files == files]
        for block in (of_group[i : i + BLOCK] for i in range(0, len(of_group), BLOCK)):
            for method in order:
                time.sleep(SETTLE_S)
                for prompt in block:
                    answers[method].append(ask(servers[method], prompt, max_tokens))
                    advance()
            order.reverse()
        groups.append(Group(files, answers, servers["adadecode"].stats()))
    return groups


@dataclass
class Difference:
    """Where an output first differs from vanilla's."""

    prompt: Prompt
    position: int
    vanilla: str
    adadecode: str
    # Difference of the log-probabilities that vanilla gives to the two tokens; None: far apart.
    gap: float | None


def find_differences(groups: Sequence[Group], vanilla: Server) -> list[Difference]:
    """All outputs that are not the same, with how far from a tie each one is."""
    found = []
    for group in groups:
        for mine, theirs in zip(group.answers["adadecode"], group.answers["vanilla"], strict=True):
            if mine.token_ids != theirs.token_ids:
                found.append(_difference(mine, theirs, vanilla))
    return found


def _difference(mine: Answer, theirs: Answer, vanilla: Server) -> Difference:
    pairs = zip(mine.token_ids, theirs.token_ids, strict=False)
    shorter = min(len(mine.token_ids), len(theirs.token_ids))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    gap = None
    if at < shorter:
        ids = vanilla.post("/tokenize", {"model": "demo", "prompt": mine.prompt.text})["tokens"]
        choice = vanilla.complete(
            ids + theirs.token_ids[:at], 1, logprobs=5, return_tokens_as_token_ids=True
        )
        scores = choice["logprobs"]["top_logprobs"][0]
        keys = [f"token_id:{answer.token_ids[at]}" for answer in (mine, theirs)]
        if all(key in scores for key in keys):
            gap = abs(scores[keys[0]] - scores[keys[1]])
    return Difference(mine.prompt, at, theirs.text, mine.text, gap)
