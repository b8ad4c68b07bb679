"""What a result came from: versions, commit, machine."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

import mithridate


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on, as manifests hold them."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mithridate": mithridate.__version__,
    }


def provenance(command: str, repository: Path) -> dict[str, str]:
    """Return the command, date, commit and machine behind a measurement.

    Parameters
    ----------
    repository
        A folder of the checkout; where it is in none, the version stands for the commit.
    """
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, cwd=repository, check=False)
        commit = found.stdout.strip()
    except OSError:
        commit = ""
    return {
        "command": command,
        "date": f"{datetime.date.today()}",
        "commit": commit or f"version {mithridate.__version__}",
        "machine": f"{os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}",
    }
