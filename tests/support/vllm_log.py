"""What vLLM's loggers write, for tests to read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_of_vllm(name: str = "vllm.v1.metrics.loggers") -> Iterator[list[str]]:
    """Lines that loggers of this name write, by default those of vLLM's statistics."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(name), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
