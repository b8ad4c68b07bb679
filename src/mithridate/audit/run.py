"""`run_audit`: everything asked of the sets, as one document without a line of their text."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mithridate import models
from mithridate.audit import coverage, drift, gates, labels, leakage
from mithridate.audit.duplicates import Bounds, Overlaps
from mithridate.audit.sets import AuditSet, Vectors, audit_set, embed, summary_of
from mithridate.configs import Seed, check_values, from_mapping, read_yaml, require
from mithridate.embeddings import MINILM, load_encoder
from mithridate.errors import InputError
from mithridate.events import Event, Listener, silent
from mithridate.examples import AS_PUBLISHED, Example, Reading, normalise_prompt, read_source
from mithridate.files import sha256_file, write_atomic
from mithridate.folders import run_folder
from mithridate.printable import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

MANIFEST_FIELDS = ("source", "licence", "reviewer", "sha256")

NOT_CHECKED = (
    "Coverage and closeness in the space of the model's gradients, where CTRAP and SEAM act.",
    "Whether an answer is true: usefulness is judged by form alone unless a judge is exact.",
    "Names of persons: private data is found by pattern.",
    "Paraphrases that the encoder does not see, and translations.",
    "From which distance on the defence fails: that needs attacks on held-out categories.",
)

_RELEARN_STEPS = 10
_RELEARN_RATE = 1e-4
_NGRAMS = 12
_WINDOW = "observed"


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Bounds and settings, all printed in the document.

    Parameters
    ----------
    encoder
        Of the prompts, as `embeddings.load_encoder` takes it.
    seed
        Of permutations and folds.
    permutations
        Draws of each permutation test.
    min_items, min_share
        Prompts and share a category needs.
    min_coverage
        Share of asked prompts within r of a harmful one.
    neighbours
        k of improved recall and coverage.
    jaccard, cosine, words
        From where on two texts count as alike (`duplicates.Bounds`).
    add
        Most prompts to name under what to add next.
    drift_auc, drift_p
        A window beyond both has drifted.
    drift_rows
        Most rows of each side in a drift test, whose time grows with the square.
    """

    encoder: str = MINILM
    seed: Seed = 0
    permutations: int = 1000
    min_items: int = 30
    min_share: float = 0.02
    min_coverage: float = 0.9
    neighbours: int = 5
    jaccard: float = 0.8
    cosine: float = 0.95
    words: int = 13
    add: int = 25
    drift_auc: float = 0.65
    drift_p: float = 0.01
    drift_rows: int = 1500

    def __post_init__(self) -> None:
        check_values(self)
        for name, least in (
            ("permutations", 99), ("min_items", 1), ("neighbours", 1), ("words", 2), ("add", 1),
            ("drift_rows", 10),
        ):  # fmt: skip
            require(getattr(self, name) >= least, f"{name} is below {least}", f"raise {name}")
        for name in ("min_share", "min_coverage", "jaccard", "cosine", "drift_auc", "drift_p"):
            require(0 < getattr(self, name) <= 1, f"{name} is not a share above 0", "choose 0 to 1")
        require(
            self.jaccard >= 0.6,
            "jaccard is below .6, where too many pairs are missed to call it a bound",
            "choose 0.6 to 1",
        )


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """What the command line was given.

    Parameters
    ----------
    testbed
        Audit its sets; ``streams``, ``attack`` and ``evaluation`` then stay empty.
    streams
        Source of each defence stream; ``harmful`` is needed.
    attack, evaluation
        The attacker's rows, and held-out questions.
    observed
        Newly observed prompts, one source a window, oldest first.
    pool
        Prompts to choose what to add next from; default: the observed ones, else the attack's.
    model, reference, canaries
        A model whose exposure to measure, the model before immunisation, and the made-up facts
        in the harmful set.
    manifest
        YAML with `MANIFEST_FIELDS` for every set.
    config
        YAML with the section ``audit``.
    seed
        Overrides ``audit.seed``.
    overlap
        Attack rows may stand in the harmful set.
    strict
        A warning fails.
    reveal
        Put prompts in the document and the page.
    reading
        How the files are read.
    """

    output_dir: Path
    testbed: str | None = None
    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)
    attack: str | None = None
    evaluation: str | None = None
    observed: Sequence[str] = ()
    pool: str | None = None
    model: str | None = None
    reference: str | None = None
    canaries: str | None = None
    manifest: Path | None = None
    config: Path | None = None
    seed: int | None = None
    overlap: bool = False
    strict: bool = False
    reveal: bool = False
    reading: Reading = AS_PUBLISHED


