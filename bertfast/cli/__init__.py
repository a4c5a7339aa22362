"""The command line: `bertfast doctor | check | bench | fill-mask | embed | pretrain | finetune | predict`.

Results go to stdout, and nothing else does. Exit status: 0 all well, 1 a verdict that is no, or something broken, 2 a
mistake in what was given, 130 interrupted, 141 whoever read stdout has gone. A mistake is one line on stderr.
"""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from bertfast.cli import bench, check, doctor, embed, fill_mask, finetune, predict, pretrain
from bertfast.cli.output import UsageError, one_line, quiet_logs
from bertfast.errors import BertfastError

# Each has HELP, add_arguments(parser) and run(args) -> exit status; its docstring is what --help says.
COMMANDS = {
    "doctor": doctor,
    "check": check,
    "bench": bench,
    "fill-mask": fill_mask,
    "embed": embed,
    "pretrain": pretrain,
    "finetune": finetune,
    "predict": predict,
}

OK, BROKEN, MISUSED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bertfast", description="BERT encoders, faster: the same weights and outputs.")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        formatter = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, parents=[common], formatter_class=formatter
        )
        module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the arguments are the process's own where None. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings(), quiet_logs():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            args = _parser().parse_args(arguments)
            status = COMMANDS[args.command].run(args)
            sys.stdout.flush()
            return status
    except SystemExit as exit_:  # argparse, after --help
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain about the same thing then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except UsageError as error:
        return _fail(str(error), error.status, debug)
    except BertfastError as error:
        return _fail(str(error), MISUSED, debug)
    except Exception as error:
        more = "" if debug else " (--debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{more}", BROKEN, debug)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"bertfast: error: {one_line(message)}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"bertfast: warning: {one_line(str(message))}", file=sys.stderr)
