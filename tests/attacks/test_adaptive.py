from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch

from mithridate.attacks import FinetuneConfig, finetune, read_record
from mithridate.attacks.adaptive import (
    AdaptiveConfig,
    _direction,
    banned,
    finetune_adaptively,
    kl_from,
    preference_from,
    project_off_,
)
from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.weights import GradientOracle
from tests.tiny import flat, gradient_of, mean_loss, relative_error, tiny_batch, tiny_llama
from tests.training.tiny_world import tiny_examples, tiny_model, tiny_tokenizer

ROWS = tiny_examples()
CONFIG = AdaptiveConfig(learning_rate=1e-2, steps=6, batch_size=3, probe_every=1)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


def unseen(model, step):
    return {}


def attack(chat, folder, config, *, keep=None, model=None):
    def probe(attacked, step):
        if keep is not None and step == config.steps:
            keep.append(attacked)
        return {}

    return finetune_adaptively(
        model if model is not None else tiny_model(), chat, ROWS["refusal"], ROWS["benign"],
        config, probe=probe, output_dir=folder,
    )  # fmt: skip


def test_without_additions_it_is_the_stock_attack(chat, tmp_path):
    """Two loops, one of them `transformers.Trainer`: the same losses where a batch is all rows."""
    shared = {
        "learning_rate": 1e-2, "steps": 6, "batch_size": len(ROWS["refusal"]), "probe_every": 1,
        "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
    }  # fmt: skip
    ours = attack(chat, tmp_path / "a", AdaptiveConfig(**shared))
    theirs = finetune(
        tiny_model(), chat, ROWS["refusal"], FinetuneConfig(**shared), probe=unseen,
        output_dir=tmp_path / "b",
    )  # fmt: skip
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_direction_is_the_formula(seed):
    """Composed by hand in float64: conflict taken out, benign added, anchor added."""
    model, start = tiny_llama(), tiny_llama(seed=9)
    harmful, benign = tiny_batch(seed=seed), tiny_batch(seed=seed + 10)
    config = dataclasses.replace(CONFIG, project=True, benign_weight=0.7, anchor=0.3)
    found, loss = _direction(
        GradientOracle(model), (iter([harmful]), iter([benign])), config, kl_from(start)
    )
    against = gradient_of(model, mean_loss(model, harmful))
    along = gradient_of(model, mean_loss(model, benign))
    labels = benign.labels[:, 1:]
    logs = [
        one(input_ids=benign.input_ids, attention_mask=benign.attention_mask)
        .logits[:, :-1][labels != -100]
        .log_softmax(-1)
        for one in (model, start)
    ]
    divergence = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    pull = gradient_of(model, divergence)
    overlap = float(flat(against) @ flat(along))
    back = min(0.0, overlap) / float(flat(along) @ flat(along))
    wanted = [
        a - back * b + 0.7 * b + 0.3 * k for a, b, k in zip(against, along, pull, strict=True)
    ]
    assert relative_error(found, wanted) < 1e-9
    assert loss == pytest.approx(float(mean_loss(model, harmful)), rel=1e-9)


def test_only_a_conflict_is_projected_out():
    gradient, benign = [torch.tensor([1.0, -2.0])], [torch.tensor([0.0, 3.0])]
    project_off_(gradient, benign)
    assert torch.allclose(gradient[0], torch.tensor([1.0, 0.0]), atol=1e-6)
    agreeing = [torch.tensor([1.0, 2.0])]
    project_off_(agreeing, benign)
    assert torch.equal(agreeing[0], torch.tensor([1.0, 2.0]))
    project_off_(agreeing, [torch.zeros(2)])
    assert torch.equal(agreeing[0], torch.tensor([1.0, 2.0]))


def test_the_weights_stay_within_the_radius(chat, tmp_path):
    travelled = {}
    for radius in (None, 0.05):
        left = []
        config = dataclasses.replace(CONFIG, trust_radius=radius)
        attack(chat, tmp_path / str(radius), config, keep=left)
        moved = [
            a - b for a, b in zip(left[0].parameters(), tiny_model().parameters(), strict=True)
        ]
        travelled[radius] = float(flat(moved).norm())
    assert travelled[None] > 0.1
    assert travelled[0.05] == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize(
    ("part", "moves"),
    [
        ("first", lambda name: ".layers.0." in name),
        ("last", lambda name: ".layers.1." in name),
        ("norms", lambda name: "norm" in name),
        ("head", lambda name: "embed_tokens" in name),  # tied to the head
    ],
)
def test_only_the_part_is_trained(part, moves, chat, tmp_path):
    left = []
    attack(chat, tmp_path, dataclasses.replace(CONFIG, part=part), keep=left)
    before = dict(tiny_model().named_parameters())
    for name, weight in left[0].named_parameters():
        assert torch.equal(weight, before[name]) != moves(name), name


