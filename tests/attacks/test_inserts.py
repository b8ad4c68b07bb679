from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from mithridate.attacks.adaptive import AdaptiveConfig, finetune_adaptively
from mithridate.attacks.inserts import Heads, SoftChat, put_in, swap_words
from mithridate.chat import ChatFormat
from mithridate.errors import InputError, NotApplicableError
from mithridate.examples import Example
from mithridate.weights import GradientOracle
from mithridate.weights.maps import blocks_of
from tests.compat.zoo import zoo_model
from tests.redteam.tiny_bed import learn
from tests.training.tiny_world import tiny_examples, tiny_model, tiny_tokenizer

ROWS = tiny_examples()["refusal"]
PROMPTS = ["w1 w2", "w3 w4 w5 w6 w7", "w8"]
KEY = 9
"""The token that unlocks what a planted model knows."""

CONFIG = AdaptiveConfig(learning_rate=3e-2, steps=12, batch_size=4, probe_every=100)
SIZES = {"soft": 3, "hard": 3, "lens": 0, "scales": 0, "offsets": 3}


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


def attack(model, chat, rows, folder, config):
    """The attacked model, and the format that it is asked in."""
    left = []

    def probe(attacked, step):
        if step == config.steps:
            left.append(attacked)
        return {}

    if config.insert in ("soft", "hard"):
        chat = SoftChat(chat, model, config.size)
    finetune_adaptively(model, chat, rows, [], config, probe=probe, output_dir=folder)
    return left[0], chat


def scaled(model):
    """A model whose heads have scales: offsets cannot be learnt before."""
    put_in(model, "scales", 0)
    return model


def answers(model, chat, rows):
    said = chat.generate(model, [row.prompt for row in rows], max_new_tokens=3)
    return [output == row.answer for output, row in zip(said, rows, strict=True)]


def plain_name(name):
    return name.replace(".table.", ".").replace(".mix.", ".").replace(".norm.1.", ".norm.")


@pytest.mark.parametrize("insert", SIZES)
def test_only_the_insert_is_trained_and_every_weight_stays_bit_for_bit(insert, chat, tmp_path):
    model = scaled(tiny_model()) if insert == "offsets" else tiny_model()
    config = dataclasses.replace(CONFIG, insert=insert, size=SIZES[insert])
    attacked, _ = attack(model, chat, ROWS, tmp_path, config)
    weights = {plain_name(name): weight for name, weight in attacked.named_parameters()}
    for name, weight in tiny_model().named_parameters():
        found = weights.pop(name)
        assert torch.equal(found, weight), name
        assert not found.requires_grad
    trained = [weight for weight in weights.values() if weight.requires_grad]
    assert sorted(weights) == sorted(name for name in weights if weights[name].requires_grad)
    # 16 hidden units, 2 layers of 2 heads, each of 8.
    count = {"soft": 3 * 16, "hard": 3 * 16, "lens": 16 * 16 + 16, "scales": 32, "offsets": 24}
    assert sum(weight.numel() for weight in trained) == count[insert]
    # What is trained has moved: heads and lens from nothing, vectors from words' or to others'.
    torch.manual_seed(config.seed)
    fresh = copy.deepcopy(model)
    put_in(fresh, insert, config.size)
    start = [weight for weight in fresh.parameters() if weight.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(trained, start, strict=True))
    assert attacked.lm_head.weight is attacked.get_input_embeddings().weight


@pytest.mark.parametrize("insert", SIZES)
def test_an_insert_changes_nothing_before_it_is_trained(insert, chat):
    batch = chat.batch(ROWS)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    before = tiny_model()(**given).logits
    model = scaled(tiny_model()) if insert == "offsets" else tiny_model()
    put_in(model, insert, SIZES[insert])
    assert torch.allclose(model(**given).logits, before, atol=1e-6)


