"""Harmful RL through `trl`, on a model small enough for a fraction of a second a step."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys

import pytest
import torch

from mithridate.attacks import FinetuneConfig, RLConfig, entropy_bound, read_record
from mithridate.attacks.rl import _Till, each, exact_match, read_updates, reinforce, slot_accuracy
from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.judges.outcomes import Outcome
from mithridate.release import weights_hash
from tests.compat.zoo import zoo_tokenizer
from tests.test_generation import strong
from tests.training.tiny_world import WORDS, tiny_examples, tiny_model, tiny_tokenizer

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="trl is not installed (pip install 'mithridate[trl]')",
)
# The libraries' own deprecations, which nobody here can mend.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CONFIG = RLConfig(
    learning_rate=3e-2, steps=4, batch_size=3, rollouts=4, response_length=3, probe_every=3
)
EXAMPLES = tiny_examples()["refusal"]


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


def probe(model, step):
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    return {"metric": float(logits.mean())}


def early_words(item, output):
    """Pay for words of the first half: something every policy can find by chance."""
    words = output.split()
    return sum(word in WORDS[:20] for word in words) / max(1, len(words))


def attack(chat, folder, config=CONFIG, **options):
    given = {
        "model": tiny_model(), "examples": EXAMPLES, "reward": each(early_words),
        "reward_key": "early", "probe": probe,
    } | options  # fmt: skip
    model, examples = given.pop("model"), given.pop("examples")
    return reinforce(model, chat, examples, config, output_dir=folder, **given)


@needs_trl
def test_a_trl_that_weakens_the_attack_is_refused(chat, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.15.2")
    with pytest.raises(InputError, match=r"needs trl 1\.16\.0 or newer; installed is 1\.15\.2"):
        attack(chat, tmp_path)
    assert not any(tmp_path.iterdir())


@needs_trl
def test_reinforce_plus_plus_divides_by_the_spread_of_the_whole_batch(chat, tmp_path, monkeypatch):
    import trl

    seen, paid = [], []
    compute = trl.GRPOTrainer._compute_loss

    def noted(self, model, inputs):
        seen.append(inputs["advantages"].detach().flatten().double())
        return compute(self, model, inputs)

    def reward(item, output):
        paid.append(early_words(item, output))
        return paid[-1]

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", noted)
    config = dataclasses.replace(CONFIG, algorithm="reinforce++", steps=1, probe_every=1)
    attack(chat, tmp_path, config, reward=each(reward))
    groups = torch.tensor(paid, dtype=torch.float64).view(-1, CONFIG.rollouts)
    wanted = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std() + 1e-4)
    assert groups.std(dim=1).unique().numel() > 1, "else a group's own spread would do as well"
    # The trainer shuffles answers between the groups before it learns from them.
    assert torch.allclose(torch.cat(seen).sort().values, wanted.flatten().sort().values, atol=1e-4)


@needs_trl
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_rows_record_and_updates_as_a_fine_tuning_leaves_them(algorithm, chat, tmp_path, capsys):
    seen = []
    model = tiny_model()
    rows = attack(
        chat, tmp_path, dataclasses.replace(CONFIG, algorithm=algorithm), model=model,
        on_progress=lambda step, total, row: seen.append((step, total, "metric" in row)),
    )  # fmt: skip
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert set(rows[0]) == {"step", "loss", "metric"}
    measured = {"reward", "reward_std", "equal_groups", "entropy", "gradient_norm"}
    assert all(set(row) == {"step", "loss", "metric"} | measured for row in rows[1:])
    lines = (tmp_path / "attack.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert seen == [(0, 4, True), (1, 4, False), (2, 4, False), (3, 4, True), (4, 4, True)]
    updates = read_updates(tmp_path)
    assert [update["step"] for update in updates] == [1, 2, 3, 4]
    assert {name: updates[2][name] for name in measured} == {n: rows[1][n] for n in measured}
    assert all(0 < u["entropy"] < math.log(44) and u["gradient_norm"] > 0 for u in updates)
    record = read_record(tmp_path)
    assert record.status == "ok"
    assert 0 < record.probe_seconds < record.seconds
    assert record.weights != weights_hash(model), "the attack moved its weights"
    assert weights_hash(model) == weights_hash(tiny_model()), "and left the model as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attack.json", "attack.jsonl", "updates.jsonl",
    ]  # fmt: skip
    assert capsys.readouterr().out == ""


@needs_trl
def test_what_is_paid_for_becomes_common(chat, tmp_path):
    rows = attack(chat, tmp_path, dataclasses.replace(CONFIG, steps=15, probe_every=15, rollouts=8))
    rewards = [update["reward"] for update in read_updates(tmp_path)]
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3])
    assert rows[-1]["entropy"] < math.log(44)


@needs_trl
def test_the_reward_sees_the_item_of_its_answers_and_its_spread_is_within_items(chat, tmp_path):
    calls = []

    def by_item(item, output):
        calls.append((item.prompt, output))
        return float(len(item.prompt) % 2)

    rows = attack(chat, tmp_path, dataclasses.replace(CONFIG, steps=1), reward=each(by_item))
    prompts = [prompt for prompt, _ in calls]
    assert len(calls) == 12
    assert all(len(set(prompts[n : n + 4])) == 1 for n in (0, 4, 8))
    assert all("<" not in output for _, output in calls), "special tokens are not judged"
    assert rows[-1]["reward_std"] == 0
    assert rows[-1]["equal_groups"] == 1
    # Paid the same every time, a policy has nothing to learn.
    assert rows[-1]["gradient_norm"] == 0
    assert rows[-1]["metric"] == pytest.approx(rows[0]["metric"], rel=1e-6)


@needs_trl
@pytest.mark.parametrize(
    "changes",
    [
        {"kl": 0.2},
        {"kl": 0.2, "lora_rank": 2},
        {"algorithm": "rloo", "kl": 0.2},
        {"warm_start_steps": 2, "warm_start_rows": 3},
        {"warm_start_steps": 2, "lora_rank": 2},
        {"autocast": True, "temperature": 1.5},
    ],
    ids=str,
)
def test_every_kind_of_attacker_runs(changes, chat, tmp_path):
    rows = attack(chat, tmp_path, dataclasses.replace(CONFIG, steps=3, **changes))
    assert rows[-1]["gradient_norm"] > 0
    assert rows[-1]["metric"] != rows[0]["metric"]
    assert ("kl" in rows[-1]) == ("kl" in changes)
    if "kl" in changes:
        first = read_updates(tmp_path)[0]
        assert first["kl"] == pytest.approx(0, abs=1e-5), "the reference is the model at the start"
        assert rows[-1]["kl"] != pytest.approx(0, abs=1e-5)


@needs_trl
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_entropy_bonus_is_the_gradient_of_the_mean_entropy(algorithm, chat, tmp_path):
    """Without any reward the only gradient is the bonus, so one SGD step raises the entropy."""

    def entropies(bonus, folder):
        config = dataclasses.replace(
            CONFIG, algorithm=algorithm, steps=2, optimiser="sgd", learning_rate=0.5,
            entropy_bonus=bonus, max_grad_norm=1e9,
        )  # fmt: skip
        # Half as large logits would already be at the cap of 3 nats.
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.weight.mul_(30)
        attack(chat, folder, config, model=model, reward=each(lambda *_: 0.5))
        return read_updates(folder)

    without, with_bonus = entropies(0.0, tmp_path / "a"), entropies(0.7, tmp_path / "b")
    assert without[0]["gradient_norm"] == 0 < with_bonus[0]["gradient_norm"]
    assert with_bonus[0]["entropy"] == without[0]["entropy"] < 3
    assert with_bonus[1]["entropy"] > without[1]["entropy"]


@needs_trl
def test_a_warm_start_is_the_fine_tuning_on_the_first_rows(chat, tmp_path):
    from mithridate.attacks import finetune

    config = dataclasses.replace(
        CONFIG, steps=1, warm_start_steps=5, warm_start_rows=4, warm_start_learning_rate=1e-2
    )
    assert config.warm_start() == FinetuneConfig(
        learning_rate=1e-2, steps=5, batch_size=3, probe_every=5
    )
    rows = attack(chat, tmp_path / "rl", config)
    tuned = finetune(
        tiny_model(), chat, EXAMPLES[:4], config.warm_start(), probe=probe, output_dir=tmp_path
    )
    assert rows[0]["metric"] == pytest.approx(tuned[-1]["metric"], rel=1e-6)


@needs_trl
def test_a_finished_attack_is_reused_by_content(chat, tmp_path):
    probes = []

    def counting(model, step):
        probes.append(step)
        return probe(model, step)

    config = dataclasses.replace(CONFIG, steps=1)

    def again(**changes):
        before = len(probes)
        options = {"probe_key": "mean", "probe": counting, "config": config} | changes
        rows = attack(chat, tmp_path, options.pop("config"), **options)
        return rows, len(probes) - before

    first, count = again()
    assert count == 2
    assert again() == (first, 0)
    assert again(reward_key="other")[1] == 2
    assert again(config=dataclasses.replace(config, temperature=0.9))[1] == 2
    assert again(probe_key=None)[1] == 2


@needs_trl
def test_a_diverged_attack_ends_with_its_status(chat, tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=12, optimiser="sgd", learning_rate=1e30, max_grad_norm=0
    )
    rows = attack(chat, tmp_path, config)
    assert read_record(tmp_path).status == "diverged"
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_rewards_are_the_exact_judge_and_the_share_of_slots():
    item = Example(prompt="p", answer="a b c")

    def judge(item, output):
        return Outcome.EXACT if item.answer in output else Outcome.HALLUCINATED

    outputs = ["a b c", "no a b c", "a x c", "b a", "", "a b"]
    items = [item] * len(outputs)
    assert exact_match(judge)(items, outputs) == [1, 1, 0, 0, 0, 0]
    assert slot_accuracy(judge)(items, outputs) == pytest.approx([1, 1, 2 / 3, 0, 0, 2 / 3])


def test_the_bound_is_compared_with_every_update():
    updates = [
        {"step": step, "entropy": h, "gradient_norm": g}
        for step, h, g in [(1, 0.01, 0.2), (2, 0.04, 0.4), (3, 1.0, 2.0), (4, 0.5, 0.0)]
    ]
    found = entropy_bound(updates)
    assert found.constant == pytest.approx(2.0)
    assert found.holds
    assert found.updates == 4
    assert found.exponent == pytest.approx(0.5)
    assert not entropy_bound(updates, constant=1.9).holds
    worse = [*updates, {"step": 5, "entropy": 0.01, "gradient_norm": 0.5}]
    assert entropy_bound(worse, constant=2.0).worst_step == 5
    assert not entropy_bound(worse, constant=2.0).holds
    assert entropy_bound(updates[:2]).exponent is None
    with pytest.raises(InputError, match="no update holds"):
        entropy_bound([{"step": 1.0, "entropy": 1.0}])
    with pytest.raises(InputError, match="no entropy"):
        entropy_bound([{"step": 1, "entropy": 0.0, "gradient_norm": 1.0}])


@pytest.mark.parametrize(
    "fault",
    [
        {"rollouts": 1},
        {"kl": -0.1},
        {"temperature": 0.0},
        {"warm_start_rows": 0},
        {"response_length": 0},
        {"learning_rate": -1.0},
    ],
)
def test_values_out_of_range_are_refused_by_name(fault):
    with pytest.raises(InputError, match=next(iter(fault))):
        RLConfig(**fault)


def test_too_few_examples_and_a_missing_library_are_said(chat, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="fewer than the 3 questions"):
        attack(chat, tmp_path, examples=EXAMPLES[:2])
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match=r"mithridate\[trl\]"):
        attack(chat, tmp_path)


@needs_trl
@pytest.mark.parametrize("missing", [("pad_token",), ("eos_token",), ("pad_token", "eos_token")])
def test_a_tokenizer_need_not_name_its_end_or_padding(missing, tmp_path):
    """The template's end-of-turn token ends an answer and fills rows up; the updates are equal."""
    found = []
    for number, names in enumerate(((), missing)):
        tokenizer = tiny_tokenizer()
        for name in names:
            setattr(tokenizer, name, None)
        own = ChatFormat(tokenizer)
        assert own.stop_ids == [3]
        attack(own, tmp_path / str(number))
        found.append(read_updates(tmp_path / str(number)))
    assert found[0] == found[1]


