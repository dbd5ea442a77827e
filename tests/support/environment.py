"""What the environment must say before vLLM is imported, here and in the processes started."""

import os

os.environ.setdefault("ADADECODE_CHECK_KV", "1")
# Engines in the test's own process start in a second and can be looked into. What needs processes
# is tested with the real server (test_server.py).
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# The models are tiny: a second thread gains nothing and spins when something else wants its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