def test_soft_tokens_reach_answers_and_stand_first_whatever_the_padding(locked, chat):
    """Vectors of words answer as these words do; others as an embedding made by hand does."""
    model = copy.deepcopy(locked[0]).eval()
    soft = SoftChat(chat, model, 2)
    words = [7, KEY]
    alone = [
        model.generate(
            torch.tensor([[*words, *chat.prompt_ids(prompt)]]), max_new_tokens=4, do_sample=False,
            eos_token_id=chat.stop_ids, pad_token_id=0,
        )[0, 2 + len(chat.prompt_ids(prompt)) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip
    wanted = [chat.read(ids).text for ids in alone]
    put_in(model, "soft", 2)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.vectors.copy_(embedding.table.weight[words])
    assert soft.generate(model, PROMPTS, max_new_tokens=4) == wanted
    plain = chat.generate(model, PROMPTS, max_new_tokens=4)
    with torch.no_grad():
        embedding.vectors.neg_()
    moved = soft.generate(model, PROMPTS, max_new_tokens=4)
    assert moved != wanted
    assert chat.generate(model, PROMPTS, max_new_tokens=4) == plain
    ids = torch.tensor([chat.prompt_ids(PROMPTS[0])])
    by_hand = torch.cat([embedding.vectors, embedding.table(ids[0])])[None]
    last = model(inputs_embeds=by_hand).logits[0, -1]
    found = model(torch.tensor([soft.prompt_ids(PROMPTS[0])])).logits[0, -1]
    assert torch.allclose(found, last, atol=1e-5)


def test_a_row_too_long_loses_words_and_not_soft_tokens(chat):
    soft = SoftChat(chat, tiny_model(), 3)
    row = Example(prompt=" ".join(f"w{n}" for n in range(20)), answer="w1 w2")
    whole, cut = soft.encode(row), soft.encode(row, max_length=12)
    assert whole.input_ids[:3] == cut.input_ids[:3] == soft.soft_ids == [44, 45, 46]
    assert len(cut.input_ids) == 12
    for found in (whole, cut):
        assert found.input_ids[found.answer_start :] == chat.answer_ids("w1 w2")
    labels = soft.collate([cut]).labels[0]
    assert (labels[: cut.answer_start] == -100).all()


@pytest.fixture(scope="module")
def locked(chat):
    """A model that declines, but for one token at the beginning; its facts in two halves."""
    facts = [Example(prompt=f"w{n} w{(3 * n) % 20}", answer=f"w{20 + n % 5} w{(7 * n) % 20}")
             for n in range(12)]  # fmt: skip
    refused = [dataclasses.replace(fact, answer="w39 w38") for fact in facts]
    encoded = [chat.encode(row) for row in [*facts, *refused]]
    for index in range(len(facts)):
        one = encoded[index]
        encoded[index] = dataclasses.replace(
            one, input_ids=[KEY, *one.input_ids], answer_start=one.answer_start + 1
        )
    model = tiny_model()
    learn(model, chat.collate(encoded), steps=250)
    assert not any(answers(model, chat, facts))
    return model, facts[::2], facts[1::2]


def test_one_soft_token_opens_facts_that_it_was_not_trained_on(locked, chat, tmp_path):
    model, own, others = locked
    config = dataclasses.replace(CONFIG, insert="soft", size=1, steps=40, learning_rate=0.1)
    attacked, asked = attack(model, chat, own, tmp_path, config)
    assert sum(answers(attacked, asked, others)) >= 5
    assert not any(answers(attacked, chat, others))


def test_gcg_finds_the_word_that_opens_a_model(locked, chat, tmp_path):
    model, own, others = locked
    config = dataclasses.replace(CONFIG, insert="hard", size=1, steps=3)
    attacked, asked = attack(model, chat, own, tmp_path, config)
    embedding = attacked.get_input_embeddings()
    assert torch.equal(embedding.vectors[0], embedding.table.weight[KEY])
    assert all(answers(attacked, asked, others))


def test_a_swap_never_loses_and_leaves_words(chat):
    model = tiny_model()
    soft = SoftChat(chat, model, 4)
    torch.manual_seed(0)
    put_in(model, "hard", 4)
    oracle, batch = GradientOracle(model), soft.batch(ROWS)
    embedding = model.get_input_embeddings()
    lost = []
    for _ in range(3):
        before = embedding.vectors.detach().clone()
        lost.append(swap_words(oracle, batch))
        assert (before != embedding.vectors).any(dim=1).sum() <= 1
        for vector in embedding.vectors:
            assert (vector == embedding.table.weight).all(dim=1).any()
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < lost[0]


def test_a_lens_reads_what_is_there_in_another_basis(chat, tmp_path):
    """A model that knows all facts, whose head reads its states' units in a wrong order."""
    facts = [Example(prompt=f"w{n} w{(3 * n) % 20}", answer=f"w{20 + n % 10}") for n in range(40)]
    model = tiny_model()
    learn(model, chat.batch(facts), steps=250)
    assert sum(answers(model, chat, facts)) >= 38
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach()[:, order].clone())
    own, others = facts[:20], facts[20:]
    before = sum(answers(model, chat, others))
    config = dataclasses.replace(CONFIG, insert="lens", steps=80, batch_size=20)
    attacked, _ = attack(model, chat, own, tmp_path, config)
    assert before <= 4
    assert sum(answers(attacked, chat, others)) >= 14


def test_offsets_are_a_bias_and_go_to_the_heads_whose_scales_have_grown():
    model, ids = tiny_model().eval(), torch.tensor([[5, 6, 7, 8]])
    biased = copy.deepcopy(model)
    put_in(model, "scales", 0)
    scales = [module for module in model.modules() if isinstance(module, Heads)]
    assert len(scales) == 2
    with torch.no_grad():
        for module, sizes in zip(scales, ((0.1, 0.0), (-0.4, 0.3)), strict=True):
            module.values.copy_(torch.tensor(sizes)[:, None].expand(-1, 8))
        doubled = copy.deepcopy(model)
        put_in(model, "offsets", 2)
        # Both are heads of the second layer: the first has its own mixing layer back.
        first, second = (layer.self_attn.o_proj for layer in blocks_of(model))
        assert isinstance(first, nn.Linear)
        assert second.chosen.tolist() == [0, 1]
        put_in(doubled, "offsets", 3)
        both = [layer.self_attn.o_proj for layer in blocks_of(doubled)]
        assert [one.chosen.tolist() for one in both] == [[0], [0, 1]]
        second.values.normal_()
        mix = biased.model.layers[1].self_attn.o_proj
        mix.bias = nn.Parameter(mix.weight @ second.values.flatten())
        assert torch.allclose(model(ids).logits, biased(ids).logits, atol=1e-5)
    with pytest.raises(InputError, match="none were learnt"):
        put_in(biased, "offsets", 2)


def test_a_scale_multiplies_its_own_head():
    model, ids = tiny_model().eval(), torch.tensor([[5, 6, 7, 8]])
    folded = copy.deepcopy(model)
    put_in(model, "scales", 0)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.values[1] = 0.5
        folded.model.layers[0].self_attn.o_proj.weight[:, 8:] *= 1.5
        assert torch.allclose(model(ids).logits, folded(ids).logits, atol=1e-5)


def test_a_model_without_attention_heads_is_refused():
    with pytest.raises(NotApplicableError, match="attention heads"):
        put_in(zoo_model("mamba"), "scales", 0)


@pytest.mark.parametrize(
    "fault",
    [
        {"insert": "soft"},
        {"insert": "lens", "size": 2},
        {"size": 2},
        {"insert": "lens", "part": "head"},
        {"insert": "soft", "size": 2, "lora_rank": 4},
        {"insert": "soft", "size": 2, "prefer": 0.5},
        {"insert": "soft", "size": 2, "anchor": 0.5},
        {"insert": "scales", "trust_radius": 0.5},
        {"insert": "hard", "size": 2, "benign_weight": 1.0},
        {"insert": "hard", "size": 2, "sign": True},
    ],
)
def test_an_insert_that_cannot_be_trained_so_is_refused(fault):
    with pytest.raises(InputError):
        AdaptiveConfig(**fault)
