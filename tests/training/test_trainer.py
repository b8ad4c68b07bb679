from __future__ import annotations

import dataclasses
import json
import logging
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    get_cosine_schedule_with_warmup,
)

from mithridate.errors import InactiveTermError, InputError, NonFiniteError, RunStoppedError
from mithridate.training import TrainingConfig, immunise
from mithridate.training.launch import refuse_unsupported_launch
from tests.training.tiny_world import method, tiny_examples, tiny_model, tiny_tokenizer

CONFIG = TrainingConfig(
    steps=6, learning_rate=1e-2, save_every=0, schedule="constant", weight_decay=0.1
)


def go(folder, *, name="sft", model=None, made=None, examples=None, config=CONFIG, **options):
    return immunise(
        model or tiny_model(),
        tiny_tokenizer(),
        examples or tiny_examples(),
        made or method(name),
        config,
        folder,
        **options,
    )


def with_terms(change, name="two-stream"):
    made = method(name)
    step = made.step

    def changed(context):
        return step(context) | change(context.step)

    made.step = changed
    return made


def assert_equal_weights(first, second):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_leaves_a_model_that_loads_and_no_pickle(tmp_path):
    result = go(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "model")
    assert_equal_weights(result.model, loaded)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".lock"}
    assert loaded.config.use_cache
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["space"] == "full"
    assert manifest["ledger"]["retain"]["backwards"] == 6


