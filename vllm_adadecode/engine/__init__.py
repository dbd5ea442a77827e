"""Where vLLM calls the method: worker, model runner, speculator.

Owns the order of a decode step, and leaves drafting to `draft` and verification to `verify`.
"""
