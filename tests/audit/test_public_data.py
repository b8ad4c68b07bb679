"""Real text, where the shared data folder is there: drift between topics, none within one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mithridate.audit.drift import compare
from mithridate.audit.sets import audit_set, embed
from mithridate.embeddings import tfidf
from mithridate.examples import Example

NEWS = Path(__file__).parents[3] / "shared" / "data" / "agnews" / "test.jsonl"


@pytest.mark.skipif(not NEWS.is_file(), reason="the shared data folder is not there")
def test_topics_of_the_news_drift_and_halves_of_one_do_not() -> None:
    rows = [json.loads(line) for line in NEWS.read_text(encoding="utf-8").splitlines()]
    world, sports = (
        [Example(prompt=row["text"]) for row in rows if row["label"] == label][:160]
        for label in (0, 1)
    )
    parts = [
        audit_set(name, part)
        for name, part in (("a", world[:80]), ("b", world[80:]), ("c", sports[:80]))
    ]
    vectors = embed(parts, tfidf)
    same = compare(parts[0], parts[1], vectors, permutations=199, seed=0, most=200)
    moved = compare(parts[0], parts[2], vectors, permutations=199, seed=0, most=200)
    assert same is not None
    assert moved is not None
    assert min(same["mmd2_p"], same["auc_p"]) > 0.01
    assert moved["auc"] > 0.8
    assert max(moved["mmd2_p"], moved["auc_p"]) <= 0.01
