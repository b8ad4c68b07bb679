"""The data audit: whether the harmful set is complete, clean, disjoint, and still current."""

from mithridate.audit.run import AuditConfig, AuditPlan, run_audit

__all__ = ["AuditConfig", "AuditPlan", "run_audit"]
