"""Everything that is changed in vLLM itself: the one package that replaces its attributes."""
