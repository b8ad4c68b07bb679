"""Harmless stand-ins for harm: a model to start from, its streams and an exact judge."""

from mithridate.registry import Registry

TESTBEDS = Registry(
    "testbed",
    "mithridate.testbeds",
    {
        "atlas": "mithridate.testbeds.atlas:Atlas",
        "lattice": "mithridate.testbeds.lattice:Lattice",
    },
)

__all__ = ["TESTBEDS"]