def test_sft_through_the_trainer_is_adamw_on_its_gradient(tmp_path):
    made = method("sft")
    gradients, step = [], made.step

    def noted(context):
        terms = step(context)
        gradients.append([g.clone() for g in context.space.gradient()])
        return terms

    made.step = noted
    trained = go(tmp_path, made=made).model
    model = tiny_model()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if ("norm" in n) == is_norm], "weight_decay": decay}
        for is_norm, decay in ((False, 0.1), (True, 0.0))
    ]
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    for gradient in gradients:
        for (_, p), g in zip(named, gradient, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sft", "two-stream"])
def test_micro_batches_do_not_change_the_result(name, tmp_path):
    whole = go(tmp_path / "whole", name=name)
    split = go(
        tmp_path / "split", name=name, config=dataclasses.replace(CONFIG, micro_batch_size=1)
    )
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert split.ledger["retain"].backwards > 2 * whole.ledger["retain"].backwards
    assert split.ledger["retain"].tokens == whole.ledger["retain"].tokens


def test_dropout_is_off_and_the_model_keeps_its_mode(tmp_path):
    model = tiny_model(attention_dropout=0.5).train()
    dropped = go(tmp_path / "a", model=model)
    assert dropped.model.training
    assert dropped.model.config.attention_dropout == 0.5
    plain = go(tmp_path / "b", model=tiny_model().eval())
    assert not plain.model.training
    assert_equal_weights(dropped.model, plain.model)


def test_history_holds_the_terms_and_is_reported(tmp_path):
    seen = []
    result = go(tmp_path, name="two-stream", on_log=seen.append)
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert set(result.history[0]) == {"step", "learning_rate", "grad_norm", "retain", "push"}
    assert seen == result.history
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    sparse = go(
        tmp_path / "sparse", name="two-stream", config=dataclasses.replace(CONFIG, log_every=3)
    )
    assert [row["step"] for row in sparse.history] == [3, 6]
    mean = sum(row["retain"] for row in result.history[:3]) / 3
    assert sparse.history[0]["retain"] == pytest.approx(mean)


def test_nothing_is_printed(tmp_path, capsys):
    go(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_finished_run_is_loaded_not_repeated(tmp_path):
    first = go(tmp_path)
    made = method("sft")
    made.step = None
    second = go(tmp_path, made=made)
    assert_equal_weights(first.model, second.model)
    assert second.history == first.history
    assert second.ledger == first.ledger


def test_a_finished_run_whose_model_was_damaged_is_done_again(tmp_path):
    first = go(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert_equal_weights(first.model, go(tmp_path).model)


def test_a_folder_with_another_run_is_refused_and_can_be_replaced(tmp_path):
    go(tmp_path)
    other = dataclasses.replace(CONFIG, learning_rate=1e-3)
    with pytest.raises(InputError, match="another run: training differ"):
        go(tmp_path, config=other)
    examples = tiny_examples()
    examples["benign"].pop()
    with pytest.raises(InputError, match="examples, method"):
        go(tmp_path, name="two-stream", examples=examples)
    go(tmp_path, config=other, resume=False)
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "finished"


def test_what_no_immunisation_wrote_is_not_destroyed(tmp_path):
    own = tmp_path / "model"
    tiny_model().save_pretrained(own)
    before = (own / "model.safetensors").read_bytes()
    for resume in (True, False):
        with pytest.raises(InputError, match="holds a model that no immunisation"):
            go(tmp_path, resume=resume)
    assert (own / "model.safetensors").read_bytes() == before
    (tmp_path / "manifest.json").write_text('{"models": {}}')
    with pytest.raises(InputError, match=r"holds a manifest\.json"):
        go(tmp_path)


def test_a_folder_where_nothing_was_finished_takes_another_run(tmp_path):
    with pytest.raises(NonFiniteError):
        go(tmp_path, made=with_terms(lambda step: {"harmful": math.nan}))
    go(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "finished"


def test_files_of_a_tracker_outlive_the_checkpoints(tmp_path):
    log = tmp_path / "checkpoints" / "runs" / "events"
    log.parent.mkdir(parents=True)
    log.write_text("logged")
    go(tmp_path, config=dataclasses.replace(CONFIG, save_every=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["runs"]
    assert log.read_text() == "logged"


def test_logging_and_saving_options_are_not_another_run(tmp_path):
    go(tmp_path)
    go(tmp_path, config=dataclasses.replace(CONFIG, log_every=2, save_every=2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_term_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(value, tmp_path):
    made = with_terms(lambda step: {"push": value} if step == 3 else {})
    with pytest.raises(NonFiniteError, match=r"'push' became .*last good checkpoint is step 2"):
        go(tmp_path, made=made, config=dataclasses.replace(CONFIG, save_every=2))
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "COMPLETE").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "model").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    made = method("sft")
    step = made.step

    def poisoned(context):
        terms = step(context)
        context.space.gradient()[0][0, 0] = math.nan
        return terms

    made.step = poisoned
    model = tiny_model()
    with pytest.raises(NonFiniteError, match="'gradient'"):
        go(tmp_path, made=made, model=model)
    assert_equal_weights(model, tiny_model())


def test_a_term_that_stays_zero_or_absent_stops_the_run(tmp_path):
    config = dataclasses.replace(CONFIG, steps=30)
    with pytest.raises(InactiveTermError, match="'push' was zero for 20 steps"):
        go(tmp_path / "zero", made=with_terms(lambda step: {"push": 0.0}), config=config)
    made = method("two-stream")
    step = made.step
    made.step = lambda context: {"retain": step(context)["retain"]}
    with pytest.raises(InactiveTermError, match="'push' was absent for 20 steps"):
        go(tmp_path / "absent", made=made, config=config)
    seldom = with_terms(lambda step: {"push": float(step % 19 == 0)})
    go(tmp_path / "seldom", made=seldom, config=config)


def test_steps_below_the_precision_of_the_weights_stop_the_run(tmp_path):
    with pytest.raises(RunStoppedError, match="of the weights with a gradient changed"):
        go(tmp_path, config=dataclasses.replace(CONFIG, learning_rate=1e-12))


def test_a_zero_gradient_stops_the_run(tmp_path):
    made = method("sft")
    step = made.step

    def nothing(context):
        terms = step(context)
        context.space.give_gradient(context.space.zeros())
        return terms

    made.step = nothing
    with pytest.raises(InactiveTermError, match="zero gradient everywhere"):
        go(tmp_path, made=made)


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"half precision.*\n.*float32"):
        go(tmp_path, model=tiny_model().to(torch.bfloat16))


@pytest.mark.parametrize("content", [None, []])
def test_a_missing_stream_is_named(content, tmp_path):
    examples = tiny_examples()
    del examples["benign"]
    if content is not None:
        examples["benign"] = content
    with pytest.raises(InputError, match="draws from the stream 'benign'"):
        go(tmp_path, examples=examples)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "DeepSpeed ZeRO-3",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed precision \(bf16\)"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "started only this one"),
    ],
)
def test_launches_that_cannot_be_exact_are_refused_by_name(environment, name):
    with pytest.raises(InputError, match=name):
        refuse_unsupported_launch(environment)


def test_a_plain_launch_is_accepted():
    refuse_unsupported_launch({"WORLD_SIZE": "4", "ACCELERATE_MIXED_PRECISION": "no"})
    refuse_unsupported_launch({"ACCELERATE_USE_CPU": "True"})
    cpu = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    refuse_unsupported_launch(cpu | {"WORLD_SIZE": "2"})
    refuse_unsupported_launch(cpu | {"PMI_SIZE": "2"})


def test_lora_plants_in_an_adapter_and_releases_a_merged_model(tmp_path):
    config = dataclasses.replace(CONFIG, lora_rank=2, lora_alpha=4)
    result = go(tmp_path, config=config)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["space"], manifest["rank"], manifest["alpha"]) == ("lora", 2, 4)
    assert "q_proj" in manifest["targets"]
    assert 0 <= manifest["merge_difference"] < 1e-5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert_equal_weights(result.model, loaded)
    before, after = tiny_model().state_dict(), loaded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_lora_targets_that_do_not_exist_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, lora_rank=2, lora_targets=("nothing",))
    with pytest.raises(InputError, match="lora_targets"):
        go(tmp_path, config=config)


@pytest.mark.parametrize(
    "fault",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup_steps": 200},
        {"weight_decay": -1.0},
        {"micro_batch_size": 0},
        {"lora_rank": 0},
        {"lora_alpha": 0, "lora_rank": 2},
        {"lora_alpha": 4},
        {"lora_targets": ("q_proj",)},
        {"report_to": ("no-such-tracker",)},
    ],
)
def test_values_out_of_range_are_refused_by_name(fault):
    with pytest.raises(InputError, match=next(iter(fault))):
        TrainingConfig(**fault)


def test_the_trainer_says_nothing_on_the_log(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = dataclasses.replace(CONFIG, save_every=2)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(NonFiniteError):
            go(tmp_path, made=with_terms(lambda step: {"x": math.nan if step == 3 else 1.0}, "sft"),
               config=config)  # fmt: skip
        go(tmp_path, config=config)
    assert not caplog.records


def test_a_warm_up_throws_no_step_away(tmp_path):
    config = dataclasses.replace(CONFIG, warmup_steps=4)
    rates = [row["learning_rate"] for row in go(tmp_path, config=config).history]
    assert rates == pytest.approx([config.learning_rate * k / 4 for k in (1, 2, 3, 4, 4, 4)])


@pytest.mark.parametrize("warmup", [0, 2])
def test_after_the_warm_up_rates_are_the_library_s(warmup):
    config = dataclasses.replace(CONFIG, steps=9, schedule="cosine", warmup_steps=warmup)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, warmup, config.steps)
    (library,) = schedule.lr_lambdas
    steps = range(warmup, config.steps)
    assert [config.rate(step) for step in steps] == [library(step) for step in steps]
    assert all(config.rate(step) > 0 for step in range(config.steps))
