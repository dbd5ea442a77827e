"""The demo target: a small Llama with AdaDecode heads, trained here on the standard library.

`python -m benchmarks.demo` serves it and compares; `python -m benchmarks.demo.train` makes it.
"""

import os

# Idle OpenMP threads must sleep, not spin: on two shared cores spinning costs half the speed.
# Read when torch starts, so it has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
