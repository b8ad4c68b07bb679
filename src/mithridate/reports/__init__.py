"""The report: one self-contained page per run."""

from mithridate.reports.page import render_report

__all__ = ["render_report"]
