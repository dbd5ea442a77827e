"""``python -m vllm_adadecode.cli``: the command where its script is not on the path."""

import sys

from vllm_adadecode.cli import main

sys.exit(main())
