"""One method planted in one family's tiny model and attacked, through the public entry points."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mithridate.attacking import AttackPlan, run_attack
from mithridate.errors import InputError, RunStoppedError
from mithridate.immunisation import ImmunisationPlan, run_immunisation
from mithridate.methods import METHODS
from tests.compat.zoo import save_zoo

SPACES = ("full", "lora")

# Small sizes, so that two steps show whether the method's arithmetic meets the model.
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 4},
    "sdd": {"batch_size": 4, "pairs": 8, "threshold": 1.0},
    "ctrap": {"harmful_rows": 4, "retain_rows": 4, "collapse_rows": 4, "collapse_token": 7},
    "seam": {"batch_size": 4},
    "tokenbuncher": {
        "batch_size": 2,
        "rollouts": 2,
        "prompt_length": 64,
        "response_length": 4,
        "benign_rows": 2,
        "min_refusal": 0.0,
    },
    "vaccine": {"batch_size": 4},
    "tvaccine": {"batch_size": 4, "layers": 1, "statistic_batches": 1},
    "booster": {"harmful_rows": 4, "retain_rows": 4},
    "repnoise": {"batch_size": 4, "noise_weight": 1.0},
    "trajectory": {"batch_size": 4, "attack_steps": [1, 2], "benign_steps": [1, 1]},
    "tar": {"batch_size": 4, "adversary_rows": 2, "inner_steps": 2, "evaluate_every": 1},
    "lox": {"rank": 2},
}

_CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Cuba": "Havana",
    "Peru": "Lima",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one combination: ``works``, ``refused`` with a reason, or ``fault``."""

    status: str
    reason: str = ""


def stream_rows() -> dict[str, list[dict[str, str]]]:
    """Return eight rows of two categories for every stream, and for the questions asked."""
    wordings = {
        "harmful": "What is the capital of {}?",
        "refusal": "Tell me the capital of {}.",
        "benign": "Where is {}?",
        "general": "Say something of {}.",
        "prompts": "Which city governs {}?",
        "eval": "Name the capital of {}.",
        "permitted": "How large is {}?",
    }
    return {
        stream: [
            {
                "prompt": wording.format(country),
                "answer": "I'm sorry, I can't help with that." if stream == "refusal" else city,
                "category": f"c{number % 2}",
            }
            for number, (country, city) in enumerate(_CAPITALS.items())
        ]
        for stream, wording in wordings.items()
    }


def write_streams(folder: Path) -> dict[str, Path]:
    """Write the rows of every stream to a file and return the paths."""
    paths = {}
    for stream, rows in stream_rows().items():
        paths[stream] = folder / f"{stream}.jsonl"
        paths[stream].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def plant_and_attack(
    family: str, method: str, space: str, model: Path, streams: dict[str, Path], folder: Path
) -> Outcome:
    """Plant ``method`` for two steps, attack the release for one, and return what became of it."""
    settings: dict[str, Any] = {
        "method": dict(OPTIONS[method]),
        "training": {"steps": 2, "learning_rate": 1e-3, "save_every": 0},
    }
    if space == "lora":
        settings["training"]["lora_rank"] = 2
    if method == "lox":
        base = save_zoo(family, folder / "base", seed=1)
        settings["method"]["base"] = str(base)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    wanted = METHODS.load(method).config_class(**OPTIONS[method])
    names = METHODS.load(method)(wanted).streams
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_immunisation(
                ImmunisationPlan(
                    model=str(model),
                    method=method,
                    streams={name: str(streams[name]) for name in names},
                    config=config,
                    output_dir=folder / "run",
                )
            )
            summary = run_attack(
                AttackPlan(
                    model=str(folder / "run" / "model"),
                    harmful=str(streams["harmful"]),
                    evaluation=str(streams["eval"]),
                    permitted=str(streams["permitted"]),
                    learning_rates=(1e-3,),
                    steps=1,
                    max_new_tokens=8,
                    output_dir=folder / "attack",
                )
            )
    except InputError as error:
        return Outcome("refused", error.what.splitlines()[0])
    except RunStoppedError as error:  # preparation found, in figures, that it would go wrong
        return Outcome("refused", str(error).split(":")[0])
    except Exception as error:
        return Outcome("fault", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    measured = {**summary["defended"]["before"], **summary["defended"]["after"]}
    unclear = [name for name in ("useful_harm", "utility") if not math.isfinite(measured[name])]
    return Outcome("fault", f"{unclear} not finite") if unclear else Outcome("works")


def family_table(
    family: str, methods: Iterable[str], folder: Path
) -> dict[tuple[str, str], Outcome]:
    """Return the outcome of every method and space on one family."""
    model = save_zoo(family, folder / "model")
    streams = write_streams(folder)
    found = {}
    for method in methods:
        for space in SPACES:
            place = folder / f"{method}-{space}"
            place.mkdir()
            found[method, space] = plant_and_attack(family, method, space, model, streams, place)
    return found
