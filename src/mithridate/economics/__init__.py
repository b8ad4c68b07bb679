"""Who pays: one-time alignment against per-query monitoring, the attacker's bill, asymmetry."""

from mithridate.economics.accounts import EconomicsPlan, run_economics
from mithridate.economics.constants import Constants, read_constants

__all__ = ["Constants", "EconomicsPlan", "read_constants", "run_economics"]
