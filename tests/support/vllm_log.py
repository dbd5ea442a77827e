"""What vLLM's statistics loggers write, for tests to read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_of_vllm() -> Iterator[list[str]]:
    """Lines that vLLM's loggers write."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("vllm.v1.metrics.loggers"), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
