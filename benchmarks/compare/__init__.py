"""Speculative methods on the same target and the same prompts, each on a real server of its own.

The load is sent by vLLM's own generator (`benchmarks.load`); this package owns what that lacks:
several methods in turn, repetitions that take turns, ratios with their spread, whether outputs are
vanilla's, going on after a stop, and the report.
"""
