"""Helpers of test_kernels.py: cases, and their comparison under Triton's interpreter."""
