"""Tests below this folder are collected where a CUDA device answers, and do not exist elsewhere."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