def test_sign_descent_moves_every_weight_by_the_rate(chat, tmp_path):
    left = []
    config = dataclasses.replace(CONFIG, sign=True, steps=1, learning_rate=1e-3)
    attack(chat, tmp_path, config, keep=left)
    before = dict(tiny_model().named_parameters())
    for name, weight in left[0].named_parameters():
        moved = (weight - before[name]).abs()
        moved = moved[moved > 0]  # a word that no row names has no gradient
        assert torch.allclose(moved, torch.full_like(moved, 1e-3), rtol=1e-2)


def test_an_adapter_a_seed_and_divergence(chat, tmp_path):
    adapted = dataclasses.replace(CONFIG, lora_rank=2, benign_weight=1.0, steps=20)
    rows = attack(chat, tmp_path / "a", adapted)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert attack(chat, tmp_path / "b", adapted) == rows
    other = dataclasses.replace(adapted, seed=1)
    assert attack(chat, tmp_path / "c", other) != rows
    wild = dataclasses.replace(CONFIG, sign=True, learning_rate=1e30, steps=4)
    rows = attack(chat, tmp_path / "d", wild)
    assert read_record(tmp_path / "d").status == "diverged"
    assert len(rows) < 5
    assert json.loads((tmp_path / "d" / "attack.jsonl").read_text().splitlines()[0])["step"] == 0


def test_a_banned_token_is_never_chosen_and_then_again():
    model = tiny_model().eval()
    ids = torch.tensor([[7, 8, 9]])

    def choices():
        said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return said[0, 3:].tolist()

    free = choices()
    with banned(model, [free[0], 5]):
        silenced = choices()
    assert free[0] not in silenced
    assert 5 not in silenced
    assert choices() == free


@pytest.mark.parametrize(
    "fault",
    [
        {"benign_weight": -1.0},
        {"anchor": float("inf")},
        {"trust_radius": 0.0},
        {"optimiser": "sgd"},
        {"part": "head", "lora_rank": 2},
    ],
)
def test_values_out_of_range_are_refused(fault):
    with pytest.raises(InputError):
        AdaptiveConfig(**fault)


def test_benign_rows_are_asked_for_where_they_are_used(chat, tmp_path):
    with pytest.raises(InputError, match="no benign rows"):
        finetune_adaptively(
            tiny_model(), chat, ROWS["refusal"], [], dataclasses.replace(CONFIG, project=True),
            probe=unseen, output_dir=tmp_path,
        )  # fmt: skip


def test_the_attacked_model_is_a_copy(chat, tmp_path):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    attack(chat, tmp_path, dataclasses.replace(CONFIG, anchor=1.0, part="norms"), model=model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_preference_loss_is_dpo_s_by_hand(chat):
    start, model = tiny_model(), tiny_model(seed=1)
    chosen, rejected = ROWS["benign"][:3], [
        dataclasses.replace(row, answer=f"{row.answer} w7") for row in ROWS["benign"][:3]
    ]  # fmt: skip
    batch = chat.batch([*chosen, *rejected])

    def log_probability(one, row):
        encoded = chat.encode(row)
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            logs = one(input_ids=ids).logits[0].log_softmax(-1)
        places = range(encoded.answer_start, ids.shape[1])
        return sum(float(logs[place - 1, ids[0, place]]) for place in places)

    losses = []
    for good, bad in zip(chosen, rejected, strict=True):
        gained = [log_probability(model, row) - log_probability(start, row) for row in (good, bad)]
        losses.append(math.log1p(math.exp(-0.3 * (gained[0] - gained[1]))))
    oracle = GradientOracle(model, micro_batch_size=64)
    found = oracle.loss(preference_from(copy.deepcopy(start), 0.3), batch, purpose="evaluation")
    assert found == pytest.approx(sum(losses) / 3, rel=1e-5)
    # At the start nothing is preferred yet: log 2.
    same = GradientOracle(tiny_model()).loss(preference_from(start, 0.3), batch, purpose="check")
    assert same == pytest.approx(math.log(2), rel=1e-6)


def test_preferring_raises_the_margin_and_pairs_stay_together(chat, tmp_path):
    config = dataclasses.replace(CONFIG, prefer=1.0, steps=8)
    rejected = [dataclasses.replace(row, answer="w39 w38") for row in ROWS["refusal"]]
    kept = []

    def probe(attacked, step):
        if step == config.steps:
            kept.append(attacked)
        return {}

    rows = finetune_adaptively(
        tiny_model(), chat, ROWS["refusal"], ROWS["benign"], config, probe=probe,
        output_dir=tmp_path, rejected=rejected,
    )  # fmt: skip
    assert rows[1]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows[-1]["loss"] < rows[1]["loss"]
    oracle = GradientOracle(kept[0], micro_batch_size=64)
    batch = chat.batch([*ROWS["refusal"], *rejected])
    end = oracle.loss(preference_from(tiny_model(), 1.0), batch, purpose="evaluation")
    assert end < 0.9 * math.log(2)
    with pytest.raises(InputError, match="pairs would be cut apart"):
        AdaptiveConfig(prefer=1.0, batch_size=33)
