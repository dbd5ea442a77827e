"""AdaDecode self-speculative decoding for vLLM, as an out-of-tree plugin.

The public API of the package: everything else may change with any version. What needs torch or vLLM
is imported when it is first asked for, since vLLM loads the plugin in every process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm_adadecode.config import AdaDecodeSpeculativeConfig
    from vllm_adadecode.heads import HeadsConfig, load_heads, save_heads

__version__ = "0.1.0"

__all__ = [
    "METHOD",
    "AdaDecodeError",
    "AdaDecodeSpeculativeConfig",
    "HeadsConfig",
    "__version__",
    "load_heads",
    "save_heads",
]

_MODULES = {
    "AdaDecodeSpeculativeConfig": "vllm_adadecode.config",
    "HeadsConfig": "vllm_adadecode.heads",
    "load_heads": "vllm_adadecode.heads",
    "save_heads": "vllm_adadecode.heads",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
