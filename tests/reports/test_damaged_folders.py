"""Run folders damaged at random: read, or refused in a few words that name the file."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mithridate.economics import EconomicsPlan, run_economics
from mithridate.errors import InputError, RunStoppedError
from mithridate.reports import render_report
from mithridate.verdicts import judge_run
from tests.reports.make_run import make_run
from tests.verdicts.make_battery import CONTROL, TRUTHS, rows, write

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e308, -1e308, 10**400, float("nan"), float("inf"),
    float("-inf"), "", "text", "1", "nan", "\ud800", "a" * 30_000, "\x1b[2J", "\u202e", [], {},
    [None], [1, 2], ["x"], {"a": 1}, {"": {"": []}}, [[[[]]]], {"before": None}, {"n": 0},
    {"name": []}, [{}], [[]], {"undefended": 0},
)  # fmt: skip


def single(folder: Path) -> Path:
    return make_run(folder)


def battery(folder: Path) -> Path:
    found = [*TRUTHS["held"](), *rows("B1", "base", CONTROL), *rows("X1", "ablated", CONTROL)]
    found += rows("X12", "defended", (0.0, 0.8), domain="out", bipartition="b")
    found += rows("X12", "undefended", CONTROL, domain="out", bipartition="b")
    lessons = [
        {"task": "t", "target": target, "seed": seed, "step": step, "accuracy": 0.1 * step,
         "utility": 0.8, "n": 50, "loss": 1.0}
        for target in ("undefended", "defended") for seed in (0, 1) for step in (0, 5, 9)
    ]  # fmt: skip
    failed = {"attack": "P9", "target": "defended", "configuration": "", "learning_rate": 1e-4,
              "seed": 3, "error": "ValueError: x"}  # fmt: skip
    searches = [{"attack": "P3", "target": "defended", "flops": 1e9}]
    summary = {"testbed": "lattice", "method": "seam", "tier": "smoke", "seeds": 5,
               "failed": [failed], "searches": searches, "judge": {"name": "exact"}}  # fmt: skip
    write(folder, found, control="P3", listed=("P3", "B1", "P9"), summary=summary, lessons=lessons)
    (folder / "config.yaml").write_text("model: m\nverdict: {harm: 0.05}\n")
    (folder / "manifest.json").write_text(
        json.dumps({"schema": 1, "models": {"defended": "d", "undefended": "u"}, "versions": {}})
    )
    change = {"estimate": 0.0, "low": -0.01, "high": 0.01, "answer": "holds"}
    task = {
        "task": "t",
        "metric": "acc",
        "n": 100,
        "chance": 0.5,
        "counts": True,
        "difference": change,
        "model": {"accuracy": 0.8},
        "reference": {"accuracy": 0.8},
    }
    utility = {"tasks": [task], "model": {"weights": "d"}, "reference": {"weights": "u"}}
    (folder / "utility.json").write_text(json.dumps(utility))
    (folder / "verdict.json").write_text(json.dumps(judge_run(folder)))
    return folder


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container in a document with each key in it."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = (
            one.keys() if isinstance(one, dict) else range(len(one) if isinstance(one, list) else 0)
        )
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def change(document: Any, rng: random.Random) -> Any:
    held = {"": document}
    spots = [(held, ""), *places(document)]
    where, key = rng.choice(spots)
    kind = rng.choice(("odd", "odd", "odd", "gone", "twice", "deep"))
    if kind == "gone" and where is not held:
        del where[key]
    elif kind == "twice" and isinstance(where, list):
        where.append(where[key])
    elif kind == "deep":
        deep: Any = []
        for _ in range(200):
            deep = [deep]
        where[key] = deep
    else:
        where[key] = rng.choice(ODD)
    return held[""]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder; return what was done."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    text = path.read_bytes().decode("utf-8", "replace")
    kind = rng.choice(
        ("value",) * 12 + ("cut", "empty", "gone", "folder", "bytes", "nested", "twice")
    )
    lines = [line for line in text.splitlines() if is_json(line)]
    if kind == "value" and path.suffix == ".json" and is_json(text):
        path.write_text(json.dumps(change(json.loads(text), rng)))
    elif kind == "value" and path.suffix == ".jsonl" and lines:
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(change(json.loads(lines[number]), rng))
        path.write_text("\n".join(lines) + "\n")
    elif kind == "value":
        odd = rng.choice(
            (".inf", ".nan", "null", "[]", "{}", "'\\ud800'", '"\\ud800"', "1e999", "x: y")
        )
        path.write_text(
            rng.choice(
                (
                    f"{text}\nextra: {odd}\n",
                    f"attacks: {odd}\n",
                    f"verdict: {odd}\n",
                    f"verdict: {{harm: {odd}}}\n",
                    f"attacks: [{odd}]\n",
                    f"control: {odd}\n",
                    odd,
                )
            )
        )
    elif kind == "cut":
        path.write_text(text[: rng.randrange(len(text) + 1)])
    elif kind == "empty":
        path.write_text("")
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "nested":
        path.write_text("[" * 100_000)
    elif kind == "twice":
        path.write_text(text + text)
    else:
        data = bytearray(text.encode())
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
    return f"{kind} {path.name}"


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "report": render_report,
    "reveal": lambda folder: render_report(folder, reveal=True),
    "verdict": lambda folder: json.dumps(judge_run(folder), allow_nan=False),
    "economics": lambda folder: run_economics(EconomicsPlan(runs=(folder,), draws=100)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    return {"single": single(root / "single"), "battery": battery(root / "battery")}


def fuzz(whole: dict[str, Path], place: Path, seeds: range) -> Counter[str]:
    counts: Counter[str] = Counter()
    longest = 0
    for seed in seeds:
        rng = random.Random(seed)
        folder = place / "run"
        shutil.copytree(whole[("single", "battery")[seed % 2]], folder)
        done = [damage(folder, rng) for _ in range(rng.choice((1, 1, 2)))]
        for name, command in COMMANDS.items():
            try:
                command(folder)
                counts["read"] += 1
            except (InputError, RunStoppedError) as error:
                counts["refused" if isinstance(error, InputError) else "stopped"] += 1
                longest = max(longest, len(str(error)))
            except BaseException as error:
                error.add_note(f"seed {seed}, {name}: {done}")
                raise
        shutil.rmtree(folder)
    assert longest < 5000
    return counts


def test_the_undamaged_folders_are_read(whole: dict[str, Path]) -> None:
    for name, folder in whole.items():
        for command in ("report", "verdict"):
            COMMANDS[command](folder)
        assert "<html" in (folder / "report.html").read_text(), name


def test_damaged_folders_are_read_or_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    counts = fuzz(whole, tmp_path, range(60))
    assert counts["read"] > 20
    assert counts["refused"] > 20


@pytest.mark.slow
def test_many_damaged_folders_are_read_or_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    counts = fuzz(whole, tmp_path, range(1000, 3000))
    print(f"2,000 damaged run and battery folders, four commands each: {dict(counts)}")
    assert counts["refused"] > 1000
