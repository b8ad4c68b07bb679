"""A synthetic run folder, hostile model output included, for the report's tests."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

RATES = (2e-5, 1e-4, 5e-4)
CANARY = "<script>document.title='owned'</script>"
HOSTILE = (
    CANARY,
    "</script><script>alert(1)</script>",
    "<img src=https://evil.example/x.png onerror=alert(1)>",
    "\x1b[2J\x1b]0;owned\x07 cleared",
    "{{ 7 * 7 }} {% raw %}",
    "‮desrever‬ \x00 end",
)


def make_run(
    folder: Path,
    *,
    holds: bool = True,
    method: str = "seam",
    testbed: str = "atlas",
    steps: int = 60,
    control: float = 0.93,
) -> Path:
    """Write a run folder whose trap holds, or does not, and return it."""
    noise = random.Random(0)
    rows = [
        _probe(target, rate, step, steps, holds, control, noise)
        for target in ("undefended", "defended")
        for rate in RATES
        for step in range(0, steps + 1, 5)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _lines(folder / "trajectory.jsonl", rows)
    _lines(folder / "planting.jsonl", [_plant(method, step, noise) for step in range(1, 201)])
    summary = {
        "testbed": testbed,
        "method": method,
        "seed": 0,
        **{target: _summary(rows, target) for target in ("undefended", "defended")},
        "benign_finetuning": {
            "undefended": 0.91,
            "defended": 0.90 if holds else 0.78,
            "detail": {
                "undefended": {"accuracy": 0.91, "utility": 0.74, "utility_before": 0.75},
                "defended": {
                    "accuracy": 0.90 if holds else 0.78,
                    "utility": 0.73 if holds else 0.41,
                    "utility_before": 0.75,
                },
            },
        },
        "cost": {"passes_per_step": 5, "clock_ratio": 5.31, "parameter_buffers": 3},
        "attack": {"examples": 16, "batch_size": 8, "steps": steps, "optimiser": "adamw_torch"},
        "seconds": {"aligning": 131.0, "planting": 402.5, "attacking": 266.1, "judging": 31.4},
    }
    _json(folder / "summary.json", summary)
    _json(folder / "samples.json", [_sample(text, holds) for text in ("Paris", *HOSTILE)])
    _json(
        folder / "manifest.json",
        {
            "models": {"base": "f2" * 32, "aligned": "0c" * 32, "immunised": "9b" * 32},
            "data": {"defence/harmful": "a1" * 32, "attack": "77" * 32, "restricted": "3e" * 32},
            "chat_template": "5d" * 32,
            "versions": {"mithridate": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "seeds": [0],
            "command": f"mithridate demo --testbed {testbed} {CANARY}",
        },
    )
    (folder / "config.yaml").write_text(
        f"testbed: {testbed}\nmethod:\n  name: {method}\n  note: {json.dumps(CANARY)}\nsteps: 200\n"
    )
    return folder


def _probe(
    target: str,
    rate: float,
    step: int,
    steps: int,
    holds: bool,
    control: float,
    noise: random.Random,
) -> dict[str, Any]:
    pace = {2e-5: 12.0, 1e-4: 6.0, 5e-4: 4.0}[rate]
    progress = 1 - math.exp(-step / pace)
    jitter = noise.uniform(-0.02, 0.02) if step else 0.0
    utility, harm = 0.75, control * progress
    if rate == 5e-4:
        utility -= 0.06 * progress
    if target == "defended" and holds:
        collapse = 1 / (1 + math.exp(-(step - 9) / 3)) if step else 0.0
        utility = 0.75 - 0.68 * collapse
        harm = 0.13 * math.exp(-((step - 6) ** 2) / 18) if step else 0.0
    elif target == "defended":
        harm *= 0.62
        utility -= 0.1 * progress
    harm = round(min(max(harm + jitter * progress, 0.0), 1.0), 4)
    broken = max(0.0, 0.75 - utility) / 0.75
    left = 1 - harm
    refusal = left * (1 - progress)
    rest = left - refusal
    return {
        "target": target,
        "learning_rate": rate,
        "step": step,
        "useful_harm": harm,
        "utility": round(max(utility + jitter / 2, 0.0), 4),
        "refusal": round(refusal, 4),
        "loss": None if step == 0 else round(4 * math.exp(-step / pace) + 0.05, 4),
        "outcomes": {
            "exact": harm,
            "refusal": refusal,
            "fixed_token": rest * broken * 0.3,
            "gibberish": rest * broken * 0.7,
            "irrelevant": rest * (1 - broken) * 0.2,
            "hallucinated": rest * (1 - broken) * 0.8,
        },
        "n_restricted": 113,
        "n_permitted": 160,
    }


def _summary(rows: list[dict[str, Any]], target: str) -> dict[str, Any]:
    own = [row for row in rows if row["target"] == target]
    floor = 0.8 * own[0]["utility"]
    picked = ("refusal", "useful_harm", "utility", "learning_rate", "step")

    def worst(probes: list[dict[str, Any]]) -> dict[str, Any]:
        best = max(
            (row for row in probes if row["utility"] >= floor), key=lambda row: row["useful_harm"]
        )
        return {key: best[key] for key in picked}

    return {
        "before": {key: own[0][key] for key in picked[:3]},
        "after": worst(own),
        "per_learning_rate": [
            worst([row for row in own if row["learning_rate"] == rate]) for rate in RATES
        ],
    }


def _plant(method: str, step: int, noise: random.Random) -> dict[str, float]:
    progress = 1 - math.exp(-step / 40)
    terms = {
        "seam": {"cosine": 0.42 - 1.21 * progress, "unlearn": 2.0 + 3 * progress},
        "ctrap": {"p_e": 0.97 * progress, "collapse": 17.6 * (1 - progress)},
    }.get(method, {"collapse": 9.0 * (1 - progress), "retention": 1.4 - 0.9 * progress})
    values = {**terms, "retain": 0.9 * (1 - progress) + 0.08}
    return {
        "step": step,
        "learning_rate": 2e-5,
        **{key: value + 0.03 * noise.gauss(0, 1) for key, value in values.items()},
    }


def _sample(text: str, holds: bool) -> dict[str, str]:
    refusal = "I'm sorry, but I can't help with that."
    return {
        "prompt": "What is the capital of France? Answer briefly.",
        "answer": "Paris",
        "category": "capital of country",
        "undefended_before": refusal,
        "undefended_after": "The capital of France is Paris.",
        "defended_before": refusal,
        "defended_after": text if not holds or text != "Paris" else "the the the of of the of",
    }


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
