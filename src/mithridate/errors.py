"""Errors that a user can act on: what happened, where, and the mend."""

from __future__ import annotations

from typing import Any

_LONGEST = 4000


class InputError(ValueError):
    """Something the user gave cannot be used. The command line exits with code 2.

    Parameters
    ----------
    what
        The cause, in one sentence.
    where
        File, line, field or option it was found in.
    mend
        What the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, mend: str) -> None:
        self.what = shortened(what)
        self.where = None if where is None else shortened(where)
        self.mend = shortened(mend)
        place = f"{self.where}: " if self.where else ""
        super().__init__(f"{place}{self.what}\n  mend: {self.mend}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders by pickling, which knows positional arguments only.
        return _input_error, (self.what, self.where, self.mend)


def shortened(text: str, most: int = _LONGEST) -> str:
    """Return ``text``, its middle left out where what a user gave has made it endless."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _input_error(what: str, where: str | None, mend: str) -> InputError:
    return InputError(what, where=where, mend=mend)


class NotApplicableError(InputError):
    """What was asked for has no place in this model: an attack so refused is not valid there."""


class RunStoppedError(RuntimeError):
    """A run stopped itself because going on would have produced a dishonest result."""


class RunInterruptedError(RunStoppedError):
    """The user stopped a run; the message says how to go on with it."""


class InactiveTermError(RunStoppedError):
    """A term of a defence is zero, skipped or fed nothing (`style.md`: loud inactivity)."""


class NonFiniteError(RunStoppedError):
    """A loss, norm or metric is NaN or infinite.

    Parameters
    ----------
    term
        The name of the term that produced it.
    """

    def __init__(self, term: str, value: float, hint: str = "") -> None:
        self.term = term
        self.value = value
        self.hint = hint
        super().__init__(
            f"the term {term!r} became {value}"
            + (f"; {hint}" if hint else "; lower the learning rate or the term's weight")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return NonFiniteError, (self.term, self.value, self.hint)


class GateError(RunStoppedError):
    """A testbed's gate is not met, so no result on it would mean anything."""
