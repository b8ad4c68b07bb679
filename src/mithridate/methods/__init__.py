"""Alignment-time defences, each one file that reads like its paper's page."""

from typing import Any

from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.registry import Registry


class _Methods(Registry):
    """The registered methods, and as ``a+b`` every composition of them."""

    def load(self, name: str) -> Any:
        if "+" in name:
            from mithridate.methods.compose import composed

            return composed(name)
        return super().load(name)


METHODS = _Methods(
    "method",
    "mithridate.methods",
    {
        "sft": "mithridate.methods.sft:SFT",
        "sdd": "mithridate.methods.sdd:SDD",
        "ctrap": "mithridate.methods.ctrap:CTRAP",
        "seam": "mithridate.methods.seam:SEAM",
        "tokenbuncher": "mithridate.methods.tokenbuncher:TokenBuncher",
        "vaccine": "mithridate.methods.vaccine:Vaccine",
        "tvaccine": "mithridate.methods.tvaccine:TVaccine",
        "booster": "mithridate.methods.booster:Booster",
        "repnoise": "mithridate.methods.repnoise:RepNoise",
        "trajectory": "mithridate.methods.trajectory:Trajectory",
        "tar": "mithridate.methods.tar:TAR",
        "lox": "mithridate.methods.lox:LoX",
    },
)

__all__ = ["METHODS", "Method", "MethodConfig", "RunContext"]
