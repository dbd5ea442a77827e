"""The name by which vLLM, heads checkpoints and users know the method."""

METHOD = "adadecode"
