"""The published claims as a table: what was said, what was measured here, what follows."""

from mithridate.claims.judging import Judged, Measurement, judge
from mithridate.claims.run import ClaimsPlan, run_claims
from mithridate.claims.statements import Claim, read_claims

__all__ = ["Claim", "ClaimsPlan", "Judged", "Measurement", "judge", "read_claims", "run_claims"]
