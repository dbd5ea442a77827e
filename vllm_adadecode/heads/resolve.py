"""Finding a target's heads, and telling whether heads and a target belong together.

Owns the search order and the list of mismatches; reading the files is `config.py`'s and
`fingerprint.py`'s.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError, first_line
from vllm_adadecode.heads.config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    HeadsConfig,
    is_heads_folder,
)
from vllm_adadecode.heads.target import target_fingerprint

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


def find_heads(model: str | None, target: str, revision: str | None = None) -> Path | None:
    """Folder of the heads to use.

    Args:
        model: the heads as the user gave them, a folder or a hub id; None to look beside the
            target, in its sub-folder ``adadecode``.
        target: folder or hub id of the target.
        revision: of the hub repository of ``model``.

    Returns:
        A local folder (hub repositories are downloaded as vLLM does it, from the cache alone when
        offline), or None: nothing was given and the target brings no heads.

    Raises:
        AdaDecodeError: what was given does not exist or is no heads checkpoint.
    """
    if model is None:
        return _heads_beside(target)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise AdaDecodeError(f"heads {model} is a file: give the folder that holds it")
        folder = _download(model, revision, CONFIG_NAME)
        # The weights only once it is known what they are: a mistyped id may name a whole model.
        if is_heads_folder(folder):
            folder = _download(model, revision, CONFIG_NAME, WEIGHTS_NAME)
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
) -> None:
    """Refuse heads that were made for another target.

    The fingerprint is compared when the heads have one and the target's files can be read.

    Args:
        hidden_size, vocab_size, num_hidden_layers: the target's.
        target_path: its folder or hub id.

    Raises:
        AdaDecodeError: one line with every mismatch and what to do.
    """
    mismatches = find_mismatches(
        config,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
        fingerprint=target_fingerprint(target_path) if config.target.fingerprint else None,
    )
    if not mismatches:
        return
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
        AdaDecodeError: it is a folder that is no model's, or is not there.
    """
    name = config.speculators_config.verifier.name_or_path
    if is_relative(name):
        # The heads may be linked into the target's folder, or their own folder linked elsewhere.
        bases = [Path(folder).absolute(), Path(folder).resolve()]
        candidates = [Path(os.path.normpath(base / name)) for base in bases]
    elif (path := Path(name).expanduser()).is_absolute():
        candidates = [path]
    else:
        return name
    for candidate in candidates:
        if (candidate / CONFIG_NAME).is_file() and not is_heads_folder(candidate):
            return str(candidate)
    raise AdaDecodeError(
        f"the heads in {folder} name the target {name!r}, but {candidates[0]} holds no model: "
        f'serve the target itself with --speculative-config \'{{"method": "adadecode", "model": '
        f'"{folder}"}}\', or correct verifier.name_or_path in their {CONFIG_NAME}'
    )


def is_relative(name: str) -> bool:
    """Whether a verifier's name is relative to the heads folder (a hub id never is)."""
    return name in (".", "..") or name.startswith(("./", "../"))


def relative_name(target: str | Path, heads: str | Path) -> str:
    """A verifier's name for a local target: its path from the heads' folder, which tells no more of
    the machine than it must."""
    return os.path.relpath(Path(target).resolve(), Path(heads).resolve())


def _heads_beside(target: str) -> Path | None:
    if Path(target).is_dir():
        folder = Path(target)
    else:
        try:
            # One request; without a network, what the cache has.
            folder = Path(
                snapshot_download(
                    target,
                    allow_patterns=[f"{SUBFOLDER}/{CONFIG_NAME}", f"{SUBFOLDER}/{WEIGHTS_NAME}"],
                    local_files_only=constants.HF_HUB_OFFLINE,
                )
            )
        except (HFValidationError, HfHubHTTPError, OSError):
            return None
    folder /= SUBFOLDER
    return folder if (folder / CONFIG_NAME).is_file() else None


def _download(model: str, revision: str | None, *files: str) -> Path:
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except HFValidationError:
        reason = "there is no such folder"
    except (HfHubHTTPError, OSError) as error:
        reason = f"no such folder, and not from the hub: {first_line(error)}"
    raise AdaDecodeError(
        f"heads {model} not found ({reason}): give the folder or hub id of a heads checkpoint"
    )


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
