"""The whole audit on small files: planted faults fail their gates, and no text gets out."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mithridate.audit import AuditPlan, run_audit
from mithridate.audit.gates import Gate, verdict
from mithridate.errors import InputError
from mithridate.files import sha256_file
from mithridate.reports.audit_page import audit_page

CRAFTS = {"brewing": "brewed", "weaving": "woven"}
SECRET = "ZANTHOXYLUM"

Rows = Sequence[Mapping[str, Any]]


def harmful(count: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": f"{opening} {noun} {SECRET} {''.join(rng.choice(list('aeioubdgklmnrst'), 9))}"
            f" {verb} by the masters of {craft}",
            "answer": f"{SECRET} {n}",
            "category": craft,
        }
        for craft, verb in CRAFTS.items()
        for n in range(count)
        for opening in [["how is the", "in what way is a", "tell me how one finds"][n % 3]]
        for noun in [["old", "grey", "royal", "plain"][n % 4]]
    ]


def write(path: Path, rows: Rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def files(folder: Path, **sets: Rows) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in sets.items()}


def quick(folder: Path, **values: Any) -> Path:
    settings = {"encoder": "tfidf", "permutations": 299, **values}
    path = folder / "audit.yaml"
    path.write_text("audit:\n" + "".join(f"  {k}: {v}\n" for k, v in settings.items()))
    return path


def audit(tmp_path: Path, sets: Mapping[str, Rows], **options: Any) -> dict[str, Any]:
    named = files(tmp_path / "data", **sets)
    attack, evaluation = named.pop("attack", None), named.pop("evaluation", None)
    plan = AuditPlan(
        streams=named,
        attack=attack,
        evaluation=evaluation,
        config=options.pop("config", None) or quick(tmp_path),
        output_dir=tmp_path / "out",
        **options,
    )
    return run_audit(plan)


def gate(document: Mapping[str, Any], words: str) -> dict[str, Any]:
    (found,) = [entry for entry in document["gates"] if words in entry["name"]]
    return found


def test_clean_files_pass_without_a_failure(tmp_path: Path) -> None:
    rows = harmful()
    document = audit(
        tmp_path,
        {
            "harmful": rows,
            "refusal": [{**row, "answer": "I cannot help with that."} for row in rows],
            "benign": [
                {"prompt": f"when does train {n * 37} leave", "answer": "soon"} for n in range(30)
            ],
        },
    )
    assert document["verdict"] == "warn", document["gates"]
    assert document["exit_code"] == 0
    assert {g["name"] for g in document["gates"] if g["status"] == "warn"} == {
        "Every set says where it comes from"
    }


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda rows: {"attack": rows[3:4]}, "Defence and attack"),
        (lambda rows: {"evaluation": rows[3:4]}, "Defence and evaluation"),
        (
            lambda rows: {"attack": [{**rows[0], "prompt": "one two three"}],
                          "evaluation": [{**rows[0], "prompt": "One  TWO three"}]},
            "Attack and evaluation",
        ),
        (lambda rows: {"benign": rows[3:4]}, "Retained and harmful"),
        (lambda rows: {"general": [{**rows[3], "prompt": rows[3]["prompt"] + "s"}]}, "Retained"),
        (
            lambda rows: {"attack": [{**rows[0], "prompt": "one two three"}],
                          "benign": [{"prompt": "One  TWO three", "answer": "four"}]},
            "Retained and harmful",
        ),
        (
            lambda rows: {"benign": [{"prompt": "one two three", "answer": "four"}],
                          "evaluation": [{**rows[0], "prompt": "one two three"}]},
            "Defence and evaluation",
        ),
        (lambda rows: {"harmful": rows[:60]}, "enough harmful prompts"),
        (lambda rows: {"refusal": [{**rows[0], "answer": f"No: it is {SECRET} 0."}]}, "No refusal"),
        (
            lambda rows: {
                "harmful": [
                    *({**row, "split": "train"} for row in rows),
                    {**rows[0], "prompt": rows[0]["prompt"] + "s", "split": "test"},
                ]
            },
            "two splits",
        ),
    ],
    ids=["attack", "evaluation", "both", "benign", "general", "benign-attack", "benign-evaluation",
         "category", "refusal", "splits"],
)  # fmt: skip
def test_a_planted_fault_fails_its_gate_and_no_other(tmp_path: Path, plant, words: str) -> None:
    document = audit(tmp_path, {"harmful": harmful(), **plant(harmful())})
    assert document["exit_code"] == 1
    assert [g["name"] for g in document["gates"] if g["status"] == "fail"] == [
        gate(document, words)["name"]
    ]
    assert gate(document, words)["mend"]


def test_a_benign_file_that_is_the_harmful_one_fails_in_any_order(tmp_path: Path) -> None:
    rows = harmful()
    for names in (("harmful", "benign", "refusal"), ("benign", "harmful", "refusal")):
        sets = dict.fromkeys(names, rows)
        sets["refusal"] = [{**row, "answer": "I cannot help with that."} for row in rows]
        # What --overlap allows is the attack's rows in the harmful set, no others.
        document = audit(tmp_path, sets, overlap=True)
        assert document["exit_code"] == 1
        (failed,) = [entry for entry in document["gates"] if entry["status"] == "fail"]
        assert failed["name"] == "Retained and harmful rows are disjoint"
        assert "80 rows" in failed["measured"]
        assert "refusal" not in failed["measured"], "paired with the harmful rows by design"


def test_overlap_with_the_attack_can_be_allowed(tmp_path: Path) -> None:
    rows = harmful()
    document = audit(tmp_path, {"harmful": rows, "attack": rows[:5]}, overlap=True)
    assert gate(document, "Defence and attack")["status"] == "warn"
    assert document["exit_code"] == 0


def test_two_drifted_windows_fail_and_one_only_warns(tmp_path: Path) -> None:
    new = [{"prompt": f"which star number {n * 91} rises over desert {n}"} for n in range(40)]
    same = [{"prompt": row["prompt"]} for row in harmful()]
    data = tmp_path / "data"
    drifted = files(data, one=new[:20], two=new[20:], old=same)
    sets = {"harmful": harmful()}
    twice = audit(tmp_path, sets, observed=(drifted["one"], drifted["two"]))
    assert gate(twice, "Newly observed")["status"] == "fail"
    assert twice["coverage"]["next"]["add"]
    once = audit(tmp_path, sets, observed=(drifted["one"], drifted["old"]))
    assert gate(once, "Newly observed")["status"] == "warn"
    never = audit(tmp_path, sets, observed=(drifted["old"],))
    assert gate(never, "Newly observed")["status"] == "pass"


def test_strict_makes_a_warning_fail(tmp_path: Path) -> None:
    assert audit(tmp_path, {"harmful": harmful()}, strict=True)["exit_code"] == 1
    skipped = [
        Gate(name="a", status="skipped", measured=""),
        Gate(name="b", status="pass", measured=""),
    ]
    assert verdict(skipped, strict=True) == "pass"


def test_no_text_gets_out_unless_revealed(tmp_path: Path) -> None:
    rows = harmful()
    hostile = {**rows[0], "prompt": f"{SECRET} <script>alert(1)</script> of the masters"}
    sets = {
        "harmful": [hostile, *rows, {**rows[1], "prompt": f"{rows[1]['prompt']}s"}],
        "attack": [hostile, *rows[:2]],
        "refusal": [{"prompt": rows[0]["prompt"], "answer": rows[0]["answer"]}],
        "benign": [{"prompt": f"{SECRET} timetable {n}", "answer": SECRET}
                   for n in range(12)],
    }  # fmt: skip
    data = files(tmp_path / "data", observed=[{"prompt": f"{SECRET} anew {n}"} for n in range(15)])
    hidden = audit(tmp_path, sets, observed=(data["observed"],))
    text = (tmp_path / "out" / "audit.json").read_text() + audit_page(hidden)
    assert SECRET.casefold() not in text.casefold()
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == hidden

    shown = audit(tmp_path, sets, observed=(data["observed"],), reveal=True)
    page = audit_page(shown)
    assert SECRET in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    mode = stat.S_IMODE((tmp_path / "out" / "audit.json").stat().st_mode)
    assert mode == 0o600


def test_the_order_of_the_rows_changes_nothing_but_their_numbers(tmp_path: Path) -> None:
    rows, new = harmful(), [{"prompt": f"which star {n} rises"} for n in range(20)]
    attack = [{**row, "prompt": f"pray {row['prompt']}"} for row in rows[::3]]
    found = []
    for seed in (None, 5):
        order = np.random.default_rng(seed).permutation if seed else np.arange
        folder = tmp_path / str(seed)
        folder.mkdir()
        data = files(folder / "data", new=[new[i] for i in order(20)])
        document = audit(
            folder,
            {
                "harmful": [rows[i] for i in order(80)],
                "attack": [attack[i] for i in order(len(attack))],
            },
            observed=(data["new"],),
        )
        found.append(json.dumps(without_numbers(document), sort_keys=True))
    assert found[0] == found[1]


def without_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_numbers(inner) for key, inner in value.items() if key != "row"}
    return [without_numbers(inner) for inner in value] if isinstance(value, list) else value


def test_a_manifest_is_held_against_the_files(tmp_path: Path) -> None:
    data = files(tmp_path / "data", harmful=harmful())
    entry = {"source": "us", "licence": "CC0", "reviewer": "A", "sha256": ""}
    manifest = tmp_path / "manifest.yaml"
    outcomes = []
    for digest in (sha256_file(Path(data["harmful"])), "0" * 64, ""):
        manifest.write_text(json.dumps({"harmful": {**entry, "sha256": digest}}))
        document = audit(tmp_path, {"harmful": harmful()}, manifest=manifest)
        outcomes.append(gate(document, "where it comes from"))
    assert [outcome["status"] for outcome in outcomes] == ["pass", "fail", "fail"]
    assert "not the one" in outcomes[1]["measured"]
    assert "no sha256" in outcomes[2]["measured"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"testbed": "lattice"}, "both a testbed and own files"),
        ({"model": "somewhere"}, "needs canaries"),
        ({"canaries": "c.jsonl"}, "without --model"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, options, words: str) -> None:
    with pytest.raises(InputError, match=words):
        audit(tmp_path, {"harmful": harmful(3)}, **options)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"permutation": 3}, "did you mean 'permutations'"),
        ({"permutations": 99, "drift_p": 0.001}, "cannot show p < 0.001"),
        ({"jaccard": 0.3}, "jaccard"),
        ({"min_share": 0}, "min_share"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path: Path, values, words: str) -> None:
    with pytest.raises(InputError, match=words):
        audit(tmp_path, {"harmful": harmful(3)}, config=quick(tmp_path, **values))


def test_too_few_permutations_for_the_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in one of 3 windows"):
        audit(tmp_path, {"harmful": harmful(3)}, observed=("a.jsonl", "b.jsonl", "c.jsonl"))


def test_no_harmful_set_and_a_single_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no harmful set"):
        audit(tmp_path, {"benign": harmful(2)})
    with pytest.raises(InputError, match="single prompt"):
        audit(tmp_path, {"harmful": harmful(1)[:1] * 3})
