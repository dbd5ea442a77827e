"""Finding a target's heads, and telling whether heads and a target belong together.

Owns the search order, which targets heads may name, and the list of mismatches; reading the files
is `config.py`'s and `target.py`'s, downloading them `hub.py`'s.
"""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    HeadsConfig,
    is_heads_folder,
)
from vllm_adadecode.heads.hub import (
    USUAL,
    HubOptions,
    HubUnreachableError,
    commit_of,
    hub_file,
    is_downloaded,
    local_folder,
)
from vllm_adadecode.heads.target import has_weights, target_fingerprint

# Under vLLM's logger, whose level and format users know.
logger = logging.getLogger(f"vllm.{__name__}")

# Heads published inside their target's own repository.
SUBFOLDER = "adadecode"


@dataclass(frozen=True)
class Mismatch:
    """One property in which heads and a target differ."""

    what: str
    heads: str
    target: str

    def __str__(self) -> str:
        return f"{self.what} (heads: {self.heads}, target: {self.target})"


def find_heads(
    model: str | None, target: str, revision: str | None = None, options: HubOptions = USUAL
) -> Path | None:
    """Folder of the heads to use.

    Args:
        model: the heads as the user gave them, a folder or a hub id; None to look beside the
            target, in its sub-folder ``adadecode``.
        target: folder or hub id of the target.
        revision: of the hub repository of ``model``.
        options: how the target's hub repository is read. That of ``model`` is read in the same way
            but for the revision.

    Returns:
        A local folder (of hub repositories the two files are downloaded; when offline, what the
        cache has), or None: nothing was given and the target brings no heads.

    Raises:
        AdaDecodeError: what was given does not exist or is no heads checkpoint, or the hub does not
            say whether there are heads.
    """
    if model is None:
        return _heads_beside(target, options)
    folder = _folder(model)
    if folder is None:
        file = hub_file(model, CONFIG_NAME, replace(options, revision=revision))
        if file is None:
            raise AdaDecodeError(
                f"heads {model} not found (there is no such folder, and no such repository with a "
                f"{CONFIG_NAME}): give the folder or hub id of a heads checkpoint"
            )
        folder = file.parent
        # The weights only once it is known what they are: a mistyped id may name a whole model.
        if is_heads_folder(folder):
            hub_file(model, WEIGHTS_NAME, replace(options, revision=commit_of(folder)))
    if not is_heads_folder(folder):
        raise AdaDecodeError(
            f"{model} holds no AdaDecode heads (no {CONFIG_NAME} with speculators_model_type "
            f"{METHOD!r}): give a heads checkpoint, or no model at all for the training-free "
            "logit lens"
        )
    return folder


def find_mismatches(
    config: HeadsConfig,
    *,
    hidden_size: int,
    vocab_size: int,
    num_hidden_layers: int,
    fingerprint: str | None,
) -> list[Mismatch]:
    """Every property in which the heads and a target differ; empty if they fit.

    Args:
        hidden_size, vocab_size, num_hidden_layers: the target's.
        fingerprint: the target's `target_fingerprint`; None if unknown, then it is not compared.
    """
    heads = config.target
    pairs = [
        ("hidden size", heads.hidden_size, hidden_size),
        ("vocabulary", heads.vocab_size, vocab_size),
        ("layer count", heads.num_hidden_layers, num_hidden_layers),
    ]
    found = [Mismatch(what, str(ours), str(its)) for what, ours, its in pairs if ours != its]
    beyond = [e for e in config.exit_layers if e >= num_hidden_layers]
    if beyond:
        found.append(
            Mismatch(
                "exit layer out of range",
                ", ".join(map(str, beyond)),
                f"at most {num_hidden_layers - 1}",
            )
        )
    if heads.fingerprint and fingerprint and heads.fingerprint != fingerprint:
        found.append(Mismatch("fingerprint", _short(heads.fingerprint), _short(fingerprint)))
    return found


