"""The search of an attacker's hyper-parameters: Optuna's TPE, one trial after another.

Nothing is stored. The sampler is seeded and what a trial yields comes from the cache of finished
attacks, so that a killed search asks for the same trials again and goes on where the cache ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mithridate.files import sha256_of
from mithridate.redteam.battery import Attack, Entry, drawn

PACKAGE = "optuna"
EXTRA = "pip install 'mithridate[search]'"

_FIRST_AT_RANDOM = 3


def available() -> bool:
    """Tell whether Optuna is installed."""
    return find_spec(PACKAGE) is not None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A finished trial; ``harm`` is None where one of its attacks failed."""

    attack: Attack
    harm: float | None


class Search:
    """A study of one attack on one model.

    The first trials, a quarter of the budget and three at least, are drawn at random: the same on
    every model. The others follow what the trials before them yielded.

    Parameters
    ----------
    budget
        Trials in all; one that fails counts.
    """

    def __init__(self, entry: Entry, budget: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.entry = entry
        self.budget = budget
        self.trials: list[Trial] = []
        self._study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(
                n_startup_trials=max(_FIRST_AT_RANDOM, budget // 4),
                seed=int(sha256_of(["search", entry.id])[:8], 16),
            ),
        )
        self._open: tuple[Any, Attack] | None = None

    @property
    def left(self) -> int:
        """Trials that have not been told yet."""
        return self.budget - len(self.trials)

    def ask(self) -> Attack | None:
        """Return the next trial's setting; None when the budget is spent."""
        assert self._open is None, "one trial at a time: the next depends on it"
        if not self.left:
            return None
        trial = self._study.ask()
        values = {key: _suggested(trial, key, given) for key, given in self.entry.space.items()}
        self._open = trial, drawn(self.entry, values)
        return self._open[1]

    def tell(self, harm: float | None) -> None:
        """Say what the open trial yielded: useful harm, or None where it failed."""
        from optuna.trial import TrialState

        assert self._open is not None, "only what was asked can be told"
        trial, attack = self._open
        if harm is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, harm)
        self.trials.append(Trial(attack=attack, harm=harm))
        self._open = None

    @property
    def best(self) -> Trial | None:
        """The first of the trials that yielded most; None where all failed."""
        told = [trial for trial in self.trials if trial.harm is not None]
        return max(told, key=lambda trial: trial.harm or 0.0, default=None)


def _suggested(trial: Any, key: str, given: Any) -> Any:
    if isinstance(given, Mapping):
        return trial.suggest_float(key, given["from"], given["to"], log=True)
    return trial.suggest_categorical(key, list(given))
