"""Harmless stand-ins for harm: a model to start from, its streams and an exact judge."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from mithridate.registry import Registry

if TYPE_CHECKING:
    from mithridate.testbeds.base import Testbed

TESTBEDS = Registry(
    "testbed",
    "mithridate.testbeds",
    {
        "atlas": "mithridate.testbeds.atlas:Atlas",
        "lattice": "mithridate.testbeds.lattice:Lattice",
    },
)


@functools.cache
def load_testbed(name: str) -> Testbed:
    """Return a registered testbed, made once in each process."""
    made: Testbed = TESTBEDS.load(name)()
    return made


__all__ = ["TESTBEDS", "load_testbed"]
