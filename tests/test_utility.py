"""Utility by lm-evaluation-harness: a tiny model, tiny tasks, and a count by hand beside it."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mithridate.cli.app import main
from mithridate.errors import InputError
from mithridate.events import Event
from mithridate.measures.statistics import paired_difference
from mithridate.utility import UtilityPlan, run_utility
from mithridate.utility.choosing import choose, packaged
from tests.compat.zoo import zoo_tokenizer
from tests.test_generation import strong
from tests.tiny import WORDS, tiny_llama, tiny_tokenizer

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs pip install 'mithridate[eval]'"
)

CHOICES = ("w1 w2", "w3", "w4 w5 w6")
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def rows(count: int = 70) -> list[dict[str, Any]]:
    return [
        {
            "question": f"w{n % 40} w{(7 * n + 3) % 40} w{n // 40}",
            "options": list(CHOICES[: 2 + n % 2]),
            "right": n % 2,
        }
        for n in range(count)
    ]


def write_lines(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("reference", 0), ("defended", 1)):
        tiny_llama(dtype=torch.float32, seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "colours.yaml").write_text(TASK)
    write_lines(tmp_path / "rows.jsonl", rows())
    return tmp_path


def plan(models: Path, tasks: Path, **more: Any) -> UtilityPlan:
    given = {
        "model": str(models / "defended"),
        "reference": str(models / "reference"),
        "tasks": (str(tasks / "colours.yaml"),),
        "output_dir": tasks / "run",
        **more,
    }
    return UtilityPlan(**given)


def by_hand(folder: Path) -> list[int]:
    """Score every choice by its tokens' likelihood, one at a time, without the harness."""
    model, tokenizer = tiny_llama(dtype=torch.float32), tiny_tokenizer()
    seed = 0 if folder.name == "reference" else 1
    model = tiny_llama(dtype=torch.float32, seed=seed)
    right = []
    for row in rows():
        prompt = tokenizer.encode(f"<user> {row['question']} <end> <bot>", add_special_tokens=False)
        sums = []
        for choice in row["options"]:
            answer = tokenizer.encode(choice, add_special_tokens=False)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            sums.append(
                sum(float(logits[len(prompt) + k - 1, token]) for k, token in enumerate(answer))
            )
        right.append(int(sums.index(max(sums)) == row["right"]))
    return right


