"""Run folders and the cache: one process at a time, and nothing outside them is touched.

The locks are the operating system's: whatever ends a process releases what it held.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mithridate.errors import InputError
from mithridate.files import write_atomic
from mithridate.printable import printable

_LOCK, _HOLDER = ".run.lock", ".run.lock.json"
_OWN_CACHE = "set MITHRIDATE_CACHE to a folder of your own, or mend the permissions of this one"


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made where there is none, until the body ends.

    Raises
    ------
    InputError
        Another process holds it, it cannot be written, or something in it leads out of it.
    """
    made = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        lock = _lock(folder / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"another run writes into this folder{_told(folder / _HOLDER)}",
                where=str(folder),
                mend="wait until it is over, or choose another output folder",
            ) from None
        _name_holder(folder / _HOLDER)
    try:
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        if made:
            _remove_if_empty(folder)
        lock.release()


@contextmanager
def cache_entry(path: Path) -> Iterator[None]:
    """Hold an entry of the cache until the body ends; where another process does, wait for it.

    Raises
    ------
    InputError
        The cache cannot be written.
    """
    locks = path.parent.with_name("locks")
    holder = locks / f"{path.parent.name}-{path.name}.lock.json"
    with writing(path.parent, mend=_OWN_CACHE):
        for folder in (path.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
        lock = _lock(locks / f"{path.parent.name}-{path.name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            warnings.warn(f"waiting for another run{_told(holder)}, which makes {path}",
                          stacklevel=3)  # fmt: skip
            lock.acquire()
        _name_holder(holder)
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def writing(path: Path, *, mend: str = "choose another output folder") -> Iterator[None]:
    """Say in one message that ``path`` cannot be written, whatever the body comes upon."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}",
            where=str(error.filename or path),
            mend=mend,
        ) from None


def discard_conclusions(folder: Path) -> None:
    """Remove what an earlier start concluded: it is not about the rows that are written now."""
    for name in ("summary.json", "verdict.json", "tamperbench.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def refuse_links(folder: Path) -> None:
    """Refuse a folder in which a link leads out of it, or something is neither file nor folder.

    A run writes and removes below its folder; it must not do so elsewhere.

    Raises
    ------
    InputError
        Naming the first such entry.
    """
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *names)):
            if path.is_symlink():
                if path.resolve().is_relative_to(root):
                    continue
                what = "a link that leads out of the run folder"
            elif path.is_file() or path.is_dir() or not path.exists():
                continue
            else:
                what = "neither a file nor a folder"
            raise InputError(what, where=str(path), mend="remove it, or choose another folder")


def _lock(path: Path) -> FileLock:
    # What the umask takes is taken all the same: a cache may be shared by a group.
    mask = os.umask(0)
    os.umask(mask)
    return FileLock(path, mode=0o666 & ~mask)


def _name_holder(path: Path) -> None:
    who = {
        "pid": os.getpid(),
        "host": platform.node(),
        "command": " ".join(sys.argv)[:200],
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_atomic(path, json.dumps(who))


def _told(path: Path) -> str:
    """Return who holds a lock, as far as its file says."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        told = f": process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return printable(told, limit=200)


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder that was made for a run which then wrote nothing."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} == {_LOCK}:
            (folder / _LOCK).unlink()
            folder.rmdir()
