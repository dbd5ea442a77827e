"""Measurements and the demo (run from a checkout: ``python -m benchmarks...``)."""
