"""`mithridate cost`: the document, the tables, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mithridate import costing, models
from mithridate.cli.cost import show_costs
from mithridate.costing import PUBLISHED, CostPlan, configured, run_cost
from mithridate.errors import InputError
from mithridate.methods import METHODS
from mithridate.testbeds.scratch import save_model
from tests.tiny import tiny_llama, tiny_tokenizer

KEYS = {
    "passes_per_step",
    "extra_passes",
    "clock_ratio",
    "peak_memory_ratio",
    "memory_time_ratio",
    "parameter_buffers",
    "batch_equivalents",
}
SMALL = {"batch_size": 4, "length": 16, "seconds": 0.0}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return run_cost(
        CostPlan(shape="lattice", methods=("sdd", "ctrap", "lox"), space="lora", **SMALL)
    )


def test_document_has_a_row_for_each_method_and_sft(document: dict[str, Any]) -> None:
    rows = document["methods"]
    assert list(rows) == ["sft", "sdd", "ctrap", "lox"]
    assert all(rows[name].keys() >= KEYS for name in ("sft", "sdd", "ctrap"))
    assert [rows[name]["extra_passes"] for name in ("sdd", "ctrap")] == [0, 2]
    assert [rows[name]["tokens"] for name in ("sft", "sdd", "ctrap")] == [64, 64, 192]
    assert "not_timed" in rows["lox"]
    assert document["trainable"] < document["parameters"]
    assert set(document["published"]) == {"sdd", "ctrap"}


def test_tables_show_measured_beside_published(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    show_costs(document)
    text = capsys.readouterr().out
    assert "lox: not timed: " in text
    assert "3 (2)" in text
    assert "+6.72 GB, 3.5x (" in text
    assert "not one memory ratio" in text
    assert "seam" not in text


def test_the_published_table_is_complete() -> None:
    assert list(PUBLISHED) == ["sdd", "ctrap", "seam", "tokenbuncher"]
    assert all(entry.notes for entry in PUBLISHED.values())


def test_own_model_is_measured_on_random_words(tmp_path: Path) -> None:
    save_model(tiny_llama(dtype=torch.float32), tiny_tokenizer(), tmp_path / "m")
    found = run_cost(CostPlan(model=str(tmp_path / "m"), methods=("ctrap",), **SMALL))
    assert found["methods"]["ctrap"]["passes_per_step"] == 3
    assert found["space"] == "full"


def test_every_method_is_set_up_or_says_why_not() -> None:
    for name in METHODS.names():
        made = configured(name, 4, 16)
        for field in ("batch_size", "harmful_rows", "retain_rows"):
            assert getattr(made.config, field, 4) == 4, name


def test_a_composition_sets_up_its_members() -> None:
    made = configured("sdd+ctrap", 4, 16)
    assert made.config.parts["sdd"]["encoder"] == "tfidf"
    assert made.config.parts["ctrap"]["harmful_rows"] == 4


def test_too_few_rows_for_one_method_leave_the_others() -> None:
    found = run_cost(
        CostPlan(shape="lattice", methods=("sdd", "trajectory"), batch_size=1, length=16, seconds=0)
    )["methods"]
    assert found["sdd"]["extra_passes"] == 0
    assert "batch_size 1" in found["trajectory"]["not_timed"]


def _no_work(*_: object, **__: object) -> None:
    pytest.fail("work was begun")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CostPlan(), "give a model or a shape"),
        (CostPlan(model="m", shape="lattice"), "give a model or a shape"),
        (CostPlan(shape="latice"), "did you mean 'lattice'"),
        (CostPlan(shape="lattice", methods=("ctrapp",)), "did you mean 'ctrap'"),
        (CostPlan(shape="lattice", length=65), "64 tokens at most"),
        (CostPlan(model="/no/such/folder"), "no such model folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, plan: CostPlan, message: str
) -> None:
    monkeypatch.setattr(costing, "measure_costs", _no_work)
    with pytest.raises(InputError, match=message):
        run_cost(plan)


@pytest.mark.parametrize(("space", "mend"), [("full", "--space lora"), ("lora", "larger machine")])
def test_a_shape_that_does_not_fit_is_refused_before_its_weights_are_made(
    monkeypatch: pytest.MonkeyPatch, space: Any, mend: str
) -> None:
    monkeypatch.setattr(costing, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(models, "available_memory", lambda: 20 << 30)
    monkeypatch.setattr(costing.find_shape("llama-2-7b").__class__, "build", _no_work)
    with pytest.raises(InputError, match=r"too little memory: 6\.74 billion") as caught:
        run_cost(CostPlan(shape="llama-2-7b", space=space))
    assert mend in caught.value.mend
    assert caught.value.where == "llama-2-7b"
