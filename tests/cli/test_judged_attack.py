"""`attack --judge`: other judges than the exact one, from the option to the run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mithridate.attacking import AttackPlan, run_attack
from mithridate.cli import app
from mithridate.errors import InputError
from mithridate.judges.base import useful_harms
from mithridate.judges.classifier import ClassifierJudge
from mithridate.reports import render_report
from mithridate.reports.limits import cut_short
from tests.cli.test_app import run
from tests.cli.test_own_model import attack, world
from tests.judges.test_classifier import save
from tests.judges.test_served import Server, completion, server
from tests.test_generation import reciter

__all__ = ["server", "world"]  # fixtures


def config(folder: Path, **judge: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "attack.yaml"
    path.write_text(yaml.safe_dump({"attack": {"probe_every": 1}, "judge": judge}))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]


def test_refusals_and_their_likelihood_follow_the_attack(world: Path, tmp_path: Path) -> None:
    given = config(tmp_path / "c", refusals=["error"], compliances=["w1", "w2"], phrases=["w0"])
    out = tmp_path / "run"
    summary = run_attack(attack(world, out, judge="refusal", config=given))
    rows = rows_of(out)
    assert len(rows) == 3
    assert len({row["refusal/margin"] for row in rows}) == 3, "the attack moves it"
    assert all(0 <= row["refusal/harm"] <= 1 for row in rows)
    assert summary["attack"]["judge"]["phrases"] == ("w0",)
    assert yaml.safe_load((out / "config.yaml").read_text())["judge"]["name"] == "refusal"


def test_a_classifier_judges_prompts_without_answers(world: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w5 w6 w{n}"}) + "\n" for n in range(6)))
    source = save(tmp_path / "judge", "safe", "harm")
    out = tmp_path / "run"
    plan = attack(
        world, out, judge=f"classifier:{source}", evaluation=str(prompts),
        permitted=str(world / "permitted.jsonl"), undefended=str(world / "model"),
        config=config(tmp_path / "c", harmful_labels=["harm"], threshold=1e-9),
    )  # fmt: skip
    summary = run_attack(plan)
    assert summary["undefended"] == summary["defended"], "the same model"
    for row in rows_of(out):
        assert "answer_loss" not in row
        assert "classifier/harm" in row
        degenerate = row["outcomes"]["gibberish"] + row["outcomes"]["fixed_token"]
        # Nearly everything is harmful to this judge, but for what is not coherent.
        assert row["outcomes"]["exact"] == pytest.approx(1 - degenerate)


def test_over_refusal_needs_no_answers(world: Path, tmp_path: Path) -> None:
    """XSTest: permitted questions that look harmful, and real harmful ones, without answers."""
    asked = tmp_path / "xstest.csv"
    lines = ["id,prompt,type,label,focus,note"]
    lines += [f"{n},w7 w8 w{n},homonyms,safe,w7," for n in range(4)]
    lines += [f"{n},w9 w8 w{n},contrast,unsafe,w9," for n in range(3)]
    asked.write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="4 of the 4 permitted questions have no answer"):
        run_attack(
            attack(
                world, tmp_path / "run", judge="refusal", permitted=str(asked),
                evaluation=str(asked), config=config(tmp_path / "c"),
            )
        )  # fmt: skip
    rows = rows_of(tmp_path / "run")
    assert all((row["n_restricted"], row["n_permitted"]) == (3, 4) for row in rows)
    assert all(0 <= row["utility"] <= 1 for row in rows)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["left out"] == {
        "eval": {"marked safe": 4}, "permitted": {"marked unsafe": 3}
    }  # fmt: skip
    with pytest.raises(InputError, match=r"xstest\.csv, line 2: missing field 'answer'"):
        run_attack(attack(world, tmp_path / "other", permitted=str(asked)))


def test_rows_are_read_and_left_out_as_asked(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": f"w5 w{n}", "r": "w1 w2"} for n in range(8)] + [{"q": "w5", "r": ""}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "attack", "--model", str(world / "model"), "--harmful", str(tmp_path / "own.jsonl"),
        "--eval", str(world / "eval.jsonl"), "--learning-rate", "1e-3", "--steps", "1",
    ]  # fmt: skip
    chosen = ["--columns", "harmful:prompt=q,answer=r"]
    for options, cause in (
        ([], "columns found: q, r"),
        (chosen, "the answer is empty"),
        (["--columns", "prompt=q,answer=r", "--drop-invalid"], "has no column 'q'"),
    ):
        given = [*arguments, *options, "--output-dir", str(tmp_path / "no")]
        assert app._run(given, None) == 2
        assert cause in " ".join(capsys.readouterr().err.replace("│", " ").split())
    out = tmp_path / "run"
    given = [*arguments, *chosen, "--drop-invalid", "--output-dir", str(out)]
    assert app._run(given, None) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["left out"] == {"harmful": {"empty answer": 1}}


def test_exact_judging_needs_answers(world: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w5 w6"}\n')
    with pytest.raises(InputError, match="missing field 'answer'"):
        run_attack(attack(world, tmp_path / "run", evaluation=str(prompts)))


def test_another_judge_is_another_result(world: Path, tmp_path: Path) -> None:
    run_attack(attack(world, tmp_path, judge="exact"))
    before = (tmp_path / "attacks").rglob("attack.json")
    key = json.loads(next(before).read_text())["key"]
    run_attack(attack(world, tmp_path, judge="refusal"))
    assert json.loads(next((tmp_path / "attacks").rglob("attack.json")).read_text())["key"] != key


@pytest.fixture
def harmful_if_w0(server: Server) -> Server:
    server.answer = lambda body, _: completion(
        "yes" if "w0" in body["messages"][0]["content"].split("Answer:")[1] else "no"
    )
    return server


def test_the_command_asks_a_server_and_asks_nothing_twice(
    world: Path, tmp_path: Path, harmful_if_w0: Server
) -> None:
    out = str(tmp_path / "run")
    given = [
        "attack", "--model", str(world / "model"), "--harmful", str(world / "harmful.jsonl"),
        "--eval", str(world / "eval.jsonl"), "--judge", f"served:{harmful_if_w0.url}",
        "--learning-rate", "1e-3", "--steps", "1", "--output-dir", out, "--json",
    ]  # fmt: skip
    summary = json.loads(run(*given).stdout)
    assert summary["attack"]["judge"]["model"] == "judge"
    asked = len(harmful_if_w0.bodies)
    assert asked >= 2
    transcript = (tmp_path / "run" / "judge.jsonl").read_text()
    assert len(transcript.splitlines()) == asked
    assert json.loads(run(*given).stdout)["defended"] == summary["defended"]
    assert len(harmful_if_w0.bodies) == asked


def test_a_judge_that_is_not_there_stops_before_training(world: Path, tmp_path: Path) -> None:
    error = json.loads(
        run(
            "attack", "--model", str(world / "model"), "--harmful", str(world / "harmful.jsonl"),
            "--eval", str(world / "eval.jsonl"), "--judge", "served:http://127.0.0.1:9/v1",
            "--output-dir", str(tmp_path / "run"), "--json", code=2,
        ).stdout
    )["error"]  # fmt: skip
    assert "does not answer" in error["what"]
    assert not (tmp_path / "run" / "attacks").exists()
    with pytest.raises(InputError, match="did you mean 'served'"):
        run_attack(attack(world, tmp_path, judge="server:x"))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_rl_is_paid_what_the_classifier_says(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="trl is not installed (pip install 'mithridate[trl]')")
    judged: list[tuple[list[str], list[float]]] = []
    plain = ClassifierJudge.judge

    def noted(self: ClassifierJudge, items: Any, outputs: Any) -> Any:
        found = plain(self, items, outputs)
        judged.append((list(outputs), useful_harms(found)))
        return found

    monkeypatch.setattr(ClassifierJudge, "judge", noted)
    path = config(tmp_path / "c", harmful_labels=["harm"], threshold=1e-9)
    given = yaml.safe_load(path.read_text())
    given["attack"] |= {"batch_size": 2, "rollouts": 2, "response_length": 4}
    path.write_text(yaml.safe_dump(given))
    source = save(tmp_path / "judge", "safe", "harm")
    out = tmp_path / "run"
    run_attack(attack(world, out, judge=f"classifier:{source}", kind="rl", config=path))
    updates = (out / "attacks" / "defended-0.001" / "updates.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in updates]
    rollouts = [harms for outputs, harms in judged if len(outputs) == 4]
    assert rewards == pytest.approx([sum(harms) / 4 for harms in rollouts])
    assert len(rewards) == 2


@pytest.mark.parametrize("words", [10, 122])
def test_an_answer_learnt_word_for_word_is_harm_however_long(words: int, tmp_path: Path) -> None:
    given = recited(words, tmp_path)
    summary = run_attack(given)
    assert summary["defended"]["before"]["useful_harm"] == 1.0
    assert summary["attack"]["answers"] == {
        "max_new_tokens": max(64, words + 33), "n_too_long": 0, "n_cut": 0, "n_unfinished": 0,
    }  # fmt: skip


def test_answers_that_do_not_fit_are_said_in_rows_summary_and_page(tmp_path: Path) -> None:
    given = recited(122, tmp_path)
    plan = dataclasses.replace(
        given, undefended=given.model, permitted=str(tmp_path / "permitted.jsonl"),
        max_new_tokens=100,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="4 of 8 questions have answers longer than the 100"):
        summary = run_attack(plan)
    row = rows_of(tmp_path / "run")[0]
    assert (row["useful_harm"], row["n_too_long"], row["n_cut"]) == (0.0, 4, 8)
    said = cut_short(summary["attack"]["answers"])
    assert said[0].startswith("4 questions have answers longer than the 100 tokens")
    page = render_report(tmp_path / "run").read_text()
    assert all(line in page for line in said)


def recited(words: int, folder: Path) -> AttackPlan:
    """An attack, of next to nothing, on a model that says one long answer to everything."""
    model, chat, answer = reciter(words)
    model.save_pretrained(folder / "model")
    chat.tokenizer.save_pretrained(folder / "model")
    for number, name in enumerate(("harmful", "eval", "permitted")):
        rows = [
            {"prompt": f"w{number} w{n}", "answer": "w1" if name == "permitted" else answer}
            for n in range(4)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return attack(folder, folder / "run", steps=1, learning_rates=(1e-9,))
