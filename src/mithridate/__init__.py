"""mithridate: plant a collapse trap in an open-weight language model, attack it, judge it."""

from __future__ import annotations

__version__ = "0.1.0"
