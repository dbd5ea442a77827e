"""What heads are worth on given data, before anything is served.

A *trace* (trace.py) holds what the heads say at every position of a sequence; from traces alone
follow the engine's counts (simulate.py), their price (costs.py), the numbers of a report
(metrics.py) and the settings that pay best (calibrate.py).
"""
