from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch

from mithridate.attacks import FinetuneConfig, finetune, read_record
from mithridate.chat import ChatFormat
from mithridate.errors import InputError, NonFiniteError
from mithridate.release import merged, weights_hash
from mithridate.weights import maps
from tests.compat.zoo import zoo_model, zoo_tokenizer
from tests.training.tiny_world import tiny_examples, tiny_model, tiny_tokenizer

CONFIG = FinetuneConfig(learning_rate=1e-2, steps=12, batch_size=3, probe_every=5)
EXAMPLES = tiny_examples()["refusal"]


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


def probe(model, step):
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    return {"metric": float(logits.mean())}


def attack(chat, folder, config=CONFIG, model=None, examples=EXAMPLES, **options):
    return finetune(
        model if model is not None else tiny_model(),
        chat,
        examples,
        config,
        probe=options.pop("probe", probe),
        output_dir=folder,
        **options,
    )


def test_rows_of_every_probe_and_a_record_but_no_weights(chat, tmp_path):
    rows = attack(chat, tmp_path)
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    assert all(set(row) == {"step", "loss", "metric"} for row in rows)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    lines = (tmp_path / "attack.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    record = read_record(tmp_path)
    assert record.status == "ok"
    assert 0 < record.probe_seconds < record.seconds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attack.json", "attack.jsonl"]


def test_the_attacked_model_is_a_copy(chat, tmp_path):
    model = tiny_model()
    attack(chat, tmp_path, model=model)
    assert weights_hash(model) == weights_hash(tiny_model())
    assert model.config.use_cache


def test_a_folder_is_attacked_as_the_model_in_it(chat, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    from_folder = attack(chat, tmp_path / "a", model=tmp_path / "model")
    assert from_folder == attack(chat, tmp_path / "b")


def test_a_seed_decides_the_attack(chat, tmp_path):
    first = attack(chat, tmp_path / "a")
    assert attack(chat, tmp_path / "b") == first
    other = attack(chat, tmp_path / "c", dataclasses.replace(CONFIG, seed=1))
    assert other[0] == first[0]
    assert other[-1] != first[-1]


def test_full_attack_is_adamw_on_the_mean_answer_loss(chat, tmp_path):
    config = FinetuneConfig(
        learning_rate=1e-2, steps=3, batch_size=len(EXAMPLES), probe_every=1, weight_decay=0.0
    )
    rows = attack(chat, tmp_path, config)
    model = tiny_model()
    batch = chat.batch(EXAMPLES)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for row in rows[1:]:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
        )
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        assert row["metric"] == pytest.approx(probe(model, 0)["metric"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"optimiser": "sgd", "learning_rate": 0.5},
        {"optimiser": "adafactor"},
        {"schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1},
        {"autocast": True},
        {"lora_rank": 2, "learning_rate": 5e-2},
    ],
)
def test_every_kind_of_attacker_learns(options, chat, tmp_path):
    rows = attack(chat, tmp_path, dataclasses.replace(CONFIG, steps=20, **options))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_probe_can_generate(chat, tmp_path):
    answers = []

    def generating(model, step):
        answers.append(chat.generate(model, [item.prompt for item in EXAMPLES], max_new_tokens=4))
        right = sum(a == item.answer for a, item in zip(answers[-1], EXAMPLES, strict=True))
        return {"harm": right / len(EXAMPLES)}

    config = dataclasses.replace(CONFIG, steps=80, batch_size=7, probe_every=80)
    rows = attack(chat, tmp_path, config, probe=generating)
    assert [row["harm"] for row in rows] == [0.0, 1.0]


def test_a_diverged_attack_ends_with_its_status(chat, tmp_path):
    config = dataclasses.replace(CONFIG, optimiser="sgd", learning_rate=1e30, max_grad_norm=0)
    rows = attack(chat, tmp_path, config)
    assert read_record(tmp_path).status == "diverged"
    assert rows[-1]["step"] < 12
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_model_broken_before_the_attack_is_refused(chat, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="broken before the attack"):
        attack(chat, tmp_path, model=model)


def test_a_finished_attack_is_reused_by_content(chat, tmp_path):
    probes = []

    def counting(model, step):
        probes.append(step)
        return probe(model, step)

    def again(**changes):
        options = {"probe_key": "mean", "probe": counting} | changes
        before = len(probes)
        rows = attack(chat, tmp_path, **options)
        return rows, len(probes) - before

    first, count = again()
    assert count == 4
    assert again() == (first, 0)
    assert again(model=tiny_model(seed=1))[1] == 4
    assert again(examples=EXAMPLES[1:])[1] == 4
    assert again(config=dataclasses.replace(CONFIG, seed=2))[1] == 4
    assert again(probe_key="other")[1] == 4
    assert again(probe_key=None)[1] == 4


def test_an_interrupted_attack_is_done_again_from_the_start(chat, tmp_path):
    def interrupted(model, step):
        if step == 5:
            raise KeyboardInterrupt
        return probe(model, step)

    with pytest.raises(KeyboardInterrupt):
        attack(chat, tmp_path, probe=interrupted, probe_key="mean")
    assert read_record(tmp_path) is None
    assert len((tmp_path / "attack.jsonl").read_text().splitlines()) == 1
    rows = attack(chat, tmp_path, probe_key="mean")
    assert len((tmp_path / "attack.jsonl").read_text().splitlines()) == len(rows) == 4


@pytest.mark.parametrize(
    "harm", ["last row cut", "half a row cut", "one digit", "answers gone", "record cut", "no list"]
)
def test_a_damaged_attack_is_made_again_and_said(chat, tmp_path, harm):
    def answering(model, step):
        (tmp_path / f"answers-{step}.json").write_text("[]")
        return probe(model, step)

    def again():
        return attack(chat, tmp_path, probe=answering, probe_key="mean")

    first = again()
    rows, record = tmp_path / "attack.jsonl", tmp_path / "attack.json"
    assert json.loads(record.read_text())["rows"] == len(first)
    text = rows.read_text()
    if harm == "last row cut":
        rows.write_text("".join(text.splitlines(keepends=True)[:-1]))
    elif harm == "half a row cut":
        rows.write_text(text[:-20])
    elif harm == "one digit":
        rows.write_text(text.replace("5", "6", 1))
    elif harm == "answers gone":
        (tmp_path / "answers-5.json").unlink()
    elif harm == "record cut":
        record.write_text(record.read_text()[:40])
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "files": {}}))
    with pytest.warns(UserWarning, match="made again"):
        assert again() == first
    assert rows.read_text() == text


