"""Models and heads on the hub: downloads, its cache, and what is said when it fails.

All that asks the hub or its cache goes through here; what is in the files is others'.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from vllm_adadecode.errors import AdaDecodeError, first_line


@dataclass(frozen=True)
class HubOptions:
    """How a repository is read.

    Attributes:
        revision: branch, tag or commit; None: the default branch.
        cache_dir: where downloads are kept; None: the hub's usual cache.
        token: None: the stored one, if there is one.
    """

    revision: str | None = None
    cache_dir: str | None = None
    token: bool | str | None = None

    @classmethod
    def of_target(cls, model_config: Any, download_dir: str | None) -> HubOptions:
        """As vLLM reads its target: the `ModelConfig`, and ``--download-dir``."""
        return cls(model_config.revision, download_dir, model_config.hf_token)


# The default branch, the usual cache, the stored token.
USUAL = HubOptions()


class HubUnreachableError(AdaDecodeError):
    """The hub gave no answer, and the cache has none."""


def local_folder(model: str | Path, options: HubOptions = USUAL) -> Path | None:
    """The folder of a local model or of an already cached hub model; None if there is neither."""
    if os.path.isdir(model):
        return Path(model)
    try:
        return Path(_snapshot(str(model), options, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # What is missing may be files that nobody needs, such as weights in another format.
        folder = getattr(error, "snapshot_path", None)
        return Path(folder) if folder is not None else None
    except (OSError, ValueError):
        return None


def hub_file(repository: str, name: str, options: HubOptions = USUAL) -> Path | None:
    """A file of a repository, downloaded if it is not in the cache; when offline, what that has.

    Returns:
        Where the cache has it; None: there is no such repository, or no such file in it.

    Raises:
        HubUnreachableError: it is not known whether there is.
        AdaDecodeError: the hub refuses, or the file can't be written.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        if _known_absent(repository, name, options):
            return None
        return Path(
            hf_hub_download(
                repository,
                name,
                revision=options.revision,
                cache_dir=options.cache_dir,
                token=options.token,
                local_files_only=offline,
            )
        )
    except Exception as error:
        # Of many libraries: the hub's and its HTTP client's, which is not always the same.
        if offline or _says_no(error):
            return None
        raise _hub_error(repository, error) from None


def hub_folder(repository: str, patterns: Sequence[str]) -> Path:
    """The files of a repository that match; when offline, what the cache has.

    Raises:
        AdaDecodeError: they can't be had.
    """
    try:
        return Path(_snapshot(repository, USUAL, allow_patterns=list(patterns)))
    except Exception as error:
        if constants.HF_HUB_OFFLINE or _says_no(error):
            raise AdaDecodeError(
                f"{repository} is no folder and can't be had from the hub: give a folder or hub id"
            ) from None
        raise _hub_error(repository, error) from None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache belongs to; None for any other folder."""
    parts = folder.resolve().parts
    for repository, snapshots, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if repository.startswith("models--") and snapshots == "snapshots":
            return commit
    return None


def is_downloaded(folder: Path) -> bool:
    """Whether a folder came from the hub: lies in its cache, or ``hf download`` has made it."""
    folder = folder.resolve()
    marked = (os.path.isdir(f / ".cache" / "huggingface") for f in (folder, folder.parent))
    return commit_of(folder) is not None or any(marked)


def _snapshot(repository: str, options: HubOptions, **arguments: Any) -> str:
    local = {"local_files_only": constants.HF_HUB_OFFLINE} | arguments
    return snapshot_download(
        repository,
        revision=options.revision,
        cache_dir=options.cache_dir,
        token=options.token,
        **local,
    )


def _known_absent(repository: str, name: str, options: HubOptions) -> bool:
    """Whether an earlier look-up found that a commit, which stays as it is, has no such file."""
    commit = getattr(options.revision, "resolved", options.revision)
    if commit is None or not re.fullmatch("[0-9a-f]{40}", commit):
        return False
    known = try_to_load_from_cache(repository, name, options.cache_dir, commit)
    return known is _CACHED_NO_EXIST


def _says_no(error: Exception) -> bool:
    """Whether the answer is that there is no such thing."""
    if isinstance(error, LocalEntryNotFoundError):
        return False
    # Without a right to see it a repository is not found either, but with another status.
    unknown = isinstance(error, RepositoryNotFoundError) and _status(error) == 404
    return unknown or isinstance(error, EntryNotFoundError | HFValidationError)


def _hub_error(repository: str, error: Exception) -> AdaDecodeError:
    # The hub's library names what it got as the cause, and the missing file first.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    cause = cause if isinstance(cause, Exception) else error
    # The first paragraph is the status, the second what was refused.
    said = " ".join(line for line in str(cause).splitlines()[:3] if line) or first_line(cause)
    status = _status(cause)
    if status in (401, 403):
        advice = "check the name, or give a token that may read it (--hf-token, hf auth login)"
    else:
        advice = "try again, or set HF_HUB_OFFLINE=1 to use what is downloaded"
    no_answer = isinstance(cause, ConnectionError | TimeoutError | LocalEntryNotFoundError)
    client = type(cause).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
    kind = HubUnreachableError if status is None and (no_answer or client) else AdaDecodeError
    return kind(f"{repository} can't be read from the hub ({said}): {advice}")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