@dataclass(frozen=True, kw_only=True)
class _Material:
    """The sets, what reading them has left out, and what a testbed knows about them."""

    sets: dict[str, AuditSet]
    left_out: dict[str, dict[str, int]]
    windows: list[AuditSet]
    pool: list[AuditSet]
    canaries: list[Example]
    exact: leakage.Exact | None = None
    refusals: tuple[str, ...] = ()
    reference: str | None = None


def run_audit(plan: AuditPlan, *, on_event: Listener = silent) -> dict[str, Any]:
    """Audit the sets, write ``audit.json`` and return its document.

    Raises
    ------
    InputError
        Anything that was given cannot be used; before any long work.
    """
    config = read_settings(plan)
    _check_plan(plan)
    for source in (plan.model, plan.reference):
        if source is not None:
            models.check(source)
    with run_folder(plan.output_dir):
        return _run(plan, config, on_event)


def _run(plan: AuditPlan, config: AuditConfig, on_event: Listener) -> dict[str, Any]:
    # One window drifted of several has its p-value multiplied by their number.
    windows = max(1, len(plan.observed))
    require(
        config.drift_p * (config.permutations + 1) > windows,
        f"{config.permutations} permutations cannot show p < {config.drift_p:g} "
        f"in one of {windows} windows",
        f"give at least {int(windows / config.drift_p) + 1} permutations, or fewer windows",
    )
    manifest = read_yaml(plan.manifest) if plan.manifest else None
    encoder = load_encoder(config.encoder)
    on_event(Event(stage="reading data"))
    material = _read(plan)
    harmful = material.sets["harmful"]
    require(
        len(harmful.distinct()) > 1,
        "the harmful set has a single prompt",
        "give at least two different prompts",
    )
    everything = [*material.sets.values(), *material.windows]
    on_event(Event(stage="encoding prompts"))
    vectors = embed({part.name: part for part in (*everything, *material.pool)}.values(), encoder)
    judges = [material.sets[name] for name in ("attack", "eval") if name in material.sets]
    asked = [*judges, *material.windows]
    on_event(Event(stage="coverage"))
    found: dict[str, Any] = {
        "coverage": _coverage(harmful, asked, material.pool, vectors, config),
    }
    on_event(Event(stage="duplicates"))
    overlaps = Overlaps(
        everything,
        vectors,
        Bounds(jaccard=config.jaccard, cosine=config.cosine, words=config.words),
    )
    found["duplicates"] = {"between": overlaps.between(), "within": overlaps.within()}
    on_event(Event(stage="labels"))
    found["labels"] = _labels(material, vectors, found["coverage"]["embedding"]["radius"], config)
    on_event(Event(stage="drift"))
    found["drift"] = _drift(material, vectors, config)
    on_event(Event(stage="leakage"))
    found["leakage"] = {
        "usable": leakage.usable_answers(harmful, material.exact),
        "refusals": leakage.answering_refusals(harmful, material.sets["refusal"])
        if "refusal" in material.sets
        else None,
        "exposure": _exposure(plan, material, config, on_event) if plan.model else None,
    }
    found["provenance"] = _provenance(plan, manifest, material)
    settings = dataclasses.asdict(config)
    judged = gates.judge(found, settings, overlap=plan.overlap)
    outcome = gates.verdict(judged, strict=plan.strict)
    document = {
        "verdict": outcome,
        "exit_code": int(outcome == "fail"),
        "gates": [dataclasses.asdict(gate) for gate in judged],
        "testbed": plan.testbed or "",
        "sets": {part.name: summary_of(part) for part in everything},
        "left_out": material.left_out,
        **found,
        "settings": {**settings, "strict": plan.strict, "overlap": plan.overlap},
        "revealed": plan.reveal,
        "not_checked": list(NOT_CHECKED),
    }
    write_atomic(
        plan.output_dir / "audit.json",
        json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        private=plan.reveal,
    )
    return document