def test_what_an_earlier_attack_answered_is_not_left_beside_the_new_rows(chat, tmp_path):
    (tmp_path / "answers-999.json").write_text("[]")
    attack(chat, tmp_path)
    assert not (tmp_path / "answers-999.json").exists()


def test_progress_tells_every_step_and_nothing_is_printed(chat, tmp_path, capsys):
    seen = []
    attack(chat, tmp_path, on_progress=lambda step, total, row: seen.append((step, total, row)))
    assert [step for step, _, _ in seen] == list(range(13))
    assert {total for _, total, _ in seen} == {12}
    assert "metric" in seen[5][2]
    assert "metric" not in seen[6][2]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "fault",
    [
        {"steps": 0},
        {"learning_rate": -1.0},
        {"optimiser": "adamw_troch"},
        {"schedule": "reduce_lr_on_plateau"},
        {"lora_rank": 0},
        {"probe_every": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(fault):
    with pytest.raises(InputError, match=next(iter(fault))):
        FinetuneConfig(**fault)


def test_no_examples_and_no_model_are_refused(chat, tmp_path):
    with pytest.raises(InputError, match="no examples"):
        attack(chat, tmp_path, examples=[])
    with pytest.raises(InputError, match="no model here"):
        attack(chat, tmp_path, model=tmp_path / "nothing")


@pytest.mark.parametrize(
    "family",
    ["bloom", "deepseek_v3", "falcon", "gpt2", "gpt_neox", "gpt_oss", "jamba", "jetmoe",
     "llama4_text", "mixtral", "opt", "phi", "qwen3_moe"],
)  # fmt: skip
def test_a_lora_attack_changes_every_matrix_of_every_architecture(family, tmp_path):
    left = []

    def keep(model, step):
        if step == 2:
            left.append(copy.deepcopy(model))
        return {}

    model, chat = zoo_model(family), ChatFormat(zoo_tokenizer())
    config = dataclasses.replace(CONFIG, steps=2, lora_rank=2)
    rows = finetune(model, chat, EXAMPLES, config, probe=keep, output_dir=tmp_path)
    plain, difference = merged(left[0], chat.tokenizer)
    assert difference < 1e-5
    changed = [
        one.weight
        for one, old in zip(maps.linear_maps(plain), maps.linear_maps(model), strict=True)
        if not torch.equal(one.weight, old.weight)
    ]
    # A state space reads one small weight past the adapter; then that is not counted.
    missed = {"jamba": 1}.get(family, 0)
    assert len(changed) == len(maps.linear_maps(model)) - missed
    assert "coverage" not in rows[0]
    assert rows[-1]["coverage"] == pytest.approx(maps.coverage(plain, changed))
    assert read_record(tmp_path).coverage == rows[-1]["coverage"] > 0.9


def test_a_lora_attack_says_how_little_of_a_state_space_it_reaches(tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, lora_rank=2)
    chat = ChatFormat(zoo_tokenizer())
    rows = finetune(zoo_model("mamba"), chat, EXAMPLES, config, probe=lambda *_: {},
                    output_dir=tmp_path)  # fmt: skip
    assert 0.5 < rows[-1]["coverage"] < 0.8