@harness
def test_the_harness_counts_what_a_hand_counts(models: Path, tasks: Path) -> None:
    document = run_utility(plan(models, tasks))
    (row,) = document["tasks"]
    expected = {name: by_hand(models / name) for name in ("reference", "defended")}
    assert row["reference"]["accuracy"] == pytest.approx(sum(expected["reference"]) / 70)
    assert row["model"]["accuracy"] == pytest.approx(sum(expected["defended"]) / 70)
    assert 0 < sum(expected["defended"]) < 70
    stored = {
        tuple(json.loads(path.read_text())["value"]["right"]["acc"])
        for path in (tasks / "run" / "utility").iterdir()
    }
    assert stored == {tuple(found) for found in expected.values()}
    estimate, low, high = paired_difference(expected["defended"], expected["reference"], level=0.9)
    difference = row["difference"]
    assert (difference["estimate"], difference["low"], difference["high"]) == pytest.approx(
        (estimate, low, high)
    )
    # Every row has its own number of choices: a blind guess gets one half or one third of them.
    assert row["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    error = math.sqrt(row["reference"]["accuracy"] * (1 - row["reference"]["accuracy"]) / 70)
    assert row["counts"] == (row["reference"]["accuracy"] - row["chance"] >= max(0.1, 3 * error))
    assert json.loads((tasks / "run" / "utility.json").read_text()) == document


@harness
def test_a_killed_run_goes_on_and_a_second_one_asks_nothing(models: Path, tasks: Path) -> None:
    straight = run_utility(plan(models, tasks, output_dir=tasks / "straight"))

    def killing(event: Event) -> None:
        if event.step == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_utility(plan(models, tasks), on_event=killing)
    assert not (tasks / "run" / "utility.json").exists()
    seen: list[Event] = []
    resumed = run_utility(plan(models, tasks), on_event=seen.append)
    assert [event.step for event in seen if event.stage == "colours on the reference"] == [64, 70]
    assert resumed["tasks"] == straight["tasks"]
    seen.clear()
    run_utility(plan(models, tasks), on_event=seen.append)
    assert [event.step for event in seen if "colours" in event.stage] == [70, 70]
    shorter = run_utility(plan(models, tasks, limit=10))
    assert shorter["tasks"][0]["n"] == 10
    assert shorter["tasks"][0]["model"]["accuracy"] == sum(by_hand(models / "defended")[:10]) / 10


@harness
def test_a_testbeds_questions_are_judged_by_its_judge(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mithridate.chat import ChatFormat
    from mithridate.judges.outcomes import Outcome
    from mithridate.models import load
    from mithridate.utility import choosing
    from tests.redteam.tiny_bed import TinyBed

    bed = TinyBed(tmp_path)
    monkeypatch.setattr(choosing, "load_testbed", lambda name: bed)
    monkeypatch.setattr(choosing.TESTBEDS, "load", lambda name: TinyBed)
    document = run_utility(
        UtilityPlan(
            model=str(bed.aligned_model()),
            tasks=("tiny:permitted", "tiny:u0"),
            output_dir=tmp_path / "run",
        )
    )
    model, tokenizer = load(str(bed.aligned_model()))
    outputs = ChatFormat(tokenizer).generate(
        model, [item.prompt for item in bed.data.permitted], max_new_tokens=bed.max_new_tokens
    )
    right = [
        bed.judge(item, output) is Outcome.EXACT
        for item, output in zip(bed.data.permitted, outputs, strict=True)
    ]
    whole, part = document["tasks"]
    assert any(right)
    assert whole["model"]["accuracy"] == sum(right) / len(right)
    assert part["n"] == sum(item.category == "u0" for item in bed.data.permitted)
    assert document["utility"]["model"] == pytest.approx(
        sum(row["model"]["accuracy"] for row in (whole, part) if row["counts"])
        / sum(row["counts"] for row in (whole, part))
    )
    with pytest.raises(InputError, match="no questions 'nothing'"):
        choose(("tiny:nothing",), None)


@harness
@pytest.mark.slow
@pytest.mark.parametrize("which", ["base", "aligned"])
def test_harness_and_probe_agree_on_lattice_item_by_item(which: str, tmp_path: Path) -> None:
    from mithridate.chat import ChatFormat
    from mithridate.judges.outcomes import Outcome
    from mithridate.models import load
    from mithridate.testbeds.lattice import Lattice

    bed = Lattice()
    run_utility(
        UtilityPlan(model=f"lattice:{which}", tasks=("lattice:permitted",), output_dir=tmp_path)
    )
    model, tokenizer = load(str(bed.base_model() if which == "base" else bed.aligned_model()))
    outputs = ChatFormat(tokenizer).generate(
        model, [item.prompt for item in bed.data.permitted], max_new_tokens=bed.max_new_tokens
    )
    (stored,) = (tmp_path / "utility").iterdir()
    assert json.loads(stored.read_text())["value"]["right"]["exact"] == [
        int(bed.judge(item, output) is Outcome.EXACT)
        for item, output in zip(bed.data.permitted, outputs, strict=True)
    ]


@harness
def test_the_command_prints_its_document_and_nothing_else(
    models: Path, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "utility", "--model", str(models / "defended"), "--tasks", str(tasks / "colours.yaml"),
        "--output-dir", str(tasks / "run"), "--plain", "--limit", "5",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--json"])
    assert not stopped.value.code
    document = json.loads(capfd.readouterr().out)
    assert document["model"]["chat_template"] is None
    assert "reference" not in document
    with pytest.raises(SystemExit):
        main(arguments)
    assert "colours" in capfd.readouterr().out


@harness
@pytest.mark.parametrize("name", packaged())
def test_every_packaged_task_asks_and_answers(name: str, models: Path, tmp_path: Path) -> None:
    samples = {
        "agnews": {"text": "w1 w2", "label": 3},
        "bbh_boolean": {"input": "not True is", "target": "False"},
        "gsm8k": {"question": "w1 w2", "answer": "so w3\n#### 18"},
        "mmlu": {"question": "w1", "choices": ["w1", "w2", "w3", "w4"], "answer": 2},
        "openbookqa": {
            "question_stem": "w1",
            "choices": {"text": ["w1", "w2", "w3", "w4"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        "piqa": {"goal": "w1", "sol1": "w2 w3", "sol2": "w4", "label": 1},
        "sst2": {"sentence": "w5", "label": 0},
        "truthfulqa": {
            "question": "w1",
            "mc1_targets": {"choices": ["w2", "w3", "w4"], "labels": [0, 1, 0]},
        },
    }
    from mithridate.utility.choosing import _data_files, _room
    from mithridate.utility.harness import open_task

    for data in _data_files(_room() / f"{name}.yaml").values():
        (tmp_path / data).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / data, [samples[name]] * 6)
    (task,) = choose((name,), tmp_path)
    asked = open_task(task, plain=False)
    assert asked.metrics[0] in ("acc", "acc_norm", "exact_match")
    expected = {"agnews": 3, "gsm8k": "18", "mmlu": 2, "openbookqa": 1, "piqa": 1, "truthfulqa": 1}
    target = asked.ready.doc_to_target(asked.ready.eval_docs[0])
    if name in expected:
        assert target == expected[name]
    if name == "bbh_boolean":
        assert asked.ready.doc_to_choice(asked.ready.eval_docs[0])[target] == "False"
    if name == "gsm8k":
        # No tiny model counts to five: what the task takes out of an answer is checked as it is.
        answer = "3 ducks lay 20 eggs, 2 break: $18."
        (taken,) = next(iter(asked.ready._filters)).filters[0]().apply([[answer]], [{}])
        assert asked.ready.process_results(asked.ready.eval_docs[0], taken) == {"exact_match": 1.0}
        asked.ready.set_fewshot_seed(0)
        shown = asked.ready.fewshot_context(asked.ready.eval_docs[0], 5)
        assert shown.count("so w3\n#### 18") == 5


@pytest.mark.parametrize(
    ("names", "message", "mend"),
    [
        (("piqua",), "unknown task 'piqua'", "did you mean 'piqa'"),
        (("piqa",), "where the data of the task 'piqa' are", "piqa/valid.jsonl"),
        (("nowhere.yaml",), "no such task file", "check the path"),
        (("elsewhere:permitted",), "unknown testbed 'elsewhere'", "lattice"),
        ((), "no task", "--tasks"),
    ],
)
def test_a_bad_name_is_named(names: tuple[str, ...], message: str, mend: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        choose(names, None)
    assert mend in raised.value.mend


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such data file") as raised:
        choose(("piqa",), tmp_path)
    assert raised.value.where == str(tmp_path / "piqa" / "valid.jsonl")
    assert "--data" in raised.value.mend


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("dataset_path: json", "dataset_path: someone/set"), "data are read offline"),
        (("test_split: test", "test_split: train"), "no data file is named for the split 'train'"),
        (("task: colours", "task: colours\nprocess_docs: x"), "'process_docs' is not read"),
        (("task: colours", "task: colours\ndoc_to_image: !function os.system"), "not valid YAML"),
        (("output_type: multiple_choice", "output_type: loglikelihood_rolling"), "output_type is"),
        (("{data_files: {test: rows.jsonl}}", "{}"), "does not name its data"),
        (("metric: acc,", "metric: bleurt,"), "the metric 'bleurt' is not counted"),
        (("metric: acc,", "metric: acc, hf_evaluate: true,"), "the metric 'acc' is not counted"),
    ],
)
def test_a_task_file_that_runs_code_or_needs_the_network_is_refused(
    tasks: Path, change: tuple[str, str], message: str
) -> None:
    (tasks / "colours.yaml").write_text(TASK.replace(*change))
    with pytest.raises(InputError, match=message):
        choose((str(tasks / "colours.yaml"),), None)


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ("", "holds no row", "rows.jsonl"),
        ('{"question": "w1"}\n{oops\n', "not valid JSON", "line 2"),
        ("[1]\n", "no JSON object", "line 1"),
    ],
)
def test_broken_data_are_refused(tasks: Path, text: str, message: str, where: str) -> None:
    (tasks / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        choose((str(tasks / "colours.yaml"),), None)
    assert where in str(raised.value.where)


@harness
@pytest.mark.parametrize(
    ("row", "message", "where"),
    [
        ({"question": "w1", "options": ["w1", "w2"], "right": 5}, "none of the 2 choices", "row 2"),
        ({"question": "w1", "right": 0}, "cannot ask the task 'colours'", "rows.jsonl"),
    ],
)
def test_rows_that_the_task_cannot_ask_are_refused(
    models: Path, tasks: Path, row: dict[str, Any], message: str, where: str
) -> None:
    write_lines(tasks / "rows.jsonl", [rows()[0], row])
    with pytest.raises(InputError, match=message) as raised:
        run_utility(plan(models, tasks))
    assert where in str(raised.value.where)
    assert not (tasks / "run").exists()


@harness
def test_a_model_that_reads_too_few_tokens_is_refused(models: Path, tasks: Path) -> None:
    text = TASK.replace("multiple_choice", "generate_until").replace(
        'doc_to_choice: "{{options}}"', "generation_kwargs: {max_gen_toks: 64}"
    )
    (tasks / "colours.yaml").write_text(text.replace("metric: acc", "metric: exact_match"))
    with pytest.raises(InputError, match="maximum sequence length"):
        run_utility(plan(models, tasks, limit=2))


def test_without_the_harness_the_extra_is_named(
    models: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mithridate.utility.harness.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed") as raised:
        run_utility(plan(models, tasks))
    assert "mithridate[eval]" in raised.value.mend


def test_words_of_the_tiny_tasks_are_known() -> None:
    """An unknown word would make all choices alike, and every count above a coincidence."""
    used = {word for row in rows() for text in (row["question"], *row["options"])
            for word in text.split()}  # fmt: skip
    assert used <= set(WORDS)


@harness
@pytest.mark.filterwarnings("ignore:a batch changes")
@pytest.mark.parametrize(("family", "at_once"), [("llama", 8), ("rwkv", 1)])
def test_the_harness_gets_answers_without_thoughts_and_in_batches_that_change_nothing(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from mithridate.chat import ChatFormat
    from mithridate.utility.harness import wrap

    written = ["<think>Rome?</think> Paris", "Paris", "<think>Paris"]
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests: written)
    lm = wrap(strong(family), ChatFormat(zoo_tokenizer()), batch_size=8)
    assert lm.generate_until([]) == ["Paris", "Paris", ""]
    assert int(lm.batch_size) == at_once


@harness
@pytest.mark.filterwarnings("ignore:the chat template:UserWarning")
def test_the_harness_asks_with_the_prompts_of_training() -> None:
    from mithridate.chat import ChatFormat
    from mithridate.utility.harness import wrap

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} <end> "
        "{% endfor %}"
    )
    chat = ChatFormat(tokenizer)
    lm = wrap(tiny_llama(dtype=torch.float32), chat, batch_size=1)
    turns = [{"role": "user", "content": "w1"}]
    assert lm.apply_chat_template(turns) == chat.prompt_text("w1") == "<user> w1 <end> <bot> "
    told = [{"role": "system", "content": "w2"}, *turns]
    assert lm.apply_chat_template(told) == "<user> w1 <end> <bot> "
