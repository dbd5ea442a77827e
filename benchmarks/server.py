"""A `vllm serve` process: started, asked over HTTP, and stopped with everything it started.

Owns the process and its log. What is asked, and what the answers mean, is the caller's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn, Self

import httpx
import psutil

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 120.0
LOG_LINES = 12

# The demo's. float32, so that the two servers' outputs can be compared token for token. No prefix
# caching: a prompt that is sent again must cost the same again.
FLAGS = (
    *("--served-model-name", "demo", "--dtype", "float32"),
    *("--max-model-len", "512", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "134217728"),
    *("--gpu-memory-utilization", "0.4", "--enforce-eager", "--no-enable-prefix-caching"),
)

# Of every server.
ENVIRONMENT = {
    # Opens /collective_rpc, by which the worker's counters are read.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Tests look into engines of their own process; a server is to be as users have it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
# The demo model is tiny: a second thread gains nothing, and spins when others want its core.
SMALL_ENVIRONMENT = ENVIRONMENT | {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


def without_plugin() -> dict[str, str]:
    """Environment of a server of vLLM that does not load the plugin: what "vanilla" means.

    All other plugins are loaded, among them `adadecode_command`, without which no `vllm serve` of
    vllm-cpu 0.32.0 starts (it finds its version, and changes nothing else).
    """
    groups = ("vllm.general_plugins", "vllm.platform_plugins")
    names = {entry.name for group in groups for entry in entry_points(group=group)}
    return {"VLLM_PLUGINS": ",".join(sorted(names - {METHOD}))}


class ServerError(AdaDecodeError):
    """A server that did not start, or did not answer in time; says what its log ends with."""


def vllm_command() -> str:
    """The `vllm` command that belongs to this Python."""
    return str(Path(sys.executable).with_name("vllm"))


def stop_on_sigterm() -> None:
    """From here on a process that is ended from outside stops its servers as after Ctrl-C."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A context manager; entering starts the process, `wait_until_ready` waits until it serves."""

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str],
        log: Path,
        flags: Sequence[str] = FLAGS,
        environment: Mapping[str, str] = SMALL_ENVIRONMENT,
    ) -> None:
        """
        Args:
            model: folder or hub id.
            arguments: of `vllm serve`, after `flags`.
            log: file that takes the process's output.
            environment: in addition to this process's.
        """
        self.log = log
        self.port = free_port()
        self.model = str(model)
        self.arguments = [self.model, "--host", "127.0.0.1", *flags, *arguments]
        self.environment = environment
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            timeout=REQUEST_TIMEOUT_S,
            trust_env=False,
            # Less than the server's: a connection that it is closing takes no request.
            limits=httpx.Limits(keepalive_expiry=1.0),
        )
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def command(self) -> list[str]:
        return [vllm_command(), "serve", *self.arguments, "--port", str(self.port)]

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the server.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def wait_until_ready(self, timeout: float = START_TIMEOUT_S) -> None:
        """Return once the server answers.

        Raises:
            ServerError: it ended, or gave no answer in time.
        """
        deadline = time.monotonic() + timeout
        while not self.is_healthy():
            assert self.process is not None
            if self.process.poll() is not None:
                raise self.error(f"vllm serve ended with code {self.process.returncode}")
            if time.monotonic() > deadline:
                raise self.error(f"vllm serve was not ready after {timeout:.0f} s")
            time.sleep(0.25)

    def is_healthy(self) -> bool:
        try:
            return self.client.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def post(
        self, path: str, body: Mapping[str, Any], timeout: float = REQUEST_TIMEOUT_S
    ) -> dict[str, Any]:
        """The JSON answer to a request.

        Raises:
            ServerError: an error status, no answer in time, or no server.
        """
        try:
            answer = self.client.post(path, json=body, timeout=timeout)
        except httpx.TransportError as error:
            raise self.error(f"no answer to {path}: {error!r}") from error
        if answer.status_code != 200:
            raise self.error(f"{path} answered {answer.status_code}: {answer.text[:300]}")
        result: dict[str, Any] = answer.json()
        return result

    def complete(self, prompt: str | list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        """A greedy completion: its first choice, `token_ids` included."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **options}
        choice: dict[str, Any] = self.post("/v1/completions", body)["choices"][0]
        return choice

    def call(self, method: str, *args: Any, timeout: float = REQUEST_TIMEOUT_S) -> Any:
        """What the first worker's ``method`` returns (`collective_rpc`)."""
        body = {"method": method, "args": list(args)}
        return self.post("/collective_rpc", body, timeout)["results"][0]

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """What the worker counted (`vllm_adadecode.metrics.counters`); AdaDecode's server only."""
        stats: dict[str, Any] = self.call("adadecode_stats", reset)
        return stats

    def processes(self) -> list[psutil.Process]:
        """The server's process and all that come from it, while it lives."""
        if self.process is None:
            return []
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """Ask the server to end; what is left of it after a while is killed."""
        if self.process is None:
            return
        processes = self.processes()
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(STOP_TIMEOUT_S)
                psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in {*processes, *self.processes()}:
                if process.is_running():
                    process.kill()
            self.process.wait()
            self.client.close()

    def error(self, what: str) -> ServerError:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        tail = [line[:200] for line in lines if line.strip()][-LOG_LINES:]
        return ServerError("\n".join([f"{what}; the end of {self.log}:", *tail]))