def read_settings(plan: AuditPlan) -> AuditConfig:
    """Return the configuration of ``plan``.

    Raises
    ------
    InputError
        An unknown section or key, or a value out of range.
    """
    where = str(plan.config) if plan.config else "defaults"
    given = read_yaml(plan.config) if plan.config else {}
    section = given.get("audit") or {}
    require(
        set(given) <= {"audit"} and isinstance(section, Mapping),
        f"{where}: the file holds something else than the mapping 'audit:'",
        "write the audit's values under audit:",
    )
    values = dict(section)
    if plan.seed is not None:
        values["seed"] = plan.seed
    return from_mapping(AuditConfig, values, where=f"{where}: audit")


def _check_plan(plan: AuditPlan) -> None:
    own = [
        *plan.streams,
        *(["attack"] if plan.attack else []),
        *(["eval"] if plan.evaluation else []),
    ]
    if plan.testbed is not None:
        require(
            not own,
            f"both a testbed and own files ({', '.join(own)}) are given",
            "give either --testbed or files",
        )
    else:
        require(
            "harmful" in plan.streams,
            "there is no harmful set to audit",
            "give --harmful FILE, or --testbed lattice or atlas",
        )
        require(
            plan.model is None or plan.canaries is not None,
            "the exposure of a model needs canaries",
            "give --canaries FILE: made-up facts that stand in the harmful set",
        )
    for name in ("canaries", "reference"):
        require(
            getattr(plan, name) is None or plan.model is not None,
            f"--{name} is given without --model",
            "give the model whose exposure to measure",
        )
    for package in ("datasketch", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"the audit needs the package {package}", mend="pip install 'mithridate[audit]'"
            )


def _read(plan: AuditPlan) -> _Material:
    def named(name: str, rows: Sequence[Example]) -> AuditSet:
        return audit_set(name, rows, reveal=plan.reveal)

    left_out: dict[str, dict[str, int]] = {}

    def read(name: str, source: str, stream: str, option: str = "") -> list[Example]:
        found = read_source(
            source,
            stream=stream,
            name=option or name,
            # What is asked, and what there is to choose from, is no one kind of row.
            every_kind=name == "pool" or option == "observed",
            reading=plan.reading,
        )
        if found.left_out:
            left_out[name] = dict(found.left_out)
        return found.examples

    windows = [
        named(name := f"{_WINDOW} {number}", read(name, source, "prompts", "observed"))
        for number, source in enumerate(plan.observed, start=1)
    ]
    rows: dict[str, Sequence[Example]]
    known: dict[str, Any] = {}
    canaries: list[Example] = []
    if plan.testbed is not None:
        rows, canaries, known = _testbed(
            plan.testbed,
            with_reference=plan.model is not None and plan.reference is None,
        )
    else:
        sources = {
            **plan.streams,
            **({"attack": plan.attack} if plan.attack else {}),
            **({"eval": plan.evaluation} if plan.evaluation else {}),
        }
        rows = {
            name: read(name, source, name if name in plan.streams else "harmful")
            for name, source in sources.items()
        }
    if plan.canaries is not None:
        canaries = read("canaries", plan.canaries, "harmful")
        held = {normalise_prompt(row.prompt) for row in rows["harmful"]}
        strangers = sum(normalise_prompt(row.prompt) not in held for row in canaries)
        require(
            not strangers,
            f"{strangers} of {len(canaries)} canaries do not stand in the harmful set",
            "name rows of the harmful set",
        )
    if plan.model:
        require(
            len({leakage.secret_of(row) for row in canaries}) > 1,
            "exposure needs at least two canaries with different answers",
            "give more canaries",
        )
    sets = {name: named(name, part) for name, part in rows.items()}
    if plan.pool is not None:
        pool = [named("pool", read("pool", plan.pool, "prompts"))]
    else:
        pool = windows or [sets[name] for name in ("attack",) if name in sets]
    return _Material(
        sets=sets, left_out=left_out, windows=windows, pool=pool, canaries=canaries, **known
    )


