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

from benchmarks.server import without_plugin
from vllm_adadecode.heads import target_fingerprint


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        drafter: folder inside the target's that holds what was trained for the method.
        must_have: whether it can't run without that folder.
        options: its speculative configuration, without drafter and draft length.
        counted: whether `num_speculative_tokens` is to be given.
        plugin: whether the server loads the plugin; the others are vLLM as it comes.
        environment: for the server.
    """

    drafter: str | None = None
    must_have: bool = True
    options: Mapping[str, Any] | None = None
    counted: bool = True
    plugin: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def server_environment(self) -> dict[str, str]:
        return {**({} if self.plugin else without_plugin()), **self.environment}


METHODS: dict[str, Method] = {
    "vanilla": Method(),
    # The two runners by request. V2 without the method, for which a CPU needs the plugin, is what
    # the method itself costs there.
    "vanilla_v1": Method(environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "vanilla_v2": Method(plugin=True, environment={"VLLM_USE_V2_MODEL_RUNNER": "1"}),
    # Heads say themselves how many tokens they draft; without heads the logit lens drafts.
    "adadecode": Method("adadecode", must_have=False, options={}, counted=False, plugin=True),
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
        return Arguments(environment=method.server_environment())
    config: dict[str, Any] = {"method": kind(name), **method.options}
    folder = drafter
    if folder is None and method.drafter is not None:
        beside = Path(target, method.drafter)
        if (beside / "config.json").is_file():
            folder = str(beside)
        elif method.must_have:
            raise NotReadyError(f"no drafter in {beside}: {_remedy(name, target)}")
    own: dict[str, Any] = {}
    if folder is not None:
        config["model"] = folder
        path = Path(folder, "config.json")  # not here for one of the hub
        own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Drafters of `benchmarks.baselines` say what they are for; heads are refused by the server.
    trained_for = (own.get("provenance") or {}).get("target_fingerprint")
    if trained_for and trained_for != (target_fingerprint(target) or trained_for):
        raise NotReadyError(
            f"the drafter in {folder} was trained for another model than {target}: "
            f"{_remedy(name, target)}"
        )
    if method.counted:
        config["num_speculative_tokens"] = _own_draft_tokens(own, draft_tokens)
    config |= options or {}
    return Arguments(("--speculative-config", json.dumps(config)), method.server_environment())


def _remedy(name: str, target: str) -> str:
    what = "draft" if name == "draft_model" else name
    return (
        f"train one with `python -m benchmarks.baselines {what} {target}`, "
        f"or name one with --drafter {name}=FOLDER"
    )


def _own_draft_tokens(config: Mapping[str, Any], otherwise: int) -> int:
    """What a drafter says itself: Medusa drafts one token with each head, neither more nor fewer,
    and speculators' drafters name a number."""
    if config.get("model_type") == "medusa":
        return int(config["num_heads"])
    proposals = config.get("speculators_config", {}).get("proposal_methods") or [{}]
    return int(proposals[0].get("speculative_tokens", otherwise))
