"""The paper's experiments: its sweep of the confidence threshold, and its three sanity checks.

Both are one comparison (`benchmarks.compare`) of AdaDecode with itself under other settings, beside
vanilla. This package owns these settings (`settings.py`), the verdicts (`checks.py`) and what is
reported (`__main__.py`, the command).
"""