def _testbed(
    name: str, *, with_reference: bool
) -> tuple[dict[str, Sequence[Example]], list[Example], dict[str, Any]]:
    """Return a testbed's sets, its canaries (arbitrary facts of the harmful set), and its judge."""
    from mithridate.judges.outcomes import Outcome
    from mithridate.testbeds import TESTBEDS

    testbed = TESTBEDS.load(name)()
    data = testbed.data
    canaries: dict[str, Example] = {}
    for row in data.defence["harmful"]:
        if row.half == "arbitrary":
            canaries.setdefault(row.fact_id, row)
    known = {
        "exact": lambda row: testbed.judge(row, row.answer) is Outcome.EXACT,
        "refusals": tuple(testbed.refusals),
        "reference": str(testbed.aligned_model()) if with_reference else None,
    }
    sets = {**data.defence, "attack": data.attack, "eval": data.restricted}
    return sets, list(canaries.values()), known


def _coverage(
    harmful: AuditSet,
    asked: Sequence[AuditSet],
    pool: Sequence[AuditSet],
    vectors: dict[str, Vectors],
    config: AuditConfig,
) -> dict[str, Any]:
    embedding = coverage.by_embedding(harmful, asked, vectors, neighbours=config.neighbours)
    return {
        "categories": coverage.by_category(harmful, asked),
        "embedding": embedding,
        "next": coverage.what_to_add(
            harmful, pool, vectors, radius=embedding["radius"], limit=config.add
        )
        if pool
        else None,
    }


def _labels(
    material: _Material, vectors: dict[str, Vectors], radius: float, config: AuditConfig
) -> dict[str, Any]:
    harmful = material.sets["harmful"]
    own = vectors[harmful.name]
    return {
        "answers": labels.wrong_answers(material.sets, material.refusals),
        "conflicts": labels.conflicting_categories(harmful),
        "categories": labels.category_errors(harmful, own, seed=config.seed),
        "outliers": labels.outliers(harmful, own),
        "benign": labels.benign_near_harm(material.sets["benign"], harmful, vectors, radius=radius)
        if "benign" in material.sets
        else None,
        "private": labels.private_data(list(material.sets.values())),
    }


def _drift(material: _Material, vectors: dict[str, Vectors], config: AuditConfig) -> dict[str, Any]:
    """Return the tests of every window, and for orientation of the attack's prompts."""
    harmful = material.sets["harmful"]

    def compared(part: AuditSet) -> dict[str, Any] | None:
        return drift.compare(
            harmful, part, vectors,
            permutations=config.permutations, seed=config.seed, most=config.drift_rows,
        )  # fmt: skip

    windows = []
    for part in material.windows:
        entry = compared(part)
        require(
            entry is not None,
            f"{part.name}, or the harmful set, has fewer than {2 * drift.FOLDS} separate prompts",
            "give larger windows",
        )
        assert entry is not None
        windows.append({**entry, "telling": _telling(harmful, part)})
    attack = material.sets.get("attack")
    return {
        "windows": windows,
        "ticket": bool(windows)
        and drift.judge_windows(windows, auc=config.drift_auc, p=config.drift_p),
        "attack": compared(attack) if attack else None,
    }


def _telling(held: AuditSet, seen: AuditSet) -> list[dict[str, Any]]:
    """Return the words and word pairs that set new prompts apart, hashed unless revealed.

    Ranked by the z-score of the log-odds with an informative prior (Monroe et al. 2008).
    """
    counts = [
        Counter(gram for index in part.distinct() for gram in _grams(part.keys[index]))
        for part in (held, seen)
    ]
    both = counts[0] + counts[1]
    totals = [sum(count.values()) for count in counts]
    prior = 0.1
    weight = prior * sum(totals)

    def log_odds(count: Counter[str], total: int, gram: str) -> tuple[float, float]:
        own = count[gram] + prior * both[gram]
        return float(np.log(own / (total + weight - own))), 1 / own

    scores = {}
    for gram in both:
        (old, old_variance), (new, new_variance) = (
            log_odds(count, total, gram) for count, total in zip(counts, totals, strict=True)
        )
        scores[gram] = (new - old) / float(np.sqrt(old_variance + new_variance))
    top = sorted(scores, key=lambda gram: (-scores[gram], gram))[:_NGRAMS]
    return [
        {
            "sha256": hashlib.sha256(gram.encode("utf-8")).hexdigest()[:12],
            "z": scores[gram],
            **({"text": printable(gram, limit=80)} if seen.reveal else {}),
        }
        for gram in top
    ]


