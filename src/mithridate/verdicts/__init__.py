"""From measured rows to verdicts: cells, conditions, gates and the acceptance card."""

from mithridate.verdicts.cells import RANK, Term
from mithridate.verdicts.verdict import judge_measured, judge_run

__all__ = ["RANK", "Term", "judge_measured", "judge_run"]