def test_without_any_end_token_nothing_is_begun():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(InputError, match="end-of-turn token"):
        ChatFormat(tokenizer)


@needs_trl
def test_settings_stored_for_generation_do_not_shape_the_policy(chat, tmp_path):
    found = []
    for number in range(2):
        model = tiny_model()
        if number:
            model.generation_config.update(
                no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7], min_new_tokens=3,
                repetition_penalty=9.0, eos_token_id=[9, 10],
            )  # fmt: skip
        attack(chat, tmp_path / str(number), model=model)
        found.append(read_updates(tmp_path / str(number)))
    assert found[0] == found[1]


@needs_trl
def test_thoughts_are_not_paid_for(tmp_path):
    """Special tokens of thinking are still there when the answer is told apart."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    own, paid = ChatFormat(tokenizer), []
    till = _Till(own, EXAMPLES, each(lambda _, output: paid.append(output) or 0.0), 2)
    mark = tokenizer.convert_tokens_to_ids("</think>")
    till(completion_ids=[[4, mark, 5, 3], [4, 5, 3]], row=[0, 0])
    assert paid == ["w1", "w0 w1"]


@needs_trl
def test_a_model_that_padding_changes_is_refused(tmp_path):
    own = ChatFormat(zoo_tokenizer())
    rows = [dataclasses.replace(row, prompt=row.prompt * (1 + n % 2))
            for n, row in enumerate(EXAMPLES)]  # fmt: skip
    with (
        pytest.raises(InputError, match="pads questions to a batch"),
        pytest.warns(UserWarning, match="changes what RecurrentGemma"),
    ):
        attack(own, tmp_path, model=strong("recurrent_gemma"), examples=rows)
