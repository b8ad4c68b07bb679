"""What every command shares: options, the two output streams, and how errors look."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from mithridate.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on standard output and nothing else."),
]
OutputDir = Annotated[
    Path,
    typer.Option(help="Run folder; finished work in it is kept and reused.", file_okay=False),
]

Columns = Annotated[
    list[str] | None,
    typer.Option(
        help="Which columns hold what, for all files or one stream's; an empty one is left out.",
        metavar="[STREAM:]prompt=COLUMN,answer=COLUMN",
    ),
]
DropInvalid = Annotated[
    bool,
    typer.Option(
        "--drop-invalid", help="Leave out rows that cannot be used or are too long, and count them."
    ),
]

INPUT_ERROR, STOPPED, INTERRUPTED = 2, 3, 130


def is_main_process() -> bool:
    """Tell whether this is the process of a launch that speaks for all (`torchrun` sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def err() -> Console:
    """Return the console for progress, warnings and errors."""
    return _console(stderr=True)


def out() -> Console:
    """Return the console for results meant for a reader."""
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    """Return a console that shows no text as anything but text, whoever wrote it."""
    from rich.console import Console
    from rich.segment import Segment

    class Inert(Console):
        # Everything that is shown passes here: tables, panels, progress, plain lines.
        def render(self, *given: Any, **options: Any) -> Iterator[Segment]:
            for part in super().render(*given, **options):
                text = part.text
                if part.control is None and not text.isprintable():
                    text = "\n".join(map(printable, text.split("\n")))
                yield part._replace(text=text)

    return Inert(stderr=stderr, highlight=False, markup=False, emoji=False)


@contextmanager
def quiet_stdout() -> Iterator[IO[str]]:
    """Send everything that the body or its libraries print to standard error.

    Yields
    ------
    IO[str]
        The real standard output, for the one document.
    """
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def write_document(stream: IO[str], document: Mapping[str, Any]) -> None:
    """Write the document that ``--json`` promised; one for a launch of several processes."""
    if not is_main_process():
        return
    stream.write(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n")
    stream.flush()


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning as one paragraph, without the source line that raised it."""
    from rich.text import Text

    err().print(Text("warning  ", style="yellow") + Text(printable(str(message))))


def show_error(title: str, what: str, *, where: str | None = None, mend: str | None = None) -> None:
    """Show an error on one screen: its cause, where it is, and what to do about it."""
    from rich.panel import Panel
    from rich.text import Text

    lines = [("", what, "bold")]
    if where:
        lines.append(("where  ", where, ""))
    if mend:
        lines.append(("mend   ", mend, ""))
    text = Text()
    for index, (label, content, style) in enumerate(lines):
        text.append("\n" if index else "")
        text.append(label, style="dim")
        text.append("\n".join(printable(line) for line in content.splitlines()), style=style)
    err().print(Panel(text, title=title, title_align="left", border_style="red", padding=(0, 1)))
