"""Checkpoints that are either complete, byte for byte, or not used at all.

A save can be killed at any moment, and the newest folder is then a ruin that the stock Trainer
would still pick (`get_last_checkpoint`). Here a checkpoint counts only once its file ``COMPLETE``,
written last, agrees with every file beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from mithridate.files import remove_tree, sha256_file, sync, write_json

COMPLETE = "COMPLETE"
_PREFIX = "checkpoint-"


def seal(folder: Path) -> None:
    """Flush a finished checkpoint to disk and mark it as complete."""
    files = _files(folder)
    for path in [*files, *{path.parent for path in files}]:
        sync(path)
    listing = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    write_json(folder / COMPLETE, listing)
    sync(folder)
    sync(folder.parent)


def is_complete(folder: Path) -> bool:
    """Tell whether every file that `seal` saw is still there with the same content."""
    try:
        listing = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    try:
        # Sizes first: they find most ruins without reading gigabytes.
        return (
            bool(listing)
            and all(
                (folder / name).is_file() and (folder / name).stat().st_size == entry["size"]
                for name, entry in listing.items()
            )
            and all(
                sha256_file(folder / name) == entry["sha256"] for name, entry in listing.items()
            )
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False  # the list itself is damaged


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in ``folder``, whole or not, newest first."""
    found = [
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(_PREFIX).isdecimal()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimiser steps that a checkpoint folder holds."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint that is complete, or ``None``."""
    return next((path for path in checkpoints(folder) if is_complete(path)), None)


def discard_all_but(folder: Path, keep: Path | None) -> None:
    """Remove every checkpoint in ``folder`` except ``keep``."""
    for path in checkpoints(folder):
        if path != keep:
            # The mark goes first, so that a removal cut short leaves nothing that looks whole.
            if not path.is_symlink():
                (path / COMPLETE).unlink(missing_ok=True)
            remove_tree(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
