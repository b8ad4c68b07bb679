"""The numbers that nobody measured here: one file with sources and ranges, and draws from it."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from mithridate.configs import from_mapping, read_yaml, require
from mithridate.errors import InputError

Draws = NDArray[np.float64]
"""One number per draw."""

_DIVISORS = frozenset(
    {"gpu.flops_bf16", "gpu.mfu_train", "gpu.decode_efficiency", "immunise.rows",
     "immunise.tokens_per_row", "immunise.epochs", "moderation.characters_per_record",
     "attack.tokens_per_row"}
)  # fmt: skip
"""What something is divided by: 0 gives no number."""

_WITHIN = 1.959963984540054  # standard deviations on each side that hold 95 % of the draws


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One number with where it comes from.

    Parameters
    ----------
    value
        The default, and the median of the draws.
    unit, source
        For the reader.
    spread
        95 % of the draws lie between ``value / spread`` and ``value * spread``; 1 is exact.
    low, high
        No draw lies outside; ``None`` bounds nothing.
    """

    value: float
    unit: str
    source: str
    spread: float = 2.0
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        require(
            0 <= self.value < math.inf,
            f"the value {self.value} is not a number from 0 up",
            "give 0 or more",
        )
        require(1 <= self.spread < math.inf, f"the spread {self.spread} is below 1", "1 is exact")
        require(
            (self.low or 0) <= self.value <= (math.inf if self.high is None else self.high),
            f"the value {self.value} lies outside its range {self.low} to {self.high}",
            "widen low or high together with the value",
        )

    def draw(self, count: int, rng: np.random.Generator) -> Draws:
        """Return ``count`` draws, log-normal within the range."""
        uniform = rng.random(count)  # always drawn, so that two constants never share a stream
        if self.value == 0 or self.spread == 1:
            return np.full(count, self.value)
        scale = math.log(self.spread) / _WITHIN
        first = ndtr(math.log(self.low / self.value) / scale) if self.low else 0.0
        last = 1.0 if self.high is None else ndtr(math.log(self.high / self.value) / scale)
        return np.asarray(self.value * np.exp(scale * ndtri(first + uniform * (last - first))))


class Values(Mapping[str, Draws]):
    """What the formulas compute with: an array of draws for each constant's key."""

    def __init__(self, draws: Mapping[str, Draws]) -> None:
        self._draws = dict(draws)
        self.count = len(next(iter(self._draws.values())))

    def __getitem__(self, key: str) -> Draws:
        return self._draws[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._draws)

    def __len__(self) -> int:
        return len(self._draws)

    def of_method(self, prefix: str, method: str, otherwise: str) -> Draws:
        """Return ``prefix.method`` where there is one, else the constant ``otherwise``."""
        return self._draws.get(f"{prefix}.{method}", self._draws[otherwise])


class Constants(Mapping[str, Constant]):
    """All constants by their dotted keys (``gpu.price_per_hour``).

    Parameters
    ----------
    table
        By key.
    overridden
        Keys that the user changed.
    """

    def __init__(self, table: Mapping[str, Constant], overridden: frozenset[str] = frozenset()):
        self._table = dict(table)
        self.overridden = overridden

    def __getitem__(self, key: str) -> Constant:
        return self._table[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def defaults(self) -> Values:
        """Return every constant at its value, as arrays of one."""
        return Values({key: np.array([constant.value]) for key, constant in self.items()})

    def draw(self, count: int, *, seed: int) -> Values:
        """Return ``count`` independent draws; a constant's own do not depend on the others."""
        return Values(
            {
                key: constant.draw(count, np.random.default_rng([seed, _number(key)]))
                for key, constant in self.items()
            }
        )

    def changed(self, **values: float) -> Constants:
        """Return a copy with other values, named with ``__`` for the dot."""
        given = {key.replace("__", "."): value for key, value in values.items()}
        table = {key: replace(self._table[key], value=value) for key, value in given.items()}
        return Constants({**self._table, **table}, self.overridden | set(given))

    def document(self) -> dict[str, dict[str, Any]]:
        """Return every constant with its source, for the record."""
        return {
            key: {**asdict(constant), "overridden": key in self.overridden}
            for key, constant in self.items()
        }


def read_constants(path: Path | None = None) -> Constants:
    """Return our constants, with those of ``path`` in their place.

    Raises
    ------
    InputError
        Unknown keys, wrong types, values outside their range: every fault together.
    """
    own = files("mithridate.economics").joinpath("constants.yaml").read_text(encoding="utf-8")
    table = {
        key: from_mapping(Constant, leaf, where=f"constants.yaml: {key}")
        for key, leaf in _leaves(yaml.safe_load(own), "")
    }
    if path is None:
        return Constants(table)
    faults, given = [], dict(_leaves(read_yaml(path), "", known=table))
    for key, leaf in given.items():
        if key not in table:
            near = difflib.get_close_matches(key, table, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            faults.append(f"unknown constant {key!r}{hint}")
            continue
        change = leaf if isinstance(leaf, Mapping) else {"value": leaf}
        try:
            table[key] = from_mapping(Constant, {**asdict(table[key]), **change}, where=key)
        except InputError as error:
            faults.append(f"{key}: {error.what}")
        else:
            if key in _DIVISORS and table[key].value == 0:
                faults.append(f"{key}: the value 0 is divided by, give more than 0")
    if faults:
        raise InputError(
            "; ".join(faults),
            where=str(path),
            mend="the --json document lists all constants with their ranges",
        )
    return Constants(table, frozenset(given))


def _leaves(
    tree: Mapping[str, Any], prefix: str, known: Container[str] = ()
) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known and "value" not in value:
            yield from _leaves(value, f"{key}.", known)
        else:
            yield key, value


def _number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big")
