"""Adaptive draft length: measured step latencies, acceptance odds, and the choice they lead to."""