def _grams(text: str) -> list[str]:
    words = re.findall(r"\w+", text)
    return [*words, *(" ".join(pair) for pair in pairwise(words))]


def _exposure(
    plan: AuditPlan, material: _Material, config: AuditConfig, on_event: Listener
) -> dict[str, Any]:
    """Return the exposure of model and reference, before and after a short relearning."""
    from mithridate.attacks.finetune import FinetuneConfig, finetune
    from mithridate.chat import ChatFormat

    sources = {"reference": plan.reference or material.reference, "model": plan.model}
    attack = material.sets.get("attack")
    measured: dict[str, NDArray[np.float64]] = {}
    for name, source in sources.items():
        if source is None:
            continue
        on_event(Event(stage=f"exposure of the {name}"))
        model, tokenizer = models.load(source)
        chat = ChatFormat(tokenizer)
        if attack is None:
            measured[name] = leakage.measure_exposure(model, chat, material.canaries)
            continue
        moments: list[NDArray[np.float64]] = []

        def look(
            attacked: PreTrainedModel,
            step: int,  # noqa: ARG001
            chat: ChatFormat = chat,
            moments: list[NDArray[np.float64]] = moments,
        ) -> dict[str, float]:
            moments.append(leakage.measure_exposure(attacked, chat, material.canaries))
            return {"exposure": float(moments[-1].mean())}

        finetune(
            model,
            chat,
            attack.examples,
            FinetuneConfig(
                learning_rate=_RELEARN_RATE,
                steps=_RELEARN_STEPS,
                probe_every=_RELEARN_STEPS,
                seed=config.seed,
            ),
            probe=look,
            output_dir=plan.output_dir / f"relearn-{name}",
        )
        measured[name], measured[f"{name}, relearnt"] = moments[0], moments[-1]
    found = leakage.summarise_exposure(measured, material.canaries)
    found["rise"] = {
        name: dataclasses.asdict(
            leakage.exposure_rise(
                measured[name.replace("model", "reference")],
                measured[name],
                permutations=config.permutations,
                seed=config.seed,
            )
        )
        for name in ("model", "model, relearnt")
        if name in measured and "reference" in measured
    }
    return found


def _provenance(
    plan: AuditPlan, manifest: Mapping[str, Any] | None, material: _Material
) -> dict[str, Any]:
    """Return what the manifest lacks; a testbed's sets are made by its code and need none."""
    if plan.testbed is not None and manifest is None and not plan.observed:
        return {"manifest": f"testbed {plan.testbed}", "faults": []}
    if manifest is None:
        return {"manifest": None, "faults": []}
    sources = {
        **plan.streams,
        **({"attack": plan.attack} if plan.attack else {}),
        **({"eval": plan.evaluation} if plan.evaluation else {}),
        **{part.name: source for part, source in zip(material.windows, plan.observed, strict=True)},
    }
    faults = []
    for name, source in sources.items():
        entry = manifest.get(name)
        if not isinstance(entry, Mapping):
            faults.append(f"{name}: not in the manifest")
            continue
        lacking = [field for field in MANIFEST_FIELDS if not entry.get(field)]
        if lacking:
            faults.append(f"{name}: no {', '.join(lacking)}")
        elif Path(source).is_file() and entry["sha256"] != sha256_file(Path(source)):
            faults.append(f"{name}: the file is not the one whose SHA-256 is given")
    return {"manifest": str(plan.manifest), "faults": faults}
