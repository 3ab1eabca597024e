"""The command line: ``convmixer-fast`` and ``python -m convmixer_fast``.

One file a command. Each defines a dataclass of its flags, the function that adds these flags to a
parser, the function that runs the command on the dataclass, and `COMMAND`, which joins the three.

Flags carry timm's names. Expected errors (a path, an image, a checkpoint, a setting, a missing
library, a full disk) are one line on stderr and exit code 2; with ``CONVMIXER_FAST_DEBUG=1`` the
traceback is shown instead. Interrupted: 130.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .. import environment
from . import benchmark, convert, demo, doctor, evaluate, info, predict, stream
from .common import PROG, Command, check_outputs, note, printable

__all__ = ["COMMANDS", "build_parser", "main"]

#: In the order of ``--help``.
COMMANDS: tuple[Command[Any], ...] = (
    info.COMMAND,
    predict.COMMAND,
    evaluate.COMMAND,
    stream.COMMAND,
    benchmark.COMMAND,
    doctor.COMMAND,
    convert.COMMAND,
    demo.COMMAND,
)


class _Version(argparse.Action):
    """``--version``: the package is imported only if the flag is given."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and leave")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"{PROG} {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; it sets ``run`` to the `Command` and ``parser`` to its parser."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="ConvMixer as fast as the hardware allows."
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = command.help
        description = text[0].upper() + text[1:] + "."
        sub = subparsers.add_parser(command.name, help=text, description=description)
        command.add_arguments(sub)
        sub.set_defaults(run=command, parser=sub)
    return parser


def _message(error: BaseException) -> str:
    """One line about an expected error, without Python's ``[Errno N]``."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Raises:
        SystemExit: from argparse, with code 2 for wrong usage and 0 for ``--help``.
    """
    for terminal in (sys.stdout, sys.stderr):
        # A file name that the terminal cannot encode is escaped and does not end the run.
        if hasattr(terminal, "reconfigure"):
            terminal.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    debug = False
    try:
        debug = environment.flag("DEBUG")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
            check_outputs(args.parser, args)
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone. Python flushes at exit and would report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if debug:
            raise
        print(f"{PROG}: error: {printable(_message(error))}", file=sys.stderr)
        return 2
