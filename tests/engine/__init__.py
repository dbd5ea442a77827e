"""Tests on real vLLM engines and servers."""
