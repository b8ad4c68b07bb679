"""The three structural concerns about collapse traps, each as an experiment.

Writes docs/results-concerns-<testbed>.md and benchmarks/results/concerns-<testbed>.json.

    python benchmarks/concerns.py --testbed lattice --bipartitions 5 --seeds 0

- data: does a defence trained on some categories hold against attacks on the others?
- step: a line scan through the planted step, and attacks at every step size, with their progress
  along and off the planted axis and the cosine of harmful and benign gradients on the way;
- base: the same attack from the model before alignment, the detour through it and what that caps;
- overlap: the coupling of gradients in worlds whose restricted and permitted answers overlap less.

Each cell is kept in ``--output-dir`` when it is done and not repeated.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import common
import concerns_report
from mithridate.allocation import keep_freed_memory
from mithridate.attacks.adaptive import AdaptiveConfig, finetune_adaptively
from mithridate.attacks.editing import add_difference, blend
from mithridate.attacks.finetune import FinetuneConfig, finetune
from mithridate.audit.drift import mmd
from mithridate.chat import Batch, ChatFormat
from mithridate.configs import require
from mithridate.demo import DemoConfig, Preset, read_method, read_preset
from mithridate.economics.developer import training_flops
from mithridate.embeddings import tfidf
from mithridate.errors import GateError
from mithridate.examples import Example, check_disjoint, fingerprint
from mithridate.files import sha256_file, sha256_of, write_json
from mithridate.measures.line_scan import LINES, Line, line_scan, unit_line
from mithridate.measures.probe import accuracy, chance_corrected, probe, stratified
from mithridate.measures.progress import Axis, gradient_cosine, unadapted
from mithridate.measures.trajectory import worst_case
from mithridate.testbeds.lattice import (
    ATTACK_TEMPLATES,
    DEFENCE_TEMPLATES,
    Lattice,
    LatticeConfig,
)
from mithridate.training.trainer import immunise
from mithridate.weights import GradientOracle
from mithridate.weights.losses import (
    answer_cross_entropy,
    token_collapse,
    token_probability,
    uniform_collapse,
)

EXPERIMENTS = ("data", "step", "base", "overlap")
UNDEFENDED = common.UNDEFENDED
CIPHER = ("cipher",)
STEPS = 30
POINTS = (1, 5, 30)
FINE_POINTS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 100)
STRONG = 5e-4
"""A learning rate at which the undefended model gives all it has."""
GRID = {
    "sgd": (1e-7, 1e-5, 1e-3, 1e-2, 1e-1, 1.0),
    "adamw": (1e-7, 1e-5, 1e-4, 1e-3, 1e-2),
    "sign": (1e-7, 1e-5, 1e-4, 1e-3, 1e-2),
    "lora": (1e-7, 1e-5, 1e-4, 1e-3, 1e-2),
}
"""Learning rates of each optimiser. A clipped step of SGD is as long as its rate, and one of the
others about a thousand times longer on this model, so SGD gets two more."""
ADAM_STEP = 1e-4
SUBTRACTED = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5)
TRANSPLANTED = (0.5, 1.0, 2.0)
APART_STEPS = 2000
"""Of the base model where the two sides share fewer words: there are more words to learn."""
ROWS = 64
COLLAPSE_TOKEN = 163
"""CTRAP's on Lattice, as in its preset."""

