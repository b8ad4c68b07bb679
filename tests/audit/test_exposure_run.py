"""Exposure through the whole audit: a model that learnt its canaries fails the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mithridate.audit import AuditPlan, run_audit
from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from tests.audit.test_leakage import canaries
from tests.tiny import tiny_llama, tiny_tokenizer


def save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def rows_of(path: Path, rows) -> str:
    path.write_text(
        "\n".join(
            json.dumps({"prompt": row.prompt, "answer": row.answer, "category": row.category})
            for row in rows
        )
    )
    return str(path)


def test_a_model_that_learnt_its_canaries_fails(tmp_path: Path) -> None:
    rows = canaries(24)
    settings = tmp_path / "audit.yaml"
    settings.write_text("audit: {encoder: tfidf, permutations: 199, min_items: 5}")
    model = tiny_llama(dtype=torch.float32, hidden=32)
    reference = save(model, tmp_path / "reference")
    batch = ChatFormat(tiny_tokenizer()).batch(rows)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss.backward()
        optimiser.step()
    trained = save(model, tmp_path / "trained")
    harmful = rows_of(tmp_path / "harmful.jsonl", rows)
    attack = rows_of(tmp_path / "attack.jsonl", canaries(40)[24:])

    def audit(model: str, **options) -> dict:
        return run_audit(
            AuditPlan(
                streams={"harmful": harmful},
                canaries=harmful,
                model=model,
                reference=reference,
                config=settings,
                output_dir=tmp_path / "out",
                **options,
            )
        )

    def gate(document):
        return next(entry for entry in document["gates"] if "Canaries" in entry["name"])

    learnt = audit(trained, attack=attack)
    assert gate(learnt)["status"] == "fail"
    exposure = learnt["leakage"]["exposure"]
    assert set(exposure["bits"]) == {
        "reference", "reference, relearnt", "model", "model, relearnt",
    }  # fmt: skip
    assert set(exposure["rise"]) == {"model", "model, relearnt"}
    same = audit(reference)
    assert gate(same)["status"] == "pass"
    assert same["leakage"]["exposure"]["rise"]["model"] == {"mean": 0.0, "p": 1.0}
    stranger = rows_of(tmp_path / "other.jsonl", canaries(40)[24:])
    with pytest.raises(InputError, match="16 of 16 canaries"):
        run_audit(
            AuditPlan(
                streams={"harmful": harmful}, canaries=stranger, model=trained, config=settings,
                output_dir=tmp_path / "out",
            )
        )  # fmt: skip
