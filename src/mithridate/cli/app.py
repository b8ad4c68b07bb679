"""The command line: every command parses, calls one function and returns its document."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import IO, Any

import typer

from mithridate import __version__
from mithridate.allocation import keep_freed_memory
from mithridate.cli import (
    attack,
    audit,
    cost,
    demo,
    doctor,
    economics,
    immunise,
    methods,
    redteam,
    report,
    utility,
    verdict,
)
from mithridate.cli.console import (
    INPUT_ERROR,
    INTERRUPTED,
    STOPPED,
    quiet_stdout,
    show_error,
    show_warning,
    write_document,
)
from mithridate.errors import InputError, RunInterruptedError, RunStoppedError

_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip
"""Errors of the operating system that say nothing about the program: full, read-only, forbidden."""

app = typer.Typer(
    name="mithridate",
    help="Plant a collapse trap in an open-weight language model, attack it, and see what happens.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with `mithridate doctor`, then `mithridate demo --testbed lattice`.",
)
app.command()(demo.demo)
app.command()(immunise.immunise)
app.command()(attack.attack)
app.command()(redteam.redteam)
app.command()(audit.audit)
app.command()(report.report)
app.command()(verdict.verdict)
app.command()(utility.utility)
app.command()(economics.economics)
app.command()(methods.methods)
app.command()(cost.cost)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mithridate {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Plant a collapse trap in an open-weight language model, attack it, and see what happens."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Notes
    -----
    Exit codes: 0 done; 1 a gate of the audit fails; 2 something given cannot be used; 3 the run
    stopped itself, for going on would have been dishonest, or attacks of a battery failed; 130
    interrupted.
    """
    given = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    as_json = "--json" in given
    warnings.showwarning = show_warning
    # What a library means to change is nothing that a user can act on.
    warnings.simplefilter("ignore", FutureWarning)
    # Ours is the only progress shown; two displays on one terminal garble each other.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    keep_freed_memory()
    with quiet_stdout() if as_json else nullcontext() as stream:
        code = _run(given, stream)
    sys.exit(code)


def _run(arguments: list[str], stream: IO[str] | None) -> int:
    try:
        result = app(arguments, prog_name="mithridate", standalone_mode=False)
    except InputError as error:
        show_error("cannot start", error.what, where=error.where, mend=error.mend)
        document = {"what": error.what, "where": error.where, "mend": error.mend}
        return _failed(stream, "input", document, INPUT_ERROR)
    except RunInterruptedError as error:
        return _interrupted(stream, str(error))
    except RunStoppedError as error:
        show_error("the run stopped itself", str(error))
        return _failed(stream, type(error).__name__, {"what": str(error)}, STOPPED)
    except typer.TyperException as error:
        what = error.format_message()
        mend = "`mithridate --help` and `mithridate COMMAND --help` list what there is"
        show_error("cannot start", what, mend=mend)
        return _failed(stream, "usage", {"what": what, "mend": mend}, INPUT_ERROR)
    except Exception as error:
        reason = _fault_of_the_machine(error)
        if reason is None:
            raise
        what = f"it cannot be read or written: {reason}"
        path = getattr(error, "filename", None)
        where = None if path is None else str(path)
        mend = "free space, or mend the permissions, and run the same command again"
        show_error("the run stopped", what, where=where, mend=mend)
        return _failed(stream, "system", {"what": what, "where": where, "mend": mend}, STOPPED)
    if result == INTERRUPTED:
        return _interrupted(stream, "stopped by Ctrl-C")
    if isinstance(result, Mapping):
        if stream is not None:
            write_document(stream, result)
        return int(result.get("exit_code", 0))
    return int(result or 0)


def _fault_of_the_machine(error: Exception) -> str | None:
    """Return what the operating system said of a disk or a permission; None if it is not that."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors and torch write by themselves, and have errors of their own.
    if told := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(told[1])
    elif isinstance(error, RuntimeError) and "inline_container" in str(error):
        number = errno.ENOSPC
    return os.strerror(number) if number in _OF_THE_MACHINE else None


def _interrupted(stream: IO[str] | None, what: str) -> int:
    mend = "run the same command again to go on: finished work is kept in its folder"
    show_error("interrupted", what, mend=mend)
    return _failed(stream, "interrupted", {"what": what, "mend": mend}, INTERRUPTED)


def _failed(stream: IO[str] | None, kind: str, document: dict[str, Any], code: int) -> int:
    if stream is not None:
        write_document(stream, {"error": {"kind": kind, **document, "exit_code": code}})
    return code
