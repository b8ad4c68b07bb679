"""Streams: endless, shuffled draws from a set of examples; the position is the whole state."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from mithridate.chat import Batch, Encoded
from mithridate.configs import require
from mithridate.examples import evenly_by_category

State = dict[str, int]


class StreamSampler:
    """Draws batches from one stream, epoch after epoch, without ever losing its place.

    The order of epoch e is seeded by (seed, name, e), so the number of rows drawn so far is the
    whole state, and every process of a launch draws the same rows.

    Parameters
    ----------
    encoded
        The stream's rows.
    collate
        Makes a batch of rows; `ChatFormat.collate`.
    seed
        Seed of the run.
    name
        The stream's name; streams of one run are shuffled independently.
    categories
        Of each row: draws them equally often (`evenly_by_category`); ``None`` draws each row once
        an epoch.

    Raises
    ------
    InputError
        If the stream is empty.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        collate: Callable[[Sequence[Encoded]], Batch],
        *,
        seed: int,
        name: str,
        categories: Sequence[str] | None = None,
    ) -> None:
        require(
            len(encoded) > 0,
            f"the stream {name!r} has no examples",
            f"give the method examples for {name!r}",
        )
        self._encoded = encoded
        self._collate = collate
        self._seed = seed
        self._name = name
        self._categories = categories
        self._position = 0
        self._epoch = -1
        self._order: list[int] = []
        self._length = len(self._ordered(0))

    def draw(self, rows: int) -> Batch:
        """Return the next ``rows`` rows, going on into the next epoch where one ends."""
        drawn = [self._encoded[self._index(self._position + n)] for n in range(rows)]
        self._position += rows
        return self._collate(drawn)

    def state_dict(self) -> State:
        """Return what `load_state_dict` needs to go on from here."""
        return {"position": self._position, "seed": self._seed, "rows": len(self._encoded)}

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved position.

        Raises
        ------
        InputError
            If the state belongs to another seed or to a stream of another length.
        """
        here = self.state_dict()
        require(
            state["seed"] == here["seed"] and state["rows"] == here["rows"],
            f"the checkpoint's stream {self._name!r} has seed {state['seed']} and "
            f"{state['rows']} rows, this run's has {here['seed']} and {here['rows']}",
            "resume with the data and the seed that the run was started with",
        )
        self._position = state["position"]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        return self._order[place]

    def _ordered(self, epoch: int) -> list[int]:
        rng = random.Random(f"{self._seed}/{self._name}/{epoch}")
        if self._categories is not None:
            return evenly_by_category(self._categories, rng)
        order = list(range(len(self._encoded)))
        rng.shuffle(order)
        return order
