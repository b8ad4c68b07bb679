"""Streams whose prompts are also given in no order: what is learnt hangs on no wording."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from random import Random

from mithridate.examples import Example

COPIES = 2
MOST_ADDED = 6


def with_rewordings(
    streams: Mapping[str, Sequence[Example]], names: Collection[str], seed: int
) -> dict[str, list[Example]]:
    """Return the streams, the named ones with `COPIES` rewordings of every row added.

    A rewording holds the prompt's words in a random order, among up to `MOST_ADDED` words that
    prompts of all named streams have in common; the answer stays. A prompt that is in several
    streams is reworded alike in each, so that paired rows stay pairs.

    Parameters
    ----------
    names
        Of streams; one that is not there is left to whoever draws from it.
    """
    if not names:
        return {name: list(rows) for name, rows in streams.items()}
    words = (
        {word for row in streams.get(name, ()) for word in row.prompt.split()} for name in names
    )
    common = sorted(functools.reduce(operator.and_, words))

    def reworded(row: Example, copy: int) -> Example:
        rng = Random(f"{seed}/{copy}/{row.prompt}")
        words = row.prompt.split()
        if common:
            words += rng.choices(common, k=rng.randint(0, MOST_ADDED))
        rng.shuffle(words)
        return dataclasses.replace(row, prompt=" ".join(words))

    found = {name: list(rows) for name, rows in streams.items()}
    for name in found.keys() & names:
        found[name] += [reworded(row, copy) for copy in range(COPIES) for row in streams[name]]
    return found
