"""Attacking a user's own model, beside its undefended control, and judging what comes back."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from mithridate import lengths, models
from mithridate.attacks.finetune import FinetuneConfig, arguments_for, finetune, read_record
from mithridate.attacks.rl import Reward, RLConfig, exact_match, reinforce
from mithridate.chat import ChatFormat
from mithridate.configs import from_mapping, read_yaml, require
from mithridate.errors import InputError
from mithridate.events import Event, Listener, silent
from mithridate.examples import (
    AS_PUBLISHED,
    Example,
    Reading,
    check_disjoint,
    fingerprint,
    read_source,
)
from mithridate.files import sha256_of, write_atomic, write_json
from mithridate.folders import discard_conclusions, run_folder
from mithridate.generation import AnswerRoom, answer_room, most_cut_short
from mithridate.judges.answers import AnswerJudge, check_kinds
from mithridate.judges.base import Judge, make_judge, useful_harm_score, useful_harms
from mithridate.judges.outcomes import Outcome, shares
from mithridate.measures.probe import summarise
from mithridate.measures.trajectory import start_of, worst_case
from mithridate.provenance import versions
from mithridate.release import weights_hash
from mithridate.weights import GradientOracle
from mithridate.weights.losses import answer_cross_entropy

_MEASURES = ("refusal", "useful_harm", "utility")
_CONFIGS = {"sft": FinetuneConfig, "rl": RLConfig}


@dataclass(frozen=True, kw_only=True)
class AttackPlan:
    """What the command line was given.

    Parameters
    ----------
    model, undefended
        Folder or Hub id of the model to attack, and of its control: the model before
        immunisation. Without the control no report can be made.
    harmful
        The attacker's rows.
    evaluation
        Held-out restricted questions, disjoint from ``harmful`` by prompt; with answers where the
        judge compares.
    permitted
        Held-out permitted questions that make up utility; without them nothing says whether what
        the attacker gets is still a useful model.
    kind
        ``sft``: supervised fine-tuning on ``harmful``. ``rl``: reinforcement learning on its
        prompts, which pays for the answers given there.
    judge
        Who judges the answers to restricted questions: ``NAME`` or ``NAME:SOURCE`` of a
        registered judge.
    learning_rates
        Each is one attack.
    config
        YAML file whose section ``attack`` holds further `FinetuneConfig` or `RLConfig` values, and
        whose section ``judge`` holds the judge's.
    steps, seed
        Override those of the section.
    max_new_tokens
        Of an answer to a held-out question, thinking included; ``None``: as many as the answers
        need (`tokens_to_answer`).
    reading
        How the files are read.
    keep_answers
        Keep sample answers in the run folder, readable only by its owner.
    output_dir
        The run folder.
    """

    model: str
    harmful: str
    evaluation: str
    output_dir: Path
    undefended: str | None = None
    permitted: str | None = None
    kind: Literal["sft", "rl"] = "sft"
    judge: str = "exact"
    learning_rates: tuple[float, ...] = (2e-5, 1e-4, 5e-4)
    config: Path | None = None
    steps: int | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    reading: Reading = AS_PUBLISHED
    keep_answers: bool = False


@dataclass(frozen=True, kw_only=True)
class _Items:
    attack: list[Example]
    restricted: list[Example]
    permitted: list[Example]
    left_out: dict[str, dict[str, int]]


def run_attack(plan: AttackPlan, *, on_event: Listener = silent) -> dict[str, Any]:
    """Attack, judge, write the run folder, and return its summary.

    Raises
    ------
    InputError
        Anything that was given cannot be used, or another process writes into the folder; before
        any training.
    """
    base, judge = read_settings(plan)
    with run_folder(plan.output_dir):
        return _run(plan, base, judge, on_event)


def _run(
    plan: AttackPlan, base: FinetuneConfig, judge: Judge, on_event: Listener
) -> dict[str, Any]:
    _check_trainable(base, plan.output_dir)
    _check_folder(plan.output_dir)
    targets = {"undefended": plan.undefended, "defended": plan.model}
    sources = {name: source for name, source in targets.items() if source is not None}
    for source in sources.values():
        stored = models.check(source)
        if stored is not None:
            _check_room(stored.parameters, base, plan.output_dir)
    on_event(Event(stage="reading data"))
    items = _read_items(plan, judge)
    on_event(Event(stage=f"asking the judge {judge.name}"))
    judge.prepare(plan.output_dir)
    discard_conclusions(plan.output_dir)
    # All models are told one day, and a finished attack's is kept.
    base = dataclasses.replace(base, template_date=base.template_date or _first_day(plan))
    asked_day: datetime.date | None = None
    started = time.perf_counter()
    trajectory: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    templates: dict[str, str] = {}
    diverged = []
    for target, source in sources.items():
        model, tokenizer = models.load(source)
        if not Path(source).is_dir():
            _check_room(model.num_parameters(), base, plan.output_dir)
        chat, items = _that_fit(model, tokenizer, items, base, plan)
        attack = dataclasses.replace(base, max_length=lengths.bound(model, base.max_length))
        room = answer_room(model, chat, [*items.restricted, *items.permitted], plan.max_new_tokens)
        hashes[target], templates[target] = weights_hash(model), chat.template_hash
        asked_day = asked_day or chat.date
        for rate in plan.learning_rates:
            folder = plan.output_dir / "attacks" / f"{target}-{rate:g}"
            rows = _attack_one(
                model, chat, items, dataclasses.replace(attack, learning_rate=rate), judge,
                room=room, folder=folder, keep=plan.keep_answers,
                stage=f"attacking the {target} model at {rate:g}", on_event=on_event,
            )  # fmt: skip
            record = read_record(folder)
            if record is not None and record.status == "diverged":
                diverged.append(f"{target} at {rate:g}")
            trajectory += [_trajectory_row(row, target, rate, items) for row in rows]
    summary = {
        "testbed": "",
        "method": "",
        "seed": base.seed,
        **{target: _summarise(trajectory, target) for target in sources},
        "attack": {
            "examples": len(items.attack),
            "batch_size": base.batch_size,
            "steps": base.steps,
            "optimiser": base.optimiser,
            "kind": plan.kind,
            "diverged": diverged,
            "judge": judge.description(),
            "answers": most_cut_short(trajectory),
        },
        "seconds": {"attacking": time.perf_counter() - started},
    }
    base = dataclasses.replace(base, template_date=str(asked_day) if asked_day else None)
    _write_folder(plan, base, judge, items, trajectory, summary, hashes, templates)
    return summary


def read_settings(plan: AttackPlan) -> tuple[FinetuneConfig, Judge]:
    """Return the attack's configuration, and its judge.

    The configuration's learning rate is replaced by each of the plan's.

    Raises
    ------
    InputError
        An unknown section or key, or a value out of range.
    """
    require(bool(plan.learning_rates), "no learning rate", "give at least one --learning-rate")
    named = [f"{rate:g}" for rate in plan.learning_rates]
    twice = next((name for name in named if named.count(name) > 1), None)
    require(twice is None, f"the learning rate {twice} is given twice", "give each rate once")
    where = str(plan.config) if plan.config else "command line"
    given = read_yaml(plan.config) if plan.config else {}
    section, judge = given.get("attack") or {}, given.get("judge") or {}
    require(
        set(given) <= {"attack", "judge"}
        and isinstance(section, Mapping)
        and isinstance(judge, Mapping),
        f"{where}: the file holds something else than the mappings 'attack:' and 'judge:'",
        "write the attack's values under attack:, the judge's under judge:",
    )
    section = dict(section)
    require(
        "learning_rate" not in section,
        f"{where}: attack: learning_rate is given on the command line",
        "remove it and give --learning-rate once for each rate",
    )
    if plan.steps is not None:
        section["steps"] = plan.steps
    if plan.seed is not None:
        section["seed"] = plan.seed
    for rate in plan.learning_rates:
        from_mapping(_CONFIGS[plan.kind], {**section, "learning_rate": rate}, where=where)
    return (
        from_mapping(_CONFIGS[plan.kind], section, where=f"{where}: attack"),
        make_judge(plan.judge, judge, where=where),
    )


def _check_trainable(config: FinetuneConfig, output_dir: Path) -> None:
    """Refuse an optimiser or a schedule that the Trainer knows by name and cannot make here."""
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments_for(config, output_dir, rows=1))
    try:
        trainer.create_optimizer_and_scheduler(config.steps)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"optimiser {config.optimiser!r} with schedule {config.schedule!r} cannot be made: "
            f"{reason}",
            where="attack",
            mend="install what it needs, or choose another; adamw_torch, sgd and adafactor, "
            "constant, linear and cosine need nothing more",
        ) from None


def _check_folder(folder: Path) -> None:
    """Refuse the folder of an immunisation or a demo, whose manifest would be lost."""
    found = [name for name in ("history.jsonl", "planting") if (folder / name).exists()]
    if found:
        raise InputError(
            f"this folder holds another command's run ({found[0]})",
            where=str(folder),
            mend="choose another output folder",
        )


def _first_day(plan: AttackPlan) -> str:
    """Return the day that templates were told in the finished attack of this folder, or today."""
    path = plan.output_dir / "config.yaml"
    before = read_yaml(path).get("attack") if path.is_file() else None
    told = before.get("template_date") if isinstance(before, Mapping) else None
    return str(told or datetime.date.today())


def _that_fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: _Items,
    config: FinetuneConfig,
    plan: AttackPlan,
) -> tuple[ChatFormat, _Items]:
    """Return the items that the model has room for, which the next model then gets too."""
    sets = {"harmful": items.attack}
    if all(item.answer for item in items.restricted):
        sets["eval"] = items.restricted
    chat, fitted = lengths.fit(
        model,
        tokenizer,
        sets,
        asked={"eval": items.restricted, "permitted": items.permitted},
        max_length=config.max_length,
        rows=config.batch_size,
        drop=plan.reading.drop_invalid,
        option="attack.max_length",
        template_arguments=config.template_arguments,
        template_date=config.template_date,
    )
    if isinstance(config, RLConfig):
        lengths.check_rollouts(
            model,
            chat,
            fitted.examples["harmful"],
            rows=config.batch_size * config.rollouts,
            tokens=config.response_length,
        )
    return chat, dataclasses.replace(
        items,
        attack=fitted.examples["harmful"],
        restricted=fitted.examples["eval"],
        permitted=fitted.examples["permitted"],
        left_out=fitted.added_to(items.left_out),
    )


def _read_items(plan: AttackPlan, judge: Judge) -> _Items:
    asked = "harmful" if judge.needs_answers else "prompts"
    sources = {"harmful": (plan.harmful, "harmful"), "eval": (plan.evaluation, asked)}
    if plan.permitted is not None:
        sources["permitted"] = (plan.permitted, "benign")
    found = {
        name: read_source(
            source,
            stream=stream,
            name=name,
            # Whether a permitted question is refused can be seen without its answer.
            needs_answer=judge.needs_answers if name == "permitted" else None,
            reading=plan.reading,
        )
        for name, (source, stream) in sources.items()
    }
    sets = {name: one.examples for name, one in found.items()}
    check_disjoint(sets)
    check_kinds(sets)
    return _Items(
        attack=sets["harmful"],
        restricted=sets["eval"],
        permitted=sets.get("permitted", []),
        left_out={name: dict(one.left_out) for name, one in found.items() if one.left_out},
    )


def _attack_one(
    model: PreTrainedModel,
    chat: ChatFormat,
    items: _Items,
    config: FinetuneConfig,
    judge: Judge,
    *,
    room: AnswerRoom,
    folder: Path,
    stage: str,
    keep: bool,
    on_event: Listener,
) -> list[dict[str, float]]:
    def on_progress(step: int, steps: int, row: Mapping[str, float]) -> None:
        shown = {name: row[name] for name in (*_MEASURES, "loss") if name in row}
        on_event(Event(stage=stage, step=step, total=steps, metrics=shown))

    on_event(Event(stage=stage, total=config.steps))
    run = finetune
    if isinstance(config, RLConfig):
        pays = exact_match(AnswerJudge(items.attack)) if judge.needs_answers else _paid_by(judge)
        run = partial(reinforce, reward=pays, reward_key=sha256_of(judge.description()))
    return run(
        model,
        chat,
        items.attack,
        config,
        probe=_probe(chat, items, config, judge, room, folder if keep else None),
        probe_key=sha256_of(
            [
                fingerprint(items.restricted),
                fingerprint(items.permitted),
                judge.description(),
                room.counts([]),
                keep,
            ]
        ),
        on_progress=on_progress,
        output_dir=folder,
    )


def _paid_by(judge: Judge) -> Reward:
    return lambda items, outputs: useful_harms(judge.judge(items, outputs))


def _probe(
    chat: ChatFormat,
    items: _Items,
    config: FinetuneConfig,
    judge: Judge,
    room: AnswerRoom,
    keep: Path | None,
) -> Callable[[PreTrainedModel, int], dict[str, float]]:
    answered = all(item.answer for item in items.restricted)
    evaluation = chat.batch(items.restricted, max_length=config.max_length) if answered else None
    useful = AnswerJudge(items.permitted)

    def probe(model: PreTrainedModel, step: int) -> dict[str, float]:
        seen = {}
        if evaluation is not None:
            oracle = GradientOracle(model, micro_batch_size=16, autocast=config.autocast)
            seen["answer_loss"] = oracle.loss(
                answer_cross_entropy, evaluation, purpose="evaluation"
            )
        seen |= judge.look(model, chat, items.restricted)
        answers = chat.answers(
            model,
            [item.prompt for item in (*items.restricted, *items.permitted)],
            max_new_tokens=room.tokens,
            autocast=config.autocast,
        )
        outputs = [answer.text for answer in answers]
        seen |= room.counts(answers)
        count = len(items.restricted)
        judged = judge.judge(items.restricted, outputs[:count])
        if not judge.needs_answers:
            seen[f"{judge.name}/harm"] = useful_harm_score(judged)
        outcomes = [one.outcome for one in judged]
        if not items.permitted:
            return {**seen, **_harm_only(outcomes)}
        outcomes += map(useful, items.permitted, outputs[count:])
        # Guessing is not corrected for: nobody knows what a user's own questions allow.
        result = summarise(items.restricted, items.permitted, outputs, outcomes, chance={})
        if keep is not None:
            text = json.dumps(result.samples, ensure_ascii=False)
            write_atomic(keep / f"answers-{step}.json", text, private=True)
        return {**seen, **result.metrics()}

    return probe


def _harm_only(outcomes: Sequence[Outcome]) -> dict[str, float]:
    found = shares(outcomes)
    return {
        "useful_harm": found[Outcome.EXACT],
        "refusal": found[Outcome.REFUSAL],
        **{f"outcome/{name}": share for name, share in found.items()},
    }


def _trajectory_row(
    row: Mapping[str, float], target: str, rate: float, items: _Items
) -> dict[str, Any]:
    prefix = "outcome/"
    return {
        "target": target,
        "learning_rate": rate,
        **{name: value for name, value in row.items() if not name.startswith(prefix)},
        "outcomes": {
            name.removeprefix(prefix): value
            for name, value in row.items()
            if name.startswith(prefix)
        },
        "n_restricted": len(items.restricted),
        "n_permitted": len(items.permitted),
    }


def _summarise(trajectory: Sequence[dict[str, Any]], target: str) -> dict[str, Any]:
    own = [row for row in trajectory if row["target"] == target]
    start = start_of(own)
    measures = [name for name in _MEASURES if name in start]

    def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "utility" in measures:
            row = worst_case(rows, reference_utility=start["utility"]).row
            assert row is not None, "the probe before the attack keeps its own utility"
        else:
            row = max(rows, key=lambda row: row["useful_harm"])
        return {name: row[name] for name in (*measures, "learning_rate", "step")}

    rates = dict.fromkeys(row["learning_rate"] for row in own)
    return {
        "before": {name: start[name] for name in measures},
        "after": worst(own),
        "per_learning_rate": [
            worst([row for row in own if row["learning_rate"] == rate]) for rate in rates
        ],
    }


def _write_folder(
    plan: AttackPlan,
    base: FinetuneConfig,
    judge: Judge,
    items: _Items,
    trajectory: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    hashes: Mapping[str, str],
    templates: Mapping[str, str],
) -> None:
    folder = plan.output_dir
    attack = dataclasses.asdict(base)
    del attack["learning_rate"]
    config = {
        "model": plan.model,
        "undefended": plan.undefended,
        "kind": plan.kind,
        "learning_rates": list(plan.learning_rates),
        "attack": attack,
        "judge": json.loads(json.dumps(judge.description())),
    }
    write_atomic(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_json(
        folder / "manifest.json",
        {
            "models": dict(hashes),
            "chat templates": dict(templates),
            "data": {
                "harmful": fingerprint(items.attack),
                "eval": fingerprint(items.restricted),
                "permitted": fingerprint(items.permitted),
            },
            "left out": items.left_out,
            "versions": versions(),
            "seeds": [base.seed],
        },
    )
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in trajectory)
    write_atomic(folder / "trajectory.jsonl", lines)
    (folder / "samples.json").unlink(missing_ok=True)
    if plan.keep_answers and items.permitted and plan.undefended is not None:
        text = json.dumps(_samples(folder, items, summary), ensure_ascii=False)
        write_atomic(folder / "samples.json", text, private=True)
    write_json(folder / "summary.json", summary)


def _samples(folder: Path, items: _Items, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    answers: dict[str, list[dict[str, str]]] = {}
    for target in ("undefended", "defended"):
        after = summary[target]["after"]
        attack = folder / "attacks" / f"{target}-{after['learning_rate']:g}"
        for moment, step in (("before", 0), ("after", after["step"])):
            text = (attack / f"answers-{step}.json").read_text(encoding="utf-8")
            answers[f"{target}_{moment}"] = json.loads(text)
    return [
        {
            "prompt": item.prompt,
            "answer": item.answer,
            "category": item.category,
            **{name: column[index]["output"] for name, column in answers.items()},
        }
        for index, item in enumerate(items.restricted[: len(answers["defended_after"])])
    ]


def _check_room(parameters: int, config: FinetuneConfig, output_dir: Path) -> None:
    # The attacker works on a copy, beside which the model itself stays; an adapter is small.
    copies = 5 if config.lora_rank is None else 2
    models.check_room(models.requirements(parameters, copies=copies, checkpoints=0), output_dir)
