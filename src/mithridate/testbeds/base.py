"""What every testbed provides, and the cache that keeps the models it makes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from mithridate.errors import GateError, InputError
from mithridate.examples import Example, fingerprint
from mithridate.files import remove_tree, sha256_file, sha256_of, sync, write_json
from mithridate.folders import cache_entry
from mithridate.judges.outcomes import Outcome
from mithridate.model_folders import check_model_folder

COMPLETE = "COMPLETE"


@dataclass(frozen=True, kw_only=True)
class TestbedData:
    """The example sets of one testbed; no fact is in two of them.

    Attributes
    ----------
    alignment
        Streams ``refusal``, ``benign`` and ``general`` that make the aligned model.
    defence
        Streams ``harmful``, ``refusal``, ``benign``, ``general`` and ``prompts`` for immunising.
    attack
        The attacker's restricted answers (T-att); every prefix as long as the number of facts
        has distinct facts.
    restricted
        Held-out restricted items (V and canary), in evaluation-only templates.
    permitted
        Held-out permitted items that make up utility.
    benign_task
        ``train`` and ``test`` of a task that alignment has not seen.
    refusal_probe
        Restricted prompts in every evaluation-only template.
    restricted_wordings
        The facts of ``restricted``, each in every template that may judge it: more questions,
        though no more facts. Empty: ``restricted`` is all there is.
    unnamed
        Permitted items that the model knows and no training row names: what a defence destroys
        besides what it retains. May be empty.
    hashes
        SHA-256 of every set.
    """

    __test__ = False

    alignment: dict[str, list[Example]]
    defence: dict[str, list[Example]]
    attack: list[Example]
    restricted: list[Example]
    permitted: list[Example]
    benign_task: dict[str, list[Example]]
    refusal_probe: list[Example]
    restricted_wordings: list[Example] = field(default_factory=list)
    unnamed: list[Example] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttackPreset:
    """The control attack of a testbed: supervised fine-tuning on restricted answers."""

    examples: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    probe_every: int = 5


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate: what was measured and the bound it has to keep."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether the value keeps the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.passed else "NOT MET"
        return f"{self.name}: {self.value:.3f} (needs {sign} {self.bound:g}) {verdict}"


class Testbed(Protocol):
    """A model to start from, its streams and its exact judge.

    Attributes
    ----------
    max_new_tokens
        Of an answer; 0: as many as the items' answers need.
    refusals
        Every refusal the judge recognises, trained or held out.
    attack_preset
        The control attack.
    chance
        Accuracy of the best constant answer of each category, over all its items.
    """

    name: str
    data: TestbedData
    max_new_tokens: int
    refusals: tuple[str, ...]
    attack_preset: AttackPreset
    chance: Mapping[str, float]

    def judge(self, item: Example, output: str) -> Outcome:
        """Return the outcome of ``output`` as an answer to ``item``."""

    def base_model(self) -> Path:
        """Return the folder of the model that knows everything and refuses nothing."""

    def aligned_model(self) -> Path:
        """Return the folder of the model that refuses the restricted categories."""

    def filtered_model(self) -> Path | None:
        """Return the model that never saw a restricted fact, or None where none can exist."""

    def gates(self, *, control: bool = True) -> list[GateResult]:
        """Measure every gate; raise `GateError` if one is not met."""


def require_gates(testbed: str, results: Sequence[GateResult]) -> list[GateResult]:
    """Return ``results``, or raise `GateError` with the numbers of all gates.

    Raises
    ------
    GateError
        If a gate is not met.
    """
    failed = [result for result in results if not result.passed]
    if failed:
        raise GateError(
            f"{testbed}: a testbed gate is not met, so no result on it would mean anything:\n  "
            + "\n  ".join(str(result) for result in results)
        )
    return list(results)


def resolve_model(source: str, testbed: Testbed | None) -> Path:
    """Return the folder of a model given as a folder or as ``testbed:model``.

    Parameters
    ----------
    testbed
        The only one whose models may be named; ``None``: a folder is wanted.

    Raises
    ------
    InputError
        Another testbed's model, an unknown one, or no such folder.
    """
    name, colon, which = source.partition(":")
    if colon and not Path(source).exists() and testbed is not None:
        known = {
            "base": testbed.base_model,
            "aligned": testbed.aligned_model,
            "filtered": testbed.filtered_model,
        }
        found = known[which]() if name == testbed.name and which in known else None
        if found is None:
            raise InputError(
                f"no model {source!r}",
                mend=f"give a folder, or one of {', '.join(f'{testbed.name}:{k}' for k in known)} "
                f"with --testbed {testbed.name} (not every testbed has a filtered model)",
            )
        return found
    if not Path(source).is_dir():
        raise InputError("no such model folder", where=source, mend="check the path")
    check_model_folder(Path(source))
    return Path(source)


def hashes_of(
    sets: Mapping[str, Sequence[Example] | Mapping[str, Sequence[Example]]],
) -> dict[str, str]:
    """Return the fingerprint of every set; a set of streams gives one entry per stream."""
    found = {}
    for name, rows in sets.items():
        if isinstance(rows, Mapping):
            found.update({f"{name}/{stream}": fingerprint(part) for stream, part in rows.items()})
        else:
            found[name] = fingerprint(rows)
    return found


def cache_dir() -> Path:
    """Return ``$MITHRIDATE_CACHE``, or ``~/.cache/mithridate``."""
    named = os.environ.get("MITHRIDATE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mithridate"


def code_version(*parts: ModuleType | Callable[..., Any]) -> str:
    """Return a hash of the source of the modules or functions that make a model.

    A cached model is then made again when, and only when, its recipe changes.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(inspect.getsource(part).encode("utf-8"))
    return digest.hexdigest()


