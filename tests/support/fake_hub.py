"""A hub on this machine: the little of its HTTP that downloads need, and its refusals."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from vllm.transformers_utils import repo_utils


class FakeHub(ThreadingHTTPServer):
    """Repositories are folders.

    Attributes:
        repositories: folder and its commit by repository and revision.
        refusals: status and ``X-Error-Code`` by repository: the answer to whatever is asked of it.
        asked: file and revision of every request for a file, with the token that came with it.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], tuple[Path, str]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Publish a folder; returns its commit."""
        commit = hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()
        for name in (revision, commit):
            self.repositories[repository, name] = folder, commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4 if api else 2 :]
        revision = rest[1] if len(rest) > 1 else "main"
        name = "" if api else "/".join(rest[2:])
        if name and not body:
            token = self.headers.get("Authorization")
            self.server.asked.append((f"{repository}/{name}", revision, token))
        if repository in self.server.refusals:
            status, code = self.server.refusals[repository]
            return self._send(status, {"X-Error-Code": code} if code else {})
        if not any(known == repository for known, _ in self.server.repositories):
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if (repository, revision) not in self.server.repositories:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        folder, commit = self.server.repositories[repository, revision]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if api:
            names = [str(file.relative_to(folder)) for file in files]
            entries = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": _digest(f)}
                for n, f in zip(names, files, strict=True)
            ]
            info = {"id": repository, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            content = entries if rest[:1] == ["tree"] else info
            return self._send(200, {}, json.dumps(content).encode())
        headers = {"X-Repo-Commit": commit}
        file = folder / name
        if file not in files:
            return self._send(404, headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{_digest(file)}"'
        return self._send(200, headers, file.read_bytes(), body)

    def _send(
        self, status: int, headers: dict[str, str], content: bytes = b"", body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def fake_hub(cache: Path) -> Iterator[FakeHub]:
    """A running hub, which is the one that `huggingface_hub` and vLLM ask, and an empty cache."""
    hub = FakeHub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(repo_utils, "_hf_api", None)
        # What it waits between tries.
        quick = vars(time) | {"sleep": lambda seconds: None}
        patch.setattr(_http, "time", SimpleNamespace(**quick))
        try:
            yield hub
        finally:
            hub.shutdown()
            hub.server_close()
            thread.join()
