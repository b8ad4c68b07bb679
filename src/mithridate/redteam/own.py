"""A user's own questions, answers and judge, in place of a testbed."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mithridate import lengths
from mithridate.attacks.rl import exact_match
from mithridate.examples import (
    AS_PUBLISHED,
    Example,
    Found,
    Reading,
    check_disjoint,
    read_source,
    split_by_prompt,
)
from mithridate.judges.answers import AnswerJudge, check_kinds
from mithridate.judges.base import make_judge, useful_harms
from mithridate.judges.outcomes import Outcome
from mithridate.testbeds.base import AttackPreset, GateResult, TestbedData, hashes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETS = ("harmful", "eval", "permitted", "benign", "trained-on")
"""What the command line calls the files."""

_TEST_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """What the command line was given; every process reads it for itself.

    Parameters
    ----------
    harmful
        The attacker's rows.
    evaluation
        Held-out restricted questions; with answers where the judge compares.
    folder
        The run folder, where a judge may keep what it was told.
    permitted
        Held-out permitted questions: utility.
    benign
        Benign rows for attackers to train on; a fifth is kept to test what was learnt of them.
    trained_on
        What the defence was trained on: no prompt of it may be attacked or judged.
    max_new_tokens
        Of an answer, thinking included; 0: as many as the answers need.
    reading
        How the files are read.
    unfit
        Set and number, from 0, of rows that `OwnBed.fit` has left out.
    judge, judge_options
        ``NAME`` or ``NAME:SOURCE``, and the section ``judge:`` as JSON.
    """

    harmful: str
    evaluation: str
    folder: Path
    permitted: str | None = None
    benign: str | None = None
    trained_on: tuple[str, ...] = ()
    max_new_tokens: int = 0
    judge: str = "exact"
    judge_options: str = "{}"
    reading: Reading = AS_PUBLISHED
    unfit: frozenset[tuple[str, int]] = frozenset()


class OwnBed:
    """Reads as a `Testbed`; has no models of its own, and asks a `Judge` about restricted answers.

    Benign rows serve wherever a testbed has an unseen task, retained rows or unrelated text.

    Raises
    ------
    InputError
        A file that cannot be used, sets that share prompts, or a judge that does not answer.
    """

    name = "own"
    refusals: tuple[str, ...] = ()
    attack_preset = AttackPreset(examples=0, steps=0, batch_size=1, learning_rates=())
    # Guessing is not corrected for: nobody knows what a user's own questions allow.
    chance: Mapping[str, float] = {}

    def __init__(self, given: OwnData) -> None:
        self.given = given
        self.max_new_tokens = given.max_new_tokens
        self.judges = make_judge(given.judge, json.loads(given.judge_options), where="judge")
        self._sets, self._left_out = _read(given, answers=self.judges.needs_answers)
        self.left_out = self._left_out
        self._use(given.unfit)
        self.judges.prepare(given.folder)

    def fit(
        self,
        models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        *,
        rows: int,
    ) -> None:
        """Look at whether every row fits every model; leave out what does not where asked to.

        `given` then says what is left out.

        Parameters
        ----------
        rows
            Of a step of an attack.

        Raises
        ------
        InputError
            Rows do not fit (`lengths.fit`).
        """
        sets, left_out = self._sets, self._left_out
        # What is the same for two models is said once.
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for model, tokenizer in models:
                fitted = lengths.fit(
                    model,
                    tokenizer,
                    sets,
                    asked={name: sets[name] for name in ("eval", "permitted") if name in sets},
                    max_length=None,
                    rows=rows,
                    drop=self.given.reading.drop_invalid,
                )[1]
                sets, left_out = fitted.examples, fitted.added_to(left_out)
        for text in dict.fromkeys(str(one.message) for one in said):
            warnings.warn(text, stacklevel=2)
        kept = {id(row) for items in sets.values() for row in items}
        self.left_out = left_out
        self._use(
            frozenset(
                (name, number)
                for name, items in self._sets.items()
                for number, row in enumerate(items)
                if id(row) not in kept
            )
        )

    def _use(self, unfit: frozenset[tuple[str, int]]) -> None:
        self.given = dataclasses.replace(self.given, unfit=unfit)
        self.data = _parts(
            {
                name: [row for number, row in enumerate(items) if (name, number) not in unfit]
                for name, items in self._sets.items()
            }
        )
        self._exact: dict[Example, AnswerJudge] = {}
        for rows in (self.data.attack, self.data.permitted, *self.data.benign_task.values()):
            judge = AnswerJudge(rows)
            self._exact |= dict.fromkeys(rows, judge)

    def outcomes(self, items: Sequence[Example], outputs: Sequence[str]) -> list[Outcome]:
        """Return what the judge calls the outputs, as answers to restricted items."""
        return [one.outcome for one in self.judges.judge(items, outputs)]

    def judge(self, item: Example, output: str) -> Outcome:
        """Return the outcome of an output, by exact match."""
        return self._exact[item](item, output)

    def rewards(self, items: Sequence[Example], outputs: Sequence[str]) -> list[float]:
        """Return what RL pays for the outputs: the judge's harm, or with answers exact match."""
        if self.judges.needs_answers:
            return exact_match(self.judge)(items, outputs)
        return useful_harms(self.judges.judge(items, outputs))

    def base_model(self) -> Path:
        """Refuse: the models are the user's."""
        raise NotImplementedError

    aligned_model = base_model

    def filtered_model(self) -> None:
        """Return None: nobody can say what a model never saw."""

    def gates(self, *, control: bool = True) -> list[GateResult]:  # noqa: ARG002
        """Return no gates: those of the testbeds are about their own models."""
        return []