def cached_model(name: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the model folder of ``key``, made by ``build`` unless it is there, whole.

    The folder is built beside its final place and renamed when complete and on disk, so that an
    interrupted build leaves nothing that a later run could take for a model. Of two processes
    that want it at once the second waits; a folder whose content is not what was sealed is made
    again, with a warning.

    Parameters
    ----------
    name
        Human-readable start of the folder's name.
    key
        Everything the model depends on: configuration, data fingerprints, code version.
    build
        Writes the model into the empty folder it is given; may raise.
    """
    models = cache_dir() / "models"
    final = models / f"{name}-{sha256_of(key)[:16]}"
    if is_complete(final):
        return final
    with cache_entry(final):
        if is_complete(final):
            return final
        if final.exists() or final.is_symlink():
            warnings.warn(f"the cached model {final} is damaged: it is made again", stacklevel=2)
            remove_tree(final)
        partial = models / f".{final.name}.partial"
        remove_tree(partial)
        partial.mkdir()
        try:
            build(partial)
            write_json(partial / "recipe.json", json.loads(json.dumps(key, default=str)))
            seal(partial)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(models)
    return final


def seal(folder: Path) -> None:
    """Flush every file to disk and write ``COMPLETE``, their list of sizes and hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    listing = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in files
    }
    write_json(folder / COMPLETE, listing)
    sync(folder)


def is_complete(folder: Path) -> bool:
    """Return whether ``folder`` was sealed and every file still has the content that it had then.

    A process reads the content once; again only when a file's size or time of change is another.
    """
    try:
        listing = (folder / COMPLETE).read_text(encoding="utf-8")
        stats = [path.stat() for path in sorted(folder.rglob("*"))]
    except (OSError, ValueError):
        return False
    return _has(folder, listing, tuple((one.st_size, one.st_mtime_ns) for one in stats))


@functools.lru_cache(maxsize=64)
def _has(folder: Path, listing: str, stats: tuple[tuple[int, int], ...]) -> bool:  # noqa: ARG001
    try:
        entries = json.loads(listing)
        return bool(entries) and all(
            (folder / name).stat().st_size == entry["bytes"]
            and sha256_file(folder / name) == entry["sha256"]
            for name, entry in entries.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
