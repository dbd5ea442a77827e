"""What each method needs: its speculative configuration, and where its drafter is looked for.

Owns names and arguments of `vllm serve`. Which method runs where is not kept here: a server says
so when it starts. A method may run more than once, each time with options of its own: as
``METHOD@LABEL``, for example ``adadecode@0.7``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_adadecode.heads import target_fingerprint


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        drafter: folder inside the target's that holds what was trained for the method.
        must_have: whether it can't run without that folder.
        options: its speculative configuration, without drafter and draft length.
        counted: whether `num_speculative_tokens` is to be given.
        environment: for the server.
    """

    drafter: str | None = None
    must_have: bool = True
    options: Mapping[str, Any] | None = None
    counted: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "vanilla": Method(),
    # What the methods that vLLM runs only on its older runner would have to be compared with, were
    # that runner the only one.
    "vanilla_v1": Method(environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    # Heads say themselves how many tokens they draft; without heads the logit lens drafts.
    "adadecode": Method("adadecode", must_have=False, options={}, counted=False),
    "medusa": Method("medusa", options={}),
    "eagle3": Method("eagle3", options={}),
    "draft_model": Method("draft", options={}),
    "ngram": Method(options={"prompt_lookup_max": 4, "prompt_lookup_min": 2}),
    # Its trees say how long a draft is. Without a memory of earlier answers: the same prompts come
    # again and again here, and it would know what is said.
    "suffix": Method(options={"suffix_decoding_max_cached_requests": 0}, counted=False),
}


class NotReadyError(Exception):
    """A method that can't be started here; says why and what to do."""


@dataclass(frozen=True)
class Arguments:
    """How to start a method's server: arguments of `vllm serve`, and its environment."""

    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def kind(name: str) -> str:
    """The method of `METHODS` that ``METHOD`` or ``METHOD@LABEL`` is."""
    return name.partition("@")[0]


def arguments(
    name: str,
    target: str,
    draft_tokens: int = 5,
    drafter: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Arguments:
    """
    Args:
        name: of `METHODS`, or one of these with a label.
        target: folder or hub id of the model.
        draft_tokens: `num_speculative_tokens` of drafters that do not say it themselves.
        drafter: folder or hub id, in place of the one beside the target.
        options: added to the speculative configuration, or in place of what it has.

    Raises:
        NotReadyError: the drafter is not there, or says that it was trained for another model.
    """
    method = METHODS[kind(name)]
    if method.options is None:
        return Arguments(environment=method.environment)
    config: dict[str, Any] = {"method": kind(name), **method.options}
    folder = drafter if drafter is not None else _beside(target, kind(name))
    if folder is not None:
        _check_target(name, folder, target)
        config["model"] = folder
    if method.counted:
        config["num_speculative_tokens"] = _own_draft_tokens(folder, draft_tokens)
    config |= options or {}
    return Arguments(("--speculative-config", json.dumps(config)), method.environment)


def _beside(target: str, name: str) -> str | None:
    """The drafter in the target's folder; None: not there, and not needed."""
    method = METHODS[name]
    if method.drafter is None:
        return None
    folder = Path(target, method.drafter)
    if (folder / "config.json").is_file():
        return str(folder)
    if not method.must_have:
        return None
    raise NotReadyError(f"no drafter in {folder}: {_remedy(name, target)}")


def _check_target(name: str, folder: str, target: str) -> None:
    """Refuse what `benchmarks.baselines` has trained for another model; other drafters do not say
    what they are for. AdaDecode's heads are refused by the server."""
    made_with = _read_config(folder).get("provenance") or {}
    trained_for, found = made_with.get("target_fingerprint"), target_fingerprint(target)
    if trained_for and found and trained_for != found:
        raise NotReadyError(
            f"the drafter in {folder} was trained for another model than {target}: "
            f"{_remedy(name, target)}"
        )


def _remedy(name: str, target: str) -> str:
    what = "draft" if name == "draft_model" else name
    return (
        f"train one with `python -m benchmarks.baselines {what} {target}`, "
        f"or name one with --drafter {name}=FOLDER"
    )


def _own_draft_tokens(folder: str | None, otherwise: int) -> int:
    """What a drafter says itself: Medusa drafts one token with each head, neither more nor fewer,
    and speculators' drafters name a number."""
    config = {} if folder is None else _read_config(folder)
    if config.get("model_type") == "medusa":
        return int(config["num_heads"])
    proposals = config.get("speculators_config", {}).get("proposal_methods") or [{}]
    return int(proposals[0].get("speculative_tokens", otherwise))


def _read_config(folder: str) -> dict[str, Any]:
    """Of a drafter; empty for one that is not here, as of the hub."""
    path = Path(folder, "config.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config
