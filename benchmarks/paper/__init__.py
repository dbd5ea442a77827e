"""The paper's experiments: its sweep of the confidence threshold, and its three sanity checks.

All of them are comparisons (`benchmarks.compare`) of AdaDecode with itself under other settings.
This package owns the settings and what is reported; `benchmarks.threshold_sweep` and
`benchmarks.sanity` are the commands.
"""