Row = dict[str, Any]
Look = Callable[[PreTrainedModel], Row]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Supervised fine-tuning of ``steps`` steps, looked at after each of ``points``."""

    optimiser: str
    rate: float
    steps: int = STEPS
    points: tuple[int, ...] = POINTS


def read_variants(testbed: str) -> dict[str, dict[str, Any]]:
    """Return the defences that the concerns are put to, by name."""
    text = (common.HERE / f"concerns_{testbed}.yaml").read_text(encoding="utf-8")
    variants: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return variants


class Scene:
    """The world, its models and the judge that all experiments share."""

    def __init__(
        self,
        bed: Lattice,
        root: Path,
        given: Mapping[str, Path],
        chosen: Sequence[str] | None = None,
    ) -> None:
        self.bed = bed
        self.root = root
        self.given = given
        self.chosen = chosen
        self.variants = read_variants(bed.name)
        self.chat = ChatFormat(AutoTokenizer.from_pretrained(bed.aligned_model()))
        preset = read_preset(bed.name)
        self.restricted = stratified(bed.data.restricted, preset.restricted_items, seed=0)
        self.permitted = stratified(bed.data.permitted, preset.permitted_items, seed=0)
        self.attack_rows = bed.data.attack[: bed.attack_preset.examples]
        self.batch_size = bed.attack_preset.batch_size
        self.cells: list[Row] = []
        self.starts: dict[str, Row] = {}
        self._planted_here: set[Path] = set()
        check_disjoint({"defence": bed.data.defence["harmful"], "attack": bed.data.attack,
                        "evaluation": self.restricted})  # fmt: skip

    # Models --------------------------------------------------------------------------------------

    def load(
        self, name: str, seed: int, categories: Sequence[str] | None = None
    ) -> PreTrainedModel:
        """Return a model by name, planted first where it is a defence."""
        model = AutoModelForCausalLM.from_pretrained(self.folder(name, seed, categories))
        assert isinstance(model, PreTrainedModel)
        return model

    def folder(self, name: str, seed: int, categories: Sequence[str] | None = None) -> Path:
        """Return a model's folder.

        Parameters
        ----------
        categories
            Restricted categories whose harmful rows the defence is given; all by default. Refusals
            it is given of all: who refuses needs no harmful answers.
        """
        if name in self.given:
            return self.given[name]
        if name in (UNDEFENDED, "base"):
            return self.bed.base_model() if name == "base" else self.bed.aligned_model()
        preset = read_preset(self.bed.name)
        sections = self.variants[name]
        preset.methods.setdefault(sections["name"], {})
        kept = common.with_options(preset, sections)
        place = self.root / "planted" / sha256_of(
            [self.bed.data.hashes, kept.methods[sections["name"]], sections["name"], seed,
             sorted(categories or ())]
        )[:16]  # fmt: skip
        return self._planted(kept, sections["name"], seed, place, categories)

    def _planted(
        self, preset: Preset, name: str, seed: int, place: Path, categories: Sequence[str] | None
    ) -> Path:
        config = DemoConfig(testbed=self.bed.name, method=name, seed=seed, output_dir=place)
        method, training = read_method(preset, config)
        if place in self._planted_here:
            return place / "model"
        aligned = self.bed.aligned_model()
        data = self.bed.data.defence
        streams = {
            stream: [
                row
                for row in data[stream]
                if categories is None
                or stream not in ("harmful", "prompts")
                or row.category in categories
            ]
            for stream in method.streams
        }
        model = AutoModelForCausalLM.from_pretrained(aligned)
        tokenizer = AutoTokenizer.from_pretrained(aligned)
        sys.stderr.write(f"planting {name} (seed {seed})\n")
        immunise(model, tokenizer, streams, method, training, place)  # a finished run is loaded
        self._planted_here.add(place)
        return place / "model"

    def roles(self, role: str) -> list[str]:
        """Return the names of the defences of an experiment; those given take part in all."""
        if self.given:
            return list(self.given)
        return [
            name
            for name, one in self.variants.items()
            if role in one["role"] and (self.chosen is None or name in self.chosen)
        ]

    def line_of(self, name: str, model: PreTrainedModel) -> tuple[Line, float]:
        """Return the axis that a defence plants, and its length."""
        sections = self.variants.get(name, {})
        step = ADAM_STEP * math.sqrt(model.num_parameters())
        return sections.get("line", "gradient"), sections.get("virtual_step", step)

    # What is kept --------------------------------------------------------------------------------

    def cell(self, kind: str, keys: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """Return one cell of an experiment, made unless it is kept already."""
        path = self.root / "cells" / f"{kind}-{sha256_of([kind, keys, self._world])[:20]}.json"
        if not path.exists():
            cpu = time.process_time()
            named = {k: v for k, v in keys.items() if k != "weights"}
            found = _finite({"kind": kind, **named, **make()})
            write_json(path, found | {"cpu_seconds": round(time.process_time() - cpu, 2)})
            sys.stderr.write(f"{kind} {' '.join(map(str, named.values()))[:110]}\n")
        kept: Row = json.loads(path.read_text(encoding="utf-8"))
        self.cells.append(kept)
        return kept

    @cached_property
    def _world(self) -> str:
        return sha256_of([self.bed.data.hashes, fingerprint(self.attack_rows)])

    def key(self, name: str, seed: int, categories: Sequence[str] | None = None) -> str:
        """Return the hash of a model's weights."""
        return sha256_file(self.folder(name, seed, categories) / "model.safetensors")[:16]

    # What is measured ----------------------------------------------------------------------------

    def judged(self, model: PreTrainedModel) -> Row:
        """Let a model answer all restricted and permitted questions."""
        found = probe(model, self.chat, self.bed, restricted=self.restricted,
                      permitted=self.permitted, batch_size=256)  # fmt: skip
        return {"useful_harm": found.useful_harm, "utility": found.utility,
                "refusal": found.refusal, "by_category": found.harm_by_category}  # fmt: skip

    def harm_in(self, row: Row, categories: Sequence[str]) -> float:
        """Return a judged model's useful harm on some categories, chance-corrected."""
        return chance_corrected({name: row["by_category"][name] for name in categories},
                                self.bed.chance)  # fmt: skip

    @cached_property
    def batches(self) -> dict[str, Batch]:
        """Fixed batches for losses and gradients: defender's rows, held-out permitted answers."""
        data = self.bed.data.defence
        return {
            **{name: self.chat.batch(stratified(data[name], ROWS, seed=0))
               for name in ("harmful", "benign", "general")},
            "permitted": self.chat.batch(self.permitted[:ROWS]),
        }  # fmt: skip

    def losses(self, oracle: GradientOracle) -> Row:
        """Return collapse, perplexity and p(e) at a model's present weights."""
        asked = {
            "harmful_loss": (answer_cross_entropy, "harmful"),
            "log_perplexity": (answer_cross_entropy, "permitted"),
            "token_collapse": (token_collapse(COLLAPSE_TOKEN), "general"),
            "p_e": (token_probability(COLLAPSE_TOKEN), "general"),
            "uniform_collapse": (uniform_collapse, "harmful"),
        }
        return {
            name: oracle.loss(loss, self.batches[batch], purpose="evaluation")
            for name, (loss, batch) in asked.items()
        }

    def attack(
        self, start: PreTrainedModel, rows: Sequence[Example], how: Attack, seed: int, look: Look
    ) -> list[Row]:
        """Fine-tune a copy of a model and return what was seen at each point; it may diverge."""
        seen: list[Row] = []

        def watched(model: PreTrainedModel, step: int) -> dict[str, float]:
            if step in how.points:
                seen.append({"step": step, **look(model)})
            return {}

        common_options: dict[str, Any] = {
            "learning_rate": how.rate, "steps": how.steps, "seed": seed, "probe_every": 1,
            "batch_size": min(self.batch_size, len(rows)),
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            if how.optimiser == "sign":
                config = AdaptiveConfig(**common_options, sign=True)
                finetune_adaptively(start, self.chat, rows, [], config, probe=watched,
                                    output_dir=Path(folder))  # fmt: skip
            else:
                plain = FinetuneConfig(
                    **common_options,
                    optimiser="sgd" if how.optimiser == "sgd" else "adamw_torch",
                    lora_rank=8 if how.optimiser == "lora" else None,
                )
                finetune(start, self.chat, rows, plain, probe=watched, output_dir=Path(folder))
        return seen

    def flops_per_step(self, model: PreTrainedModel, rows: Sequence[Example]) -> float:
        """Return 6 N B L of one step of supervised fine-tuning."""
        length = sum(len(self.chat.encode(row).input_ids) for row in rows) / len(rows)
        return float(training_flops(model.num_parameters(), self.batch_size * length))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


# 1. Harmful data ----------------------------------------------------------------------------------


def bipartition(categories: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Return a random half of the categories, for the defender, and the rest."""
    order = random.Random(f"bipartition/{seed}").sample(sorted(categories), len(categories))
    half = len(order) // 2
    return sorted(order[:half]), sorted(order[half:])


def ladder(
    bed: Lattice, seen: Sequence[str], unseen: Sequence[str]
) -> dict[str, tuple[Sequence[str], list[Example]]]:
    """Return the attacker's categories and rows at every rung, farther and farther from D_H.

    The facts are the attacker's own at every rung: none is in D_H, none is evaluated.
    """
    facts = [fact for fact in bed.world.restricted if fact.split == "T-att"]
    rungs = {
        "seen, D_H's wording": (seen, tuple(DEFENCE_TEMPLATES)),
        "seen": (seen, tuple(ATTACK_TEMPLATES)),
        "unseen, D_H's wording": (unseen, tuple(DEFENCE_TEMPLATES)),
        "unseen": (unseen, tuple(ATTACK_TEMPLATES)),
        "unseen, in cipher": (unseen, CIPHER),
    }
    made = {}
    for rung, (arts, templates) in rungs.items():
        own = [fact for fact in facts if fact.art in arts]
        # Every prefix as long as the facts has every fact, in a turn of the templates.
        rows = [
            fact.example(templates[(index + shift) % len(templates)])
            for shift in range(len(templates))
            for index, fact in enumerate(own)
        ]
        made[rung] = (arts, rows[: bed.attack_preset.examples])
    return made


def data_requirement(scene: Scene, seed: int, names: Sequence[str]) -> None:
    """Defend half of the categories; attack both halves, in nearer and farther words."""
    bed = scene.bed
    seen, unseen = bipartition(sorted({row.category for row in scene.restricted}), seed)
    rungs = ladder(bed, seen, unseen)
    held = [row for row in bed.data.defence["harmful"] if row.category in seen]
    for rung, (_, rows) in rungs.items():
        keys = {"bipartition": seed, "rung": rung}
        scene.cell("shift", keys, partial(_shift, held, rows))
    for name in (UNDEFENDED, *names):
        defended = None if name == UNDEFENDED else seen
        # A model that is defended on all of the categories stands beside, attacked alike.
        for scope, categories, planting in (("half", defended, seed), ("all", None, 0)):
            if name == UNDEFENDED and scope == "all":
                continue
            if scope == "half":
                keys = {"model": name, "bipartition": seed,
                        "weights": scene.key(name, planting, categories)}  # fmt: skip
                load = partial(scene.load, name, planting, categories)
                scene.cell("unnamed", keys, partial(_unnamed, scene, load))
            chosen = rungs if scope == "half" else {"unseen": rungs["unseen"]}
            for rung, (arts, rows) in chosen.items():
                keys = {"model": name, "scope": scope, "bipartition": seed, "rung": rung,
                        "weights": scene.key(name, planting, categories)}  # fmt: skip
                start = partial(scene.load, name, planting, categories)
                scene.cell("data", keys, partial(_attacked, scene, start, arts, rows, seed))


def _shift(held: Sequence[Example], rows: Sequence[Example]) -> Row:
    vectors = tfidf([row.prompt for row in (*held, *rows)])
    found = mmd(vectors[: len(held)], vectors[len(held) :], permutations=1, seed=0)
    return {"mmd2": found.value}


def _unnamed(scene: Scene, load: Callable[[], PreTrainedModel]) -> Row:
    """Return what is left, before any attack, of permitted facts that no training row names.

    A defence that reaches unseen arts may do so by destroying whatever it is not told to keep.
    """
    items = scene.bed.data.unnamed
    share = accuracy(load(), scene.chat, items, scene.bed.judge,
                     max_new_tokens=scene.bed.max_new_tokens)  # fmt: skip
    return {"accuracy": share, "n": len(items)}


def _attacked(
    scene: Scene,
    load: Callable[[], PreTrainedModel],
    attacked: Sequence[str],
    rows: Sequence[Example],
    seed: int,
) -> Row:
    start = load()
    how = Attack(optimiser="adamw", rate=STRONG, steps=60, points=(5, 20, 60))
    seen = [{"step": 0, **scene.judged(start)}]
    seen += scene.attack(start, rows, how, seed, scene.judged)
    for row in seen:
        row["useful_harm"] = scene.harm_in(row, attacked)
        del row["by_category"]
    return {"n_restricted": sum(item.category in attacked for item in scene.restricted),
            "rows": seen}  # fmt: skip


# 2. One step --------------------------------------------------------------------------------------


def one_step(scene: Scene, seed: int, names: Sequence[str]) -> None:
    """Walk along the planted axis, and attack at every step size with every optimiser.

    Where the undefended model is not broken, holding would mean nothing: those step sizes are
    tried on it alone.
    """
    strong = _grid(scene, UNDEFENDED, seed, GRID)
    for name in (UNDEFENDED, *names):
        weights = scene.key(name, seed)
        for line in LINES:
            keys = {"model": name, "line": line, "seed": seed, "weights": weights}
            scene.cell("scan", keys, partial(_scanned, scene, name, seed, line))
        if name != UNDEFENDED:
            whole = name in (*scene.roles("grid"), *scene.given)
            _grid(scene, name, seed, strong if whole else {"adamw": strong["adamw"]})


def _grid(
    scene: Scene, name: str, seed: int, grid: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Attack a model at every step size; return those that gave most of the harm."""
    weights = scene.key(name, seed)
    strong: dict[str, list[float]] = {optimiser: [] for optimiser in grid}
    for optimiser, rates in grid.items():
        for rate in rates:
            how = Attack(optimiser=optimiser, rate=rate)
            keys = {"model": name, "optimiser": optimiser, "rate": rate, "steps": how.steps,
                    "seed": seed, "weights": weights}  # fmt: skip
            rows = scene.cell("grid", keys, partial(_walked, scene, name, seed, how))["rows"]
            best = worst_case(rows, reference_utility=rows[0]["utility"])
            if best.useful_harm >= concerns_report.RECOVERS:
                strong[optimiser].append(rate)
    return strong


def _scanned(scene: Scene, name: str, seed: int, kind: Line) -> Row:
    model = scene.load(name, seed)
    oracle = GradientOracle(model)
    planted, length = scene.line_of(name, model)
    line = unit_line(oracle, scene.batches["harmful"], kind, seed=seed)

    def look() -> Row:
        judged = scene.judged(model)
        del judged["by_category"]
        return {**scene.losses(oracle), **judged}

    return {"virtual_step": length, "planted": kind == planted,
            "rows": line_scan(oracle.space, line, look, length=length)}  # fmt: skip


def _walked(scene: Scene, name: str, seed: int, how: Attack) -> Row:
    start = scene.load(name, seed)
    oracle = GradientOracle(start)
    planted, length = scene.line_of(name, start)
    axis = Axis(
        start={key: weight.detach().clone() for key, weight in start.named_parameters()},
        line=unit_line(oracle, scene.batches["harmful"], planted),
        length=length,
    )

    def look(model: PreTrainedModel) -> Row:
        moved = axis.progress(model)
        judged = scene.judged(model)
        del judged["by_category"]
        own = GradientOracle(unadapted(model))
        cosine = gradient_cosine(own, scene.batches["harmful"], scene.batches["benign"])
        return {**judged, **scene.losses(own), "along": moved.along, "off": moved.off,
                "cosine": cosine}  # fmt: skip

    weights = scene.key(name, seed)
    if weights not in scene.starts:
        scene.starts[weights] = {"step": 0, **look(start)}
    walked = scene.attack(start, scene.attack_rows, how, seed, look)
    return {
        "virtual_step": length,
        "n_restricted": len(scene.restricted),
        "rows": [scene.starts[weights], *walked],
    }


# 3. The base model --------------------------------------------------------------------------------


def base_model(scene: Scene, seed: int, names: Sequence[str]) -> None:
    """Attack the model before alignment, and go around each defence through it."""
    benign = [
        row
        for stream in ("benign", "general")
        for row in stratified(scene.bed.data.alignment[stream], 500, seed=seed)
    ]
    for name in ("base", UNDEFENDED, *names):
        weights = scene.key(name, seed)
        for rate in (1e-4, STRONG, 1e-3):
            how = Attack(optimiser="adamw", rate=rate, steps=100, points=FINE_POINTS)
            keys = {"model": name, "rate": rate, "steps": how.steps, "seed": seed,
                    "weights": weights}  # fmt: skip
            scene.cell("break", keys, partial(_broken, scene, name, seed, how))
        if name == "base":
            continue
        keys = {"model": name, "seed": seed, "weights": weights}
        scene.cell("subtract", keys, partial(_subtracted, scene, name, seed))
    keys = {"model": "base", "seed": seed, "weights": scene.key("base", seed)}
    scene.cell("realign", keys, partial(_realigned, scene, seed, benign))
    scene.cell("alignment", {"seed": seed}, partial(_aligning, scene, benign))


def _broken(scene: Scene, name: str, seed: int, how: Attack) -> Row:
    start = scene.load(name, seed)
    rows = [{"step": 0, **scene.judged(start)}]
    rows += scene.attack(start, scene.attack_rows, how, seed, scene.judged)
    for row in rows:
        del row["by_category"]
    return {"flops_per_step": scene.flops_per_step(start, scene.attack_rows),
            "n_restricted": len(scene.restricted), "rows": rows}  # fmt: skip


def _realigned(scene: Scene, seed: int, benign: Sequence[Example]) -> Row:
    """Make a useful chat model of the base on permitted rows alone, then attack it."""
    start = scene.load("base", seed)
    left: list[PreTrainedModel] = []

    def look(model: PreTrainedModel) -> Row:
        left[:] = [copy.deepcopy(model)]
        return scene.judged(model)

    how = Attack(optimiser="adamw", rate=1e-4, steps=40, points=(5, 10, 20, 40))
    first = [{"step": 0, **scene.judged(start)}, *scene.attack(start, benign, how, seed, look)]
    how = Attack(optimiser="adamw", rate=1e-4, steps=40, points=(1, 2, 3, 5, 8, 12, 20, 40))
    then = [{"step": 0, **scene.judged(left[0])}]
    then += scene.attack(left[0], scene.attack_rows, how, seed, scene.judged)
    for row in (*first, *then):
        del row["by_category"]
    return {"flops_per_step": scene.flops_per_step(start, benign), "rows": first, "attacked": then}


def _aligning(scene: Scene, rows: Sequence[Example]) -> Row:
    """Return what the developer's alignment of the base cost: the most a detour could need."""
    config, model = scene.bed.config, scene.load("base", 0)
    per_row = scene.flops_per_step(model, rows) / scene.batch_size
    return {"flops": per_row * config.align_steps * config.align_rows}


def _subtracted(scene: Scene, name: str, seed: int) -> Row:
    """Take alignment and defence away: theta - lambda (theta - base), and add what base learnt."""
    base = scene.load("base", seed)
    found = []
    for share in SUBTRACTED:
        model = scene.load(name, seed)
        blend(model, base, share=1 - share)
        found.append({"edit": "subtract", "amount": share, **scene.judged(model)})
    taught: list[PreTrainedModel] = []
    how = Attack(optimiser="adamw", rate=1e-4, steps=40, points=(40,))
    scene.attack(base, scene.attack_rows, how, seed,
                 lambda model: taught.append(copy.deepcopy(model)) or {})  # fmt: skip
    for scale in TRANSPLANTED:
        model = scene.load(name, seed)
        add_difference(model, taught[0], base, scale=scale)
        found.append({"edit": "transplant", "amount": scale, **scene.judged(model)})
    for row in found:
        del row["by_category"]
    return {"n_restricted": len(scene.restricted),
            "utility_before": scene.judged(scene.load(name, seed))["utility"],
            "rows": found}  # fmt: skip


# 4. Overlap ---------------------------------------------------------------------------------------


def overlap(scene: Scene, seed: int, names: Sequence[str]) -> None:
    """Plant the coupling in worlds whose two sides share fewer words of their answers."""
    for share in concerns_report.OVERLAPS:
        world = scene
        if share != scene.bed.config.overlap:
            apart = dataclasses.replace(LatticeConfig(), overlap=share, base_steps=APART_STEPS)
            try:
                world = Scene(Lattice(apart), scene.root, {})
            except GateError as error:  # the other worlds still say something
                sys.stderr.write(f"overlap {share:g} left out: {error}\n")
                continue
        for name in names:
            keys = {"model": name, "overlap": share, "seed": seed,
                    "weights": world.key(name, seed)}  # fmt: skip
            world.cell("overlap", keys, partial(_coupled, world, name, seed))
        if world is not scene:
            scene.cells += world.cells


def _coupled(scene: Scene, name: str, seed: int) -> Row:
    found = {}
    for moment, one in (("before", UNDEFENDED), ("after", name)):
        model = scene.load(one, seed)
        judged = scene.judged(model)
        del judged["by_category"]
        cosine = gradient_cosine(
            GradientOracle(model), scene.batches["harmful"], scene.batches["benign"]
        )
        found[moment] = {**judged, "cosine": cosine}
    return {"n_permitted": len(scene.permitted), **found}


def main() -> None:
    """Run the experiments and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--testbed", choices=["lattice"], default="lattice")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER",
                        help="immunised models, in place of planting the defences")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="of planting and attacks in step, base and overlap")  # fmt: skip
    parser.add_argument("--bipartitions", type=int, default=5,
                        help="of the categories in data, each with its own seed")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--defences", nargs="+", choices=list(read_variants("lattice")),
                        help="by default all that are planted here")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=Path("runs/concerns"))
    parser.add_argument("--kept", action="store_true",
                        help="run nothing: write up what is kept in --output-dir")  # fmt: skip
    options = parser.parse_args()
    given = dict(one.split("=", 1) for one in options.models if "=" in one)
    require(len(given) == len(options.models), "--models is not NAME=FOLDER", "name each folder")
    keep_freed_memory()
    disable_progress_bar()
    scene = Scene(Lattice(), options.output_dir / options.testbed,
                  {name: Path(folder) for name, folder in given.items()},
                  options.defences)  # fmt: skip
    if options.kept:
        scene.cells = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((scene.root / "cells").glob("*.json"))
        ]
    else:
        run(scene, options)
    asked = {name: getattr(options, name) for name in ("testbed", "seeds", "bipartitions")}
    chosen = {name: getattr(options, name) or None for name in ("models", "defences")}
    only = None if options.only == EXPERIMENTS else options.only
    command = common.command("concerns", **asked, only=only, **chosen)
    concerns_report.write(options.testbed, scene.cells, scene.variants, command)


def run(scene: Scene, options: argparse.Namespace) -> None:
    """Run the experiments that were asked for."""
    if "data" in options.only and not scene.given:
        for seed in range(options.bipartitions):
            data_requirement(scene, seed, scene.roles("data"))
    for seed in options.seeds:
        if "step" in options.only:
            one_step(scene, seed, scene.roles("scan"))
        if "base" in options.only:
            base_model(scene, seed, scene.roles("base"))
        if "overlap" in options.only and not scene.given:
            overlap(scene, seed, ["seam", "seam-coupling"])


if __name__ == "__main__":
    main()
