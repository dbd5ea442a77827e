"""Which passes a KV connector must not see.

vLLM tells a connector of every layer of a scheduled batch, and hands it the scheduler's orders for
that batch. Owns the context for what is no such batch: draft passes, and rounds of our own before
the first request.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.distributed.kv_transfer import has_kv_transfer_group
from vllm.v1.worker.gpu.kv_connector import KVConnector


@contextmanager
def hidden_from(kv_connector: KVConnector) -> Iterator[None]:
    """Have the runner's connector, if there is one, told of nothing."""
    if not has_kv_transfer_group():
        # There is none, or vLLM has disabled it for longer.
        yield
        return
    kv_connector.set_disabled(True)
    try:
        yield
    finally:
        kv_connector.set_disabled(False)
