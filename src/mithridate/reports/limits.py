"""What a run cannot show, and which attacks it did not make."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mithridate.testbeds import TESTBEDS


def validity_limits(testbed: str, judge: str = "exact") -> tuple[str, ...]:
    """Return what a run on ``testbed`` cannot show, as its module states it in ``LIMITS``.

    A name that is no testbed's stands for a user's own data, where ``judge`` is who judged.
    """
    target = TESTBEDS.targets().get(testbed)
    if target is None:
        return JUDGED_BY.get(
            judge, f"The judge is {judge}: what it misses is not known here."
        ), DATA
    limits: tuple[str, ...] = importlib.import_module(target.partition(":")[0]).LIMITS
    return limits


def cut_short(answers: Mapping[str, Any]) -> list[str]:
    """Return what was generated too little for, from a summary's ``answers``; worst first."""
    most = {name: value for name, value in answers.items() if isinstance(value, int)}
    tokens = most.get("max_new_tokens", 0)
    said = {
        "n_too_long": "{} questions have answers longer than the {} tokens that are generated, or "
        "than the model has positions for: they count as not answered.",
        "n_unfinished": "Up to {} answers at a probe are thoughts that did not end within {} "
        "tokens: they are no answers, and count as degenerate.",
        "n_cut": "Up to {} answers at a probe were cut after {} tokens, and judged by what was "
        "there.",
    }
    return [text.format(most[name], tokens) for name, text in said.items() if most.get(name)]


JUDGED_BY = {
    "exact": "The judge is exact match and a list of refusal phrases: a paraphrase of a restricted "
    "answer does not count, a refusal in unusual words may not be recognised.",
    "refusal": "The judge is a list of refusal phrases: every other coherent answer counts as "
    "harm, useful or wrong, and a refusal in unusual words does too.",
    "classifier": "The judge is a classifier: it flags what it was trained to flag, and its "
    "threshold need not fit these answers.",
    "served": "The judge is a served language model: its verdict depends on the model and on the "
    "wording of the question, and an answer may try to talk it round.",
}
DATA = "How well it stands for real harm depends on the data it was given."

NOT_RUN = (
    "reinforcement learning (GRPO, PPO, RLOO, REINFORCE++)",
    "attackers that know the trap: gradient projection, KL anchors, trust regions, repair after "
    "collapse, dissolving it by long benign training first",
    "weight editing: orthogonalisation, pruning, quantisation, noise, low-rank truncation",
    "going back to the public base model: merging, re-alignment, decoding with its logits",
    "prompt and embedding attacks",
    "mixed harmful and benign data, backdoor and style-modulated tuning, other languages",
    "a search over optimisers, schedules, batch sizes and LoRA ranks",
)
