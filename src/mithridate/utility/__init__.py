"""Utility by lm-evaluation-harness: what a defence costs before anybody attacks."""

from mithridate.utility.run import UtilityPlan, run_utility

__all__ = ["UtilityPlan", "run_utility"]
