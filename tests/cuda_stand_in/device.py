"""The device: what PyTorch and vLLM are told of it, and where its tensors really are.

Import it before vLLM. All that it replaces stays replaced: its process serves nothing else.
"""

import os
import sys
from contextlib import nullcontext
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# vLLM takes FlashInfer for granted.
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"

import torch

# They look for CUDA as they are imported, and must not find it.
import torch._dynamo
import torch._inductor.utils
import triton.backends

from tests.cuda_stand_in import operators

MEMORY = 16 << 30


class Stream:
    """All work is done as soon as it is asked for."""

    cuda_stream = stream_id = 0
    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


STREAM = Stream()
PROPERTIES = SimpleNamespace(
    name="stand-in",
    major=9,
    minor=0,
    total_memory=MEMORY,
    multi_processor_count=132,
    is_integrated=False,
)
# Of torch.cuda and of torch.accelerator, whichever has it.
ANSWERS: dict[str, Any] = {
    "current_device": lambda: 0,
    "current_device_index": lambda: 0,
    "current_stream": lambda device=None: STREAM,
    "default_stream": lambda device=None: STREAM,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "empty_host_cache": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_memory_info": lambda device=None: (MEMORY, MEMORY),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "is_initialized": lambda: True,
    "manual_seed_all": lambda seed: None,
    "max_memory_allocated": lambda device=None: 0,
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda device=None: None,
    "set_device": lambda device: None,
    "set_device_index": lambda device: None,
    "set_rng_state": lambda state, device=None: None,
    "set_stream": lambda stream: None,
    "stream": lambda stream: nullcontext(),
    "synchronize": lambda device=None: None,
    "Stream": Stream,
    "Event": Event,
}


def _stand_in_for_torch() -> None:
    for module in (torch.cuda, torch.accelerator):
        for name in ANSWERS.keys() & set(dir(module)):
            setattr(module, name, _of_its_own(ANSWERS[name]))
    for name, value in (("Stream", Stream), ("Event", Event)):
        setattr(torch, name, value)
    torch.version.cuda = "13.0"
    torch.cuda.memory.get_allocator_backend = lambda: "stand-in"
    # Memory is pinned for a driver.
    for name in ("empty", "zeros", "ones", "tensor"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self


def _of_its_own(answer: Any) -> Any:
    """Dynamo tells functions apart by identity."""
    if isinstance(answer, type):
        return answer
    return FunctionType(answer.__code__, globals(), argdefs=answer.__defaults__)


def _unpinned(function: Any) -> Any:
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return make


class _OnCpu(ModuleType):
    """`torch` for a module that names its device itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")


def _nothing(*_: Any, **__: Any) -> None: ...


def _stand_in_for_platform() -> None:
    sys.modules.update(operators.define())
    import vllm.platforms

    # The operators that it shares with CUDA's.
    vllm.platforms.current_platform.import_kernels()
    # This build of vLLM is for CPUs.
    vllm.platforms.vllm_version_matches_substr = lambda text: False
    for name, backend in triton.backends.backends.items():
        backend.driver.is_active = staticmethod(lambda name=name: name == "nvidia")
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Platform(NonNvmlCudaPlatform):
        device_type = "cpu"
        dispatch_key = "CPU"
        dist_backend = "gloo"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            base = "vllm.distributed.device_communicators.base_device_communicator"
            return f"{base}.DeviceCommunicatorBase"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return PROPERTIES.multi_processor_count

        @classmethod
        def use_custom_allreduce(cls) -> bool:
            return False

        def graph_pool_handle(self) -> tuple[int, int]:
            return (0, 0)

    vllm.platforms._current_platform = Platform()


def _stand_in_for_vllm() -> None:
    import vllm.triton_utils
    from vllm import _custom_ops

    assert vllm.triton_utils.HAS_TRITON
    for name in dir(_custom_ops):
        if name.startswith("cutlass") and "support" in name:
            setattr(_custom_ops, name, lambda *_: False)
    # Warm-ups of other models' kernels, which need torchvision.
    for warmup in ("minimax_m3_msa_warmup", "qwen_vl_triton_warmup", "step5_dsa_warmup"):
        name = f"vllm.model_executor.warmup.{warmup}"
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name])[warmup] = _nothing

    import vllm.utils.torch_utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    # So that outputs can be the same to the bit.
    FlashAttentionBackend.supported_dtypes = [torch.float32]
    vllm.utils.torch_utils.get_accelerator_view_from_cpu_tensor = lambda tensor: tensor

    import vllm.v1.worker.gpu_worker
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.v1.sample.ops import topk_topp_sampler

    from vllm_adadecode.cpu.install import fitted_replacements

    # The interpreter can't run these two.
    masked = topk_topp_sampler.apply_top_k_top_p_pytorch
    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **_: masked(logits, k, p)
    topk_topp_sampler.register_top_k_top_p_warmups = _nothing
    bitmask = "vllm.v1.worker.gpu.structured_outputs._apply_grammar_bitmask_kernel"
    register_kernels({bitmask: fitted_replacements()[bitmask]})
    vllm.v1.worker.gpu_worker.torch = _OnCpu("torch")
    worker = vllm.v1.worker.gpu_worker.Worker
    init_device = worker.init_device

    def init_cuda_device(self: Any) -> None:
        self.device_config.device_type = "cuda"
        init_device(self)

    worker.init_device = init_cuda_device


def _stand_in_for_method() -> None:
    """The method asks tensors where they are."""
    from vllm_adadecode.engine import speculator as proposer
    from vllm_adadecode.kernels import tuning
    from vllm_adadecode.model.draft_lm_head import HeadProjection

    resolve, init = proposer.resolve_draft_loop, HeadProjection.__init__
    blocks = tuning.default_config
    # The interpreter takes its time for each block, however large.
    tuning.default_config = lambda *size: {**blocks(*size), "BLOCK_V": 1024, "BLOCK_K": 256}

    def init_with_kernels(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.use_kernels = True

    proposer.resolve_draft_loop = lambda vllm_config, device_type: resolve(vllm_config, "cuda")
    HeadProjection.__init__ = init_with_kernels  # type: ignore[method-assign]


_stand_in_for_torch()
_stand_in_for_platform()
_stand_in_for_vllm()
_stand_in_for_method()
