"""Helpers of test_cpu_kernels.py and test_cpu_engine.py."""
