"""Alignment-time defences, each one file that reads like its paper's page."""

from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.registry import Registry

METHODS = Registry(
    "method",
    "mithridate.methods",
    {
        "sft": "mithridate.methods.sft:SFT",
        "sdd": "mithridate.methods.sdd:SDD",
        "ctrap": "mithridate.methods.ctrap:CTRAP",
        "seam": "mithridate.methods.seam:SEAM",
        "vaccine": "mithridate.methods.vaccine:Vaccine",
        "tvaccine": "mithridate.methods.tvaccine:TVaccine",
        "booster": "mithridate.methods.booster:Booster",
        "repnoise": "mithridate.methods.repnoise:RepNoise",
        "trajectory": "mithridate.methods.trajectory:Trajectory",
    },
)

__all__ = ["METHODS", "Method", "MethodConfig", "RunContext"]
