"""What a long run says while it works; the command line draws it, a library user may too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One sign of life.

    Parameters
    ----------
    stage
        What is being done, for example ``"attacking the defended model at 1e-4"``. A new stage
        ends the one before.
    step
        Steps finished of this stage.
    total
        Steps the stage has; 0 when that is not known.
    metrics
        The newest numbers, by name.
    """

    stage: str
    step: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore every event: the default listener."""
