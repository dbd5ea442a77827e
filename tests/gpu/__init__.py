"""Tests that need a CUDA device; see conftest.py."""
