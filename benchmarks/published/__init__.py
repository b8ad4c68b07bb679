"""The published claims as a table: what was said, what was measured here, what follows."""

from published.judging import Judged, Measurement, judge
from published.run import ClaimsPlan, run_claims
from published.statements import Claim, read_claims

__all__ = ["Claim", "ClaimsPlan", "Judged", "Measurement", "judge", "read_claims", "run_claims"]
