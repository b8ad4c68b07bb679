"""Atomic, complete writes and content hashes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path, PurePath
from typing import Any


def write_atomic(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file so that readers see either the old content or the whole new one.

    A link in its place is replaced, not followed.

    Parameters
    ----------
    private
        Only its owner may read it, from the first byte on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    # Not tempfile: its files are private whatever the user's umask says.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    mode = 0o600 if private else 0o666
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise


def remove_tree(path: Path) -> None:
    """Remove a folder with all it holds; of a link only the link, not what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically; NaN is refused."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_kept(path: Path, key: str, value: Any) -> None:
    """Write what was found under the hash of all that decides it, for `read_kept`."""
    write_json(path, {"key": key, "sha256": sha256_of(value), "value": value})


def read_kept(path: Path, key: str) -> Any | None:
    """Return what `write_kept` has kept under ``key``, or None.

    What is kept under another key is none; so is, with a warning, what cannot be read or has
    changed since.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        if sha256_of(kept["value"]) == kept["sha256"]:
            return kept["value"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    warnings.warn(f"{path} is damaged: it is made again", stacklevel=2)
    return None


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of ``value``'s canonical JSON.

    Mappings, sets, other iterables and paths are written as what they hold; anything else that
    JSON lacks is a `TypeError`, because its text may hold a memory address.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, AbstractSet):
        return sorted(value)
    if isinstance(value, Iterable):
        return list(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no content to hash")
