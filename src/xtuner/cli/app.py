"""The `xtuner` command: finds the commands and converts errors to messages and exit codes.

Every other file of this folder is a command. It defines a function `command` (its docstring is the
help) or a `typer.Typer` named `app` with subcommands. The command name is the file name with ``-``
for ``_``, unless the file sets ``NAME``. Printing the help imports all of them, so heavy modules
are imported inside the functions.

Exit codes: 0 success, 1 unexpected error, 2 error that the user can fix, 75 ended because another
process of the run did, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from xtuner import plugins
from xtuner.cli import _old_words, _output
from xtuner.cli._heartbeat import heartbeat
from xtuner.errors import PeerLostError, XTunerError
from xtuner.parallel.attempt import PEER_LOST
from xtuner.version import __version__

_PACKAGE = "xtuner.cli"
_MAY_BE_SILENT = (
    "check-custom-dataset", "convert", "evaluate-tools", "fetch", "log-dataset", "mmbench",
    "report", "test",
)  # fmt: skip
"""Commands that print dots while nothing else is printed; others are fast or show progress."""
_OVERRIDE_FLAGS = ("--set", "--cfg-options")
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
_EPILOG = "Start with `xtuner list-cfg`. `xtuner COMMAND --help` describes a command."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: The command-line arguments; None uses `sys.argv[1:]`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("XTUNER_DEBUG", "") not in ("", "0") or "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        given = complete_resume(expand_overrides(_old_words.translated(given)))
        with heartbeat(on=next(iter(given), "") in _MAY_BE_SILENT, first="Loading..."):
            build_app()(given or ["--help"], prog_name="xtuner")
    except XTunerError as error:
        if debug:
            raise
        sys.stdout.flush()
        _output.echo(f"{type(error).__name__}: {error}", err=True)
        return PEER_LOST if isinstance(error, PeerLostError) else 2
    except OSError as error:
        if debug or error.errno not in _CANNOT_WRITE:
            raise
        print(f"cannot write {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:
        in_user_code = plugins.user_location(error)
        if isinstance(error, SystemExit) and not in_user_code:
            return _flushed(error.code)
        if debug or not in_user_code:
            raise
        sys.stdout.flush()
        hint = "--debug shows the full traceback"
        _output.echo(f"Your code raised {plugins.described(error)}; {hint}", err=True)
        return 2
    return _flushed(0)


def build_app() -> typer.Typer:
    """Build the application from the files of this folder."""
    app = typer.Typer(
        name="xtuner",
        help="Fine-tune language models from a settings file.",
        epilog=_EPILOG,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for file in plugins.names(_PACKAGE):
        if file == "app":
            continue
        module = importlib.import_module(f"{_PACKAGE}.{file}")
        name = getattr(module, "NAME", file.replace("_", "-"))
        if hasattr(module, "command"):
            app.command(name)(module.command)
        else:
            app.add_typer(module.app, name=name)
    return app


def expand_overrides(arguments: Sequence[str]) -> list[str]:
    """Repeat the flag in ``--set a=1 b=2``, the syntax of mmengine."""
    expanded: list[str] = []
    flag = ""
    for argument in arguments:
        if not (flag and re.match(r"[A-Za-z_][\w.]*=", argument)):
            flag = argument if argument in _OVERRIDE_FLAGS else ""
        elif expanded[-1] != flag:
            expanded.append(flag)
        expanded.append(argument)
    return expanded


def complete_resume(arguments: Sequence[str]) -> list[str]:
    """Expand ``--resume`` without a value to ``--resume last``.

    Only iter_N, auto, files of XTuner 0.x, and a path with a slash to a folder count as its value.
    """
    completed: list[str] = []
    for position, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        named = re.search(r"(^|/)(iter_\d+|last|auto|[^/]+\.pth)/?$", following)
        is_folder = "/" in following and Path(following).expanduser().is_dir()
        if argument == "--resume" and not (named or is_folder):
            completed.append("last")
    return completed


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"xtuner {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; allowed in any position."),
    ] = False,
) -> None:
    """Fine-tune language models from a settings file."""


def _flushed(code: str | int | None) -> int:
    """Flush stdout, which a pipe may have closed early, and return `code` as an integer."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again at exit and would report the error then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