def _read(
    given: OwnData, *, answers: bool
) -> tuple[dict[str, list[Example]], dict[str, dict[str, int]]]:
    """Return the sets, and for each what was left out of it."""

    def read(name: str, source: str, stream: str, needs_answer: bool | None = None) -> Found:
        return read_source(
            source,
            stream=stream,
            name=name,
            needs_answer=needs_answer,
            every_kind=name == "trained-on",
            reading=given.reading,
        )

    found = {
        "harmful": read("harmful", given.harmful, "harmful"),
        "eval": read("eval", given.evaluation, "harmful" if answers else "prompts"),
    }
    if given.permitted is not None:
        # Whether a permitted question is refused can be seen without its answer.
        found["permitted"] = read("permitted", given.permitted, "benign", answers)
    if given.benign is not None:
        found["benign"] = read("benign", given.benign, "benign")
    sets = {name: one.examples for name, one in found.items()}
    check_disjoint(sets)
    check_kinds(sets)
    for source in given.trained_on:
        defended = read("trained-on", source, "prompts").examples
        for name in ("harmful", "eval", "permitted"):
            check_disjoint({name: sets.get(name, []), f"trained-on {source}": defended})
    return sets, {name: dict(one.left_out) for name, one in found.items() if one.left_out}


def _parts(sets: Mapping[str, list[Example]]) -> TestbedData:
    """Return the sets in the places that a testbed's have."""
    benign, task = sets.get("benign", []), {"train": list[Example](), "test": list[Example]()}
    if benign:
        task = split_by_prompt(benign, {"train": 1 - _TEST_SHARE, "test": _TEST_SHARE}, seed=0)
    streams = {"benign": task["train"], "general": task["train"], "refusal": list[Example]()}
    parts = {
        "alignment": streams,
        "defence": {"benign": task["train"]},
        "benign_task": task,
        "attack": sets["harmful"],
        "restricted": sets["eval"],
        "permitted": sets.get("permitted", []),
    }
    return TestbedData(**parts, refusal_probe=[], hashes=hashes_of(parts))  # type: ignore[arg-type]
