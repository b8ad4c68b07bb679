"""A thin registry: a name maps to a lazy ``module:object``; third parties add entry points."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any

from mithridate.errors import InputError


class Registry:
    """Names of one kind of thing (methods, attacks, judges) and where each is defined.

    Parameters
    ----------
    kind
        Singular noun for error messages, for example ``"method"``.
    group
        Entry-point group through which other packages register.
    targets
        Our own names, each with its ``"module:object"``.
    """

    def __init__(self, kind: str, group: str, targets: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._own = targets

    def targets(self) -> dict[str, str]:
        """Return every registered name with its target; a collision is an error."""
        found = dict(self._own)
        for point in entry_points(group=self.group):
            if found.get(point.name, point.value) != point.value:
                raise InputError(
                    f"two packages register the {self.kind} {point.name!r}: "
                    f"{found[point.name]} and {point.value}",
                    mend="uninstall one of them or rename its entry point",
                )
            found[point.name] = point.value
        return found

    def names(self) -> list[str]:
        """Return the registered names."""
        return list(self.targets())

    def load(self, name: str) -> Any:
        """Import and return the object registered under ``name``."""
        targets = self.targets()
        if name not in targets:
            near = difflib.get_close_matches(name, targets, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"unknown {self.kind} {name!r}",
                mend=f"{hint}known: {', '.join(sorted(targets))}",
            )
        module, _, attribute = targets[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