def check_fits(
    config: HeadsConfig,
    *,
    hidden_size: int,
    vocab_size: int,
    num_hidden_layers: int,
    target_path: str | Path,
    options: HubOptions = USUAL,
) -> bool:
    """Refuse heads that were made for another target.

    Args:
        hidden_size, vocab_size, num_hidden_layers: the target's.
        target_path: its folder or hub id.
        options: how its hub repository was read.

    Returns:
        Whether that is all there is to compare; False: the heads have a fingerprint, but the
        target's weights are not here (yet), or not as safetensors files.

    Raises:
        AdaDecodeError: one line with every mismatch and what to do.
    """
    wanted = config.target.fingerprint
    fingerprint = target_fingerprint(target_path, options) if wanted else None
    mismatches = find_mismatches(
        config,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
        fingerprint=fingerprint,
    )
    if not mismatches:
        return wanted is None or fingerprint is not None
    advice = f"use the heads of this target, or train some: adadecode train {target_path}"
    if [m.what for m in mismatches] == ["fingerprint"]:
        advice += (
            f"; to use them with a fine-tuned copy, set target.fingerprint to null in their "
            f"{CONFIG_NAME}"
        )
    raise AdaDecodeError(
        f"these heads are not for {target_path}: {', '.join(map(str, mismatches))}; {advice}"
    )


def resolve_verifier(config: HeadsConfig, folder: str | Path) -> str:
    """The target that heads name, as a folder or hub id that is valid from anywhere.

    Args:
        config: the heads.
        folder: where they lie; relative names start here.

    Raises:
        AdaDecodeError: it is a folder that is no model's, or is not there; or the heads come from
            the hub and name one that did not come with them.
    """
    name = config.speculators_config.verifier.name_or_path
    if not is_path(name):
        return name
    # The heads may be linked into the target's folder, or their own folder linked elsewhere.
    bases = [Path(folder).absolute(), Path(folder).resolve()]
    candidates = [Path(os.path.normpath(base / os.path.expanduser(name))) for base in bases]
    advice = (
        'serve the target itself with --speculative-config \'{"method": "adadecode", "model": '
        f'"{folder}"}}\', or correct verifier.name_or_path in their {CONFIG_NAME}'
    )
    within = is_relative(name) and all(
        candidate.is_relative_to(base.parent)
        for candidate, base in zip(candidates, bases, strict=True)
    )
    if is_downloaded(Path(folder)) and not within:
        raise AdaDecodeError(
            f"the heads in {folder} come from the hub and name the target {name!r}, a path that "
            f"means nothing on this machine: {advice}"
        )
    for candidate in candidates:
        if os.path.isfile(candidate / CONFIG_NAME) and not is_heads_folder(candidate):
            return str(candidate)
    raise AdaDecodeError(
        f"the heads in {folder} name the target {name!r}, but {candidates[0]} holds no model: "
        f"{advice}"
    )


def is_relative(name: str) -> bool:
    """Whether a verifier's name is relative to the heads folder (a hub id never is)."""
    return name in (".", "..") or name.startswith(("./", "../"))


def is_path(name: str) -> bool:
    """Whether a verifier's name is a path at all."""
    return is_relative(name) or name.startswith(("/", "~"))


def _folder(name: str) -> Path | None:
    """The folder of this name; None if there is none.

    Raises:
        AdaDecodeError: it is something else.
    """
    # Unlike Path's, these functions answer for names that no file can have, too.
    path = os.path.expanduser(name.replace("\0", " "))
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise AdaDecodeError(f"heads {name} is a file: give the folder that holds it")
    return None


def _heads_beside(target: str, options: HubOptions) -> Path | None:
    if os.path.isdir(target):
        folder = Path(target, SUBFOLDER)
        return folder if os.path.isfile(folder / CONFIG_NAME) else None
    try:
        file = hub_file(target, f"{SUBFOLDER}/{CONFIG_NAME}", options)
    except HubUnreachableError as error:
        # A target that is here is served without a network, too.
        cached = local_folder(target, options)
        if cached is None or not has_weights(cached):
            raise
        logger.warning("adadecode does not know whether the target brings heads: %s", error)
        return None
    if file is None:
        return None
    folder = file.parent
    weights = f"{SUBFOLDER}/{WEIGHTS_NAME}"
    hub_file(target, weights, replace(options, revision=commit_of(folder)))
    return folder


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
