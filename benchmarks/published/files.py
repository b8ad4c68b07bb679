"""Result files: read with every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mithridate.configs import require
from mithridate.errors import InputError


def read_results(folder: Path, name: str, testbed: str) -> dict[str, Any] | None:
    """Return ``folder/name.json``, or None where there is none.

    Raises
    ------
    InputError
        The file cannot be read, or is of another testbed.
    """
    path = folder / f"{name}.json"
    mend = "delete it, or make it again with the command that it holds"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=str(path), mend="check the file"
        ) from None
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=str(path), mend=mend) from None
    if not isinstance(document, dict):
        raise InputError("not a result file", where=str(path), mend=mend)
    found = document.get("testbed", testbed)
    require(found == testbed, f"{path}: of the testbed {found!r}, not {testbed!r}", mend)
    return document
