"""Where vLLM's OffloadingConnector puts KV in tests: vLLM's own copies need a GPU.

Everything but the copying is vLLM's: which blocks are stored and loaded, and when.
"""

from collections.abc import Iterator
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

OFFLOADING: dict[str, Any] = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "OffloadingSpec",
        "spec_module_path": __name__,
        "cpu_bytes_to_use": 64 << 20,
        # What is generated as well.
        "offload_prompt_only": False,
    },
}


class Copies(OffloadingWorker):
    """Copies whole blocks at once, when it is asked to."""

    loaded = 0

    def __init__(self, kv_caches: CanonicalKVCaches) -> None:
        self._tensors = [t.tensor for t in kv_caches.tensors]
        self._blocks: dict[int, list[torch.Tensor]] = {}
        self._done: list[int] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        for block, chunk in self._pairs(job_id, src_spec, dst_spec):
            self._blocks[chunk] = [tensor[block].clone() for tensor in self._tensors]
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        for block, chunk in self._pairs(job_id, dst_spec, src_spec):
            for tensor, stored in zip(self._tensors, self._blocks[chunk], strict=True):
                tensor[block] = stored
            Copies.loaded += 1
        return True

    def _pairs(
        self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec
    ) -> Iterator[tuple[int, int]]:
        assert isinstance(chunks, CPULoadStoreSpec)
        self._done.append(job_id)
        return zip(blocks.block_ids.tolist(), chunks.chunk_ids.tolist(), strict=True)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return [TransferResult(job_id, success=True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None: ...


class OffloadingSpec(CPUOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return Copies(kv_caches)
