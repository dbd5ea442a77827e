"""AdaDecode self-speculative decoding for vLLM, as an out-of-tree plugin."""

__version__ = "0.1.0"
