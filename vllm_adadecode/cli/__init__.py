"""The console command ``adadecode``: one sub-command a module, each with `add_parser` and `run`.

Owns the top of the command line alone. Nothing heavy is imported before a sub-command runs.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from vllm_adadecode import __version__
from vllm_adadecode.cli import calibrate, doctor, evaluate, info, train
from vllm_adadecode.errors import AdaDecodeError

COMMANDS = (train, evaluate, calibrate, info, doctor)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command; ``args.run(args)`` gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="adadecode",
        description="AdaDecode self-speculative decoding for vLLM: its heads and its set-up.",
        epilog="Serve with it: vllm serve MODEL --speculative-config adadecode",
    )
    parser.add_argument("--version", action="version", version=f"vllm-adadecode {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _not_of_cpus(record: logging.LogRecord) -> bool:
    """False for what vLLM says whenever it is imported without a GPU: no command needs Triton."""
    return "doesn't include CPU backend" not in record.getMessage()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (0 fine, 1 not fine; usage errors exit with 2)."""
    args = build_parser().parse_args(argv)
    logging.getLogger("vllm.triton_utils.importing").addFilter(_not_of_cpus)
    try:
        code: int = args.run(args)
    except AdaDecodeError as error:
        print(f"adadecode: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has left, as in `adadecode info ... | head`; nor may Python flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code
