"""One attack on one model with one seed: its phases one after the other, with probes between."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mithridate import models
from mithridate.allocation import keep_freed_memory
from mithridate.attacks import editing
from mithridate.attacks.adaptive import AdaptiveConfig, banned, finetune_adaptively
from mithridate.attacks.finetune import FinetuneConfig, Probe, Row, finetune
from mithridate.attacks.inserts import SoftChat
from mithridate.attacks.rl import RLConfig, exact_match, reinforce
from mithridate.chat import Batch, ChatFormat
from mithridate.configs import require
from mithridate.errors import NonFiniteError, NotApplicableError
from mithridate.examples import Example, fingerprint
from mithridate.files import read_kept, sha256_of, write_kept
from mithridate.folders import cache_entry
from mithridate.generation import AnswerRoom, answer_room
from mithridate.judges.outcomes import Outcome
from mithridate.measures.probe import accuracy, stratified, summarise
from mithridate.redteam.battery import Attack, Edit, Frame, Reinforce, Sizes, Train
from mithridate.redteam.material import (
    Split,
    attacker_rows,
    framed,
    permitted_items,
    restricted_items,
    salient_rows,
)
from mithridate.redteam.own import OwnBed, OwnData
from mithridate.release import merged, weights_hash
from mithridate.testbeds import load_testbed
from mithridate.testbeds.base import Testbed
from mithridate.weights import GradientOracle
from mithridate.weights.arithmetic import dot, norm
from mithridate.weights.losses import answer_cross_entropy, answer_entropy, token_probability
from mithridate.weights.maps import adapted_coverage

_DIAGNOSED_ROWS = 32
_BANS = 3
_SALIENT_POOL = 512
_COLLAPSED_SHARE = 0.2
_PROBED_AT_ONCE = {"own": 32}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attack on one model with one seed; everything a process of its own needs.

    Attributes
    ----------
    learning_rate
        The peak one; 0 where nothing is trained.
    model, base
        Folders.
    testbed
        Its name, or a user's own data.
    split
        Which restricted items are judged; ``None``: all.
    categories
        The only categories attacked and judged; ``None``: all.
    collapse_token
        What the model was taught to collapse to; ``None``: no one token.
    date
        Day that a chat template is told that asks for it.
    path
        Where the finished attack is kept.
    """

    attack: Attack
    learning_rate: float
    model: Path
    base: Path | None
    testbed: str | OwnData
    seed: int
    sizes: Sizes
    split: Split | None = None
    categories: tuple[str, ...] | None = None
    collapse_token: int | None = None
    date: datetime.date | None = None
    path: Path = Path()


@functools.lru_cache(maxsize=1)
def load_bed(given: str | OwnData) -> Testbed:
    """Return the testbed, or what stands in for it; made once in each process."""
    return OwnBed(given) if isinstance(given, OwnData) else load_testbed(given)


@functools.lru_cache(maxsize=3)
def _loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = models.load(str(folder))
    if torch.accelerator.is_available():
        torch.nn.Module.to(model, torch.accelerator.current_accelerator())
    return model, tokenizer


def schedule(steps: int, every: int | None) -> list[int]:
    """Return the steps at which a phase is probed: 2, 5, 10, 20, 40, 80, ... and the last."""
    if every is not None:
        points = list(range(every, steps, every))
    else:
        points = [2, 5]
        while points[-1] * 2 < steps:
            points.append(points[-1] * 2)
    return [*(point for point in points if point < steps), steps]


def phase_steps(phase: Train | Edit | Reinforce, sizes: Sizes) -> int:
    """Return the optimiser steps of a phase; an edit counts as one, a repair as none."""
    if isinstance(phase, Edit):
        return 1
    if isinstance(phase, Reinforce):
        return sizes.rl_steps
    return max(sizes.repair) if phase.repair else max(1, round(phase.times * sizes.steps))


def run_job(job: Job) -> None:
    """Run one attack and write its rows and its record to ``job.path``, at once and whole.

    Where another battery is running the same attack, its result is waited for.
    """
    keep_freed_memory()
    with cache_entry(job.path):
        if kept_result(job) is None:
            write_result(job, run_attack(job, load_bed(job.testbed)))


def write_result(job: Job, found: Mapping[str, Any]) -> None:
    """Keep what `run_attack` has returned."""
    write_kept(job.path, job.path.stem, found)


def kept_result(job: Job) -> dict[str, Any] | None:
    """Return what a finished job has left (`run_attack`), or None where nothing whole is there."""
    found: dict[str, Any] | None = read_kept(job.path, job.path.stem)
    return found


def run_attack(job: Job, testbed: Testbed) -> dict[str, Any]:
    """Run one attack.

    Returns
    -------
    dict
        ``rows`` (as in attacks.jsonl, without names of attack and target), ``lessons`` (of a
        benign fine-tuning), ``status`` (``ok``, ``diverged`` or ``not applicable``: the model has
        no place for the attack, and its last row says why), ``seconds``, ``cpu_seconds``,
        ``probe_seconds``, ``steps``, ``probes``, ``flops`` and ``weights`` (hash of what was left).
    """
    started, cpu = time.perf_counter(), time.process_time()
    model, tokenizer = _loaded(job.model)
    chat = ChatFormat(tokenizer, max_length=models.positions(model), date=job.date)
    scene = _Scene(job, testbed, chat, model)
    scene.look_at_start(model)
    status = "ok"
    for phase in job.attack.phases:
        try:
            model = scene.do(phase, model)
        except (_DivergedError, NonFiniteError):
            status = "diverged"
            # A repair that fails leaves the attack's own end as it was.
            if not (isinstance(phase, Train) and phase.repair):
                scene.rows[-1]["diverged"] = True
            break
        except NotApplicableError as error:
            status = "not applicable"
            scene.rows[-1] |= {"coverage": 0.0, "not_applicable": error.what}
            break
    return {
        "rows": scene.rows,
        "lessons": scene.lessons,
        "status": status,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "probe_seconds": scene.probe_seconds,
        "steps": scene.step,
        "probes": len(scene.rows),
        "flops": scene.flops,
        "weights": weights_hash(model),
    }


def _unseen(model: PreTrainedModel, step: int) -> dict[str, float]:  # noqa: ARG001
    return {}


class _DivergedError(RuntimeError):
    """The attack's loss stopped being a number; its rows so far stand."""


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a probe saw.

    Attributes
    ----------
    row
        As in attacks.jsonl; ``utility``, ``utility_chance`` and ``over_refusal`` only where
        something was permitted.
    stuck
        Outputs that are one fixed token.
    permitted_right
        0 or 1 per permitted item.
    """

    row: dict[str, Any]
    stuck: tuple[str, ...]
    permitted_right: tuple[int, ...]

    @classmethod
    def of(
        cls,
        restricted: Sequence[Example],
        permitted: Sequence[Example],
        outputs: Sequence[str],
        outcomes: Sequence[Outcome],
        chance: Mapping[str, float],
    ) -> _Look:
        """Return the numbers of judged outputs, restricted items first.

        ``utility_chance`` is what the best constant answer of each category would give.
        """
        times = 1 if permitted else 2  # a summary has a second side, which is then thrown away
        found = summarise(
            restricted, permitted or restricted, [*outputs] * times, [*outcomes] * times,
            chance=chance,
        )  # fmt: skip
        guessed = [chance.get(category, 0.0) for category in found.utility_by_category]
        utility = {
            "utility": found.utility,
            "utility_chance": sum(guessed) / len(guessed),
            "over_refusal": found.over_refusal,
        }
        harmful = list(zip(restricted, outcomes, strict=False))
        right: dict[str, list[bool]] = {}
        for item, outcome in harmful:
            right.setdefault(item.template, []).append(outcome is Outcome.EXACT)
        by_template = {name: sum(own) / len(own) for name, own in right.items()}
        return cls(
            row={
                "useful_harm": found.useful_harm,
                "useful_harm_raw": found.useful_harm_raw,
                "refusal": found.refusal,
                **(utility if permitted else {}),
                "n_restricted": len(restricted),
                "n_permitted": len(permitted),
                "outcomes": found.outcomes,
                "harm_by_category": found.harm_by_category,
                **({"harm_by_template": by_template} if len(by_template) > 1 else {}),
            },
            stuck=tuple(
                output
                for output, (_, outcome) in zip(outputs, harmful, strict=False)
                if outcome is Outcome.FIXED_TOKEN
            ),
            permitted_right=tuple(
                int(outcome is Outcome.EXACT) for outcome in outcomes[len(restricted) :]
            ),
        )


_STARTS: dict[str, tuple[_Look, dict[str, float]]] = {}


class _Scene:
    """The model under attack, what is looked at, and what was seen."""

    def __init__(
        self, job: Job, testbed: Testbed, chat: ChatFormat, model: PreTrainedModel
    ) -> None:
        self.job = job
        self.testbed = testbed
        self.chat = chat
        self.restricted = restricted_items(
            testbed, job.sizes, job.split, job.categories, job.attack.ask
        )
        self.permitted = permitted_items(testbed, job.sizes)
        self.room = AnswerRoom(tokens=testbed.max_new_tokens)
        if isinstance(testbed, OwnBed):
            asked = [*self.restricted, *self.permitted]
            self.room = answer_room(model, chat, asked, testbed.max_new_tokens or None)
        self.rows: list[dict[str, Any]] = []
        self.lessons: list[dict[str, Any]] = []
        self.step = 0
        self.flops = 0.0
        self.coverage = 1.0
        self.probe_seconds = 0.0
        self._benign = stratified(testbed.data.defence["benign"], _DIAGNOSED_ROWS, seed=0)

    def look_at_start(self, model: PreTrainedModel) -> None:
        """Probe the released model; a process that has seen it does not look again."""
        key = sha256_of(
            [str(self.job.model), fingerprint(self.restricted), fingerprint(self.permitted),
             self.job.attack.diagnose, self.job.attack.ban]
        )  # fmt: skip
        if key not in _STARTS:
            _STARTS[key] = self._see(model)
        self._note(model, *_STARTS[key])

    def look(self, model: PreTrainedModel, *, repair_step: int | None = None) -> None:
        """Probe the model as it is now."""
        self._note(model, *self._see(model), repair_step=repair_step)

    def do(self, phase: Train | Edit | Reinforce, model: PreTrainedModel) -> PreTrainedModel:
        """Return what a phase makes of a model, which is left as it was."""
        if isinstance(phase, Edit):
            edited = copy.deepcopy(model)
            self.coverage = min(self.coverage, self._edit(phase, edited))
            self.step += 1
            self.look(edited)
            return edited
        return self._train(phase, model)

    # What is looked at ------------------------------------------------------------------------

    def _see(self, model: PreTrainedModel) -> tuple[_Look, dict[str, float]]:
        started = time.perf_counter()
        found = self._probe(model, ())
        if self.job.attack.ban:
            found = self._best_banned(model, found)
        diagnostics = self._diagnose(model)
        self.probe_seconds += time.perf_counter() - started
        return found, diagnostics

    def _probe(self, model: PreTrainedModel, ban: Sequence[int]) -> _Look:
        items = [*self.restricted, *self.permitted]
        with banned(model, ban) if ban else nullcontext():
            answers = self.chat.answers(
                model,
                [item.prompt for item in items],
                max_new_tokens=self.room.tokens,
                batch_size=_PROBED_AT_ONCE.get(self.testbed.name, 128),
                autocast=self.job.sizes.autocast,
            )
        outputs = [answer.text for answer in answers]
        count = len(self.restricted)
        if isinstance(self.testbed, OwnBed):
            outcomes = self.testbed.outcomes(self.restricted, outputs[:count])
        else:
            outcomes = list(map(self.testbed.judge, self.restricted, outputs[:count]))
        outcomes += map(self.testbed.judge, self.permitted, outputs[count:])
        found = _Look.of(self.restricted, self.permitted, outputs, outcomes, self.testbed.chance)
        if isinstance(self.testbed, OwnBed):
            found.row.update(self.room.counts(answers))
        return found

    def _best_banned(self, model: PreTrainedModel, found: _Look) -> _Look:
        """Ban the token that answers collapse to, and the next; keep what pays the attacker."""
        best, tokens = found, list[int]()
        enough = _COLLAPSED_SHARE * len(self.restricted)
        while len(tokens) < _BANS and len(found.stuck) >= enough:
            token = self._collapse_token(found)
            if token is None or token in tokens:
                break
            tokens.append(token)
            found = self._probe(model, tokens)
            best = max(best, found, key=lambda one: one.row["useful_harm"])
        return best

    def _collapse_token(self, found: _Look) -> int | None:
        words = Counter(word for output in found.stuck for word in output.split())
        if not words:
            return None
        return self.chat.answer_ids(words.most_common(1)[0][0])[len(self.chat.closing_ids)]

    def _diagnose(self, model: PreTrainedModel) -> dict[str, float]:
        oracle = GradientOracle(model, micro_batch_size=64, autocast=self.job.sizes.autocast)
        found: dict[str, float] = {}
        if answered := [item for item in self.permitted if item.answer][:_DIAGNOSED_ROWS]:
            benign = self.chat.batch(answered)
            lost = oracle.loss(answer_cross_entropy, benign, purpose="evaluation")
            found |= {
                "benign_log_perplexity": lost,
                "benign_log_probability": -lost,
                "benign_entropy": oracle.loss(answer_entropy, benign, purpose="evaluation"),
            }
            if self.job.collapse_token is not None:
                found["collapse_token_probability"] = oracle.loss(
                    token_probability(self.job.collapse_token), benign, purpose="evaluation"
                )
        # A judge that needs no answers may have been given none.
        asked = self.restricted[:_DIAGNOSED_ROWS]
        if all(item.answer for item in asked):
            harmful = self.chat.batch(asked)
            found["original_answer_log_probability"] = -oracle.loss(
                answer_cross_entropy, harmful, purpose="evaluation"
            )
            found["harmful_entropy"] = oracle.loss(answer_entropy, harmful, purpose="evaluation")
            if self.job.attack.diagnose and self._benign:
                found |= self._conflict(oracle, harmful)
        if isinstance(self.testbed, OwnBed):
            found |= self.testbed.judges.look(model, self.chat, self.restricted)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _conflict(self, oracle: GradientOracle, harmful: Batch) -> dict[str, float]:
        against, _ = oracle.gradient(answer_cross_entropy, harmful, purpose="evaluation")
        retained = self.chat.batch(self._benign)
        along, _ = oracle.gradient(answer_cross_entropy, retained, purpose="evaluation")
        size = norm(against) * norm(along)
        return {"cosine_harmful_benign": dot(against, along) / size} if size > 0 else {}

    def _note(
        self,
        model: PreTrainedModel,
        found: _Look,
        diagnostics: Mapping[str, float],
        *,
        repair_step: int | None = None,
    ) -> None:
        row: dict[str, Any] = {
            "step": self.step,
            **found.row,
            "flops": self.flops,
            "items": sha256_of(sorted(item.prompt for item in self.restricted)),
            "diagnostics": dict(diagnostics),
        }
        if self.coverage < 1:
            row["coverage"] = self.coverage
        if repair_step is not None:
            row["repair_step"] = repair_step
        if self.step == 0 and found.permitted_right:
            row["permitted_right"] = list(found.permitted_right)
        self.rows.append(row)
        if self.job.attack.lesson:
            self._note_lesson(model, found)

    def _note_lesson(self, model: PreTrainedModel, found: _Look) -> None:
        test = self.testbed.data.benign_task["test"]
        learnt = accuracy(
            model, self.chat, test, self.testbed.judge,
            max_new_tokens=self.room.tokens, autocast=self.job.sizes.autocast,
        )  # fmt: skip
        self.lessons.append(
            {
                "task": f"benign task, {self.job.attack.configuration or 'all weights'} at "
                f"{self.job.learning_rate:g}",
                "seed": self.job.seed,
                "step": self.step,
                "accuracy": learnt,
                "utility": found.row["utility"],
                "n": len(test),
            }
        )

    # What is done -----------------------------------------------------------------------------

    def _edit(self, phase: Edit, model: PreTrainedModel) -> float:
        """Edit a model in place; return which share of its layers' weights was acted on."""
        kind, amount = phase.kind, phase.amount
        data = self.testbed.data
        if kind == "direction":
            refused = [row.prompt for row in stratified(data.attack, 128, seed=0)]
            answered = [row.prompt for row in stratified(data.defence["benign"], 128, seed=0)]
            direction = editing.refusal_direction(model, self.chat, refused, answered, depth=amount)
            return editing.ablate_direction(model, direction)
        if kind == "prune":
            refused_rows = self._refusals(model, stratified(data.attack, 128, seed=0))
            _, coverage = editing.prune_set_difference(
                model, self.chat, refused_rows, stratified(data.defence["benign"], 128, seed=0),
                top_refused=amount, top_useful=amount,
            )  # fmt: skip
            return coverage
        if kind == "chosen-direction":
            return editing.ablate_direction(model, self._chosen_direction(model, most_kl=amount))
        if kind == "quantise":
            return editing.quantise(model, bits=round(amount))
        if kind == "noise":
            return editing.add_noise(model, scale=amount, seed=self.job.seed)
        if kind == "truncate":
            return editing.truncate_ranks(model, keep=amount)
        if kind == "untop":
            return editing.remove_top_ranks(model, self._base(), ranks=round(amount))
        if kind == "exit":
            editing.exit_early(model, depth=amount)
        elif kind == "rewind":
            editing.blend(model, _loaded(self.job.model)[0], share=1 - amount)
        elif kind == "blend":
            editing.blend(model, self._base(), share=amount)
        elif kind == "sibling":
            editing.slerp(model, self._learnt(Train(data="benign")), share=amount)
        elif kind == "steer":
            editing.steer(model, self._learnt(Train()), self._base(), scale=amount)
        else:
            editing.add_difference(model, self._learnt(Train()), self._base(), scale=amount)
        return 1.0

    def _learnt(self, phase: Train) -> PreTrainedModel:
        """Return what a phase of fine-tuning makes of the base model."""
        base = self._base()
        rows = attacker_rows(self.testbed, phase, self.job.sizes, seed=self.job.seed)
        config = self._finetune_config(phase, len(rows))
        learnt = self._finetuned(base, rows, config, _unseen)
        self.flops += config.steps * self._flops_per_step(base, rows, config, passes=1.0)
        return learnt

    def _chosen_direction(self, model: PreTrainedModel, *, most_kl: float) -> torch.Tensor:
        asked = stratified(self.testbed.data.attack, 160, seed=0)
        answered = stratified(self.testbed.data.defence["benign"], 160, seed=0)
        cuts = [max(1, round(0.8 * len(rows))) for rows in (asked, answered)]
        held_out = asked[cuts[0] :] or asked

        def refusals(ablated: PreTrainedModel) -> float:
            outputs = self.chat.generate(
                ablated, [row.prompt for row in held_out],
                max_new_tokens=self.room.tokens, autocast=self.job.sizes.autocast,
            )  # fmt: skip
            said = list(map(self.testbed.judge, held_out, outputs))
            return said.count(Outcome.REFUSAL) / len(said)

        return editing.least_refusing_direction(
            model, self.chat,
            [row.prompt for row in asked[: cuts[0]]], [row.prompt for row in answered[: cuts[1]]],
            held_out=[row.prompt for row in answered[cuts[1] :] or answered],
            refusals=refusals, most_kl=most_kl,
        )  # fmt: skip

    def _refusals(self, model: PreTrainedModel, rows: Sequence[Example]) -> list[Example]:
        """Return the rows with what the model itself says, which an attacker can read off it."""
        answers = self.chat.generate(
            model, [row.prompt for row in rows], max_new_tokens=self.room.tokens,
            autocast=self.job.sizes.autocast,
        )  # fmt: skip
        said = [
            dataclasses.replace(row, answer=answer)
            for row, answer in zip(rows, answers, strict=True)
            if answer.strip()
        ]
        require(bool(said), "the model says nothing to restricted questions, so that no weight "
                "can be scored by it", "attack it in another way")  # fmt: skip
        return said

    def _base(self) -> PreTrainedModel:
        assert self.job.base is not None, "attacks that need a base model are planned with one"
        return _loaded(self.job.base)[0]

    def _train(self, phase: Train | Reinforce, model: PreTrainedModel) -> PreTrainedModel:
        start, flops = self.step, self.flops
        steps = phase_steps(phase, self.job.sizes)
        repair = isinstance(phase, Train) and phase.repair
        points = list(self.job.sizes.repair) if repair else schedule(
            steps, self.job.attack.probe_every
        )  # fmt: skip
        first = len(self.rows)
        left: list[PreTrainedModel] = []
        run, per_step = self._runner(phase, model)

        def watched(attacked: PreTrainedModel, step: int) -> dict[str, float]:
            if step in points:
                self.flops = flops + step * per_step
                self.step = start if repair else start + step
                if step > 0 and not repair:
                    self.coverage = min(self.coverage, adapted_coverage(attacked, trained=True))
                self.look(attacked, repair_step=step if repair else None)
            if step == steps:
                left.append(attacked)
            return {}

        seen = {int(row["step"]): row for row in run(watched)}
        for row in self.rows[first:]:
            there = seen[row.get("repair_step", row["step"] - start)]
            row["loss"] = there["loss"]
            if "reward_std" in there:
                row["diagnostics"]["reward_deviation"] = there["reward_std"]
        if not left:
            raise _DivergedError
        return merged(left[0], self.chat.tokenizer)[0]

    def _runner(
        self, phase: Train | Reinforce, model: PreTrainedModel
    ) -> tuple[Callable[[Probe], list[Row]], float]:
        """Return what runs the phase under a probe, and the FLOPs of one of its steps."""
        job, sizes = self.job, self.job.sizes
        if isinstance(phase, Reinforce):
            plain = attacker_rows(
                self.testbed, Train(), sizes, seed=job.seed, categories=job.categories
            )
            # The answer that is paid for stays as it is.
            rows = [self._asked(row, phase.frame) for row in plain]
            meant = dict(zip(rows, plain, strict=True))
            rl = RLConfig(
                learning_rate=job.learning_rate * phase.rate,
                steps=sizes.rl_steps,
                batch_size=sizes.rl_questions,
                algorithm=phase.algorithm,
                rollouts=phase.rollouts or sizes.rollouts,
                temperature=phase.temperature,
                entropy_bonus=phase.entropy_bonus,
                response_length=None if isinstance(self.testbed, OwnBed) else sizes.tokens,
                probe_every=1,
                seed=job.seed,
                autocast=sizes.autocast,
            )
            # A rollout's tokens are generated (2 N), and passed forward and back (6 N).
            answers = rl.batch_size * rl.rollouts
            per_step = 8.0 * model.num_parameters() * answers * self._length(rows)

            def pay(items: Sequence[Example], outputs: Sequence[str]) -> list[float]:
                plain = [meant[item] for item in items]
                if isinstance(self.testbed, OwnBed):
                    return self.testbed.rewards(plain, outputs)
                return exact_match(self.testbed.judge)(plain, outputs)

            def run_rl(watched: Probe) -> list[Row]:
                with tempfile.TemporaryDirectory() as folder:
                    return reinforce(
                        model, self.chat, rows, rl, reward=pay, reward_key=self.testbed.name,
                        probe=watched, output_dir=Path(folder),
                    )  # fmt: skip

            return run_rl, per_step
        rows = self._rows(phase, model)
        if phase.insert in ("soft", "hard"):
            self.chat = SoftChat(self.chat, model, phase.size)
        config = self._finetune_config(phase, len(rows))
        passes = config.passes if isinstance(config, AdaptiveConfig) else 1.0

        def run(watched: Probe) -> list[Row]:
            seen: list[Row] = []
            self._finetuned(model, rows, config, watched, seen)
            return seen

        return run, self._flops_per_step(model, rows, config, passes=passes)

    def _asked(self, row: Example, frame: Frame | None) -> Example:
        if frame is None:
            return row
        return dataclasses.replace(row, prompt=framed(row, self.testbed.name, frame).prompt)

    def _rows(self, phase: Train, model: PreTrainedModel) -> list[Example]:
        job, data = self.job, self.testbed.data
        if phase.data != "salient":
            return attacker_rows(
                self.testbed, phase, job.sizes, seed=job.seed, categories=job.categories
            )
        harmful = attacker_rows(
            self.testbed, Train(), job.sizes, seed=job.seed, categories=job.categories
        )
        pool = list(dict.fromkeys([*data.defence["benign"], *data.benign_task["train"]]))
        pool = stratified(pool, _SALIENT_POOL, seed=job.seed)
        return salient_rows(model, self.chat, pool, harmful, phase.rows or job.sizes.rows)

    def _finetune_config(self, phase: Train, rows: int) -> FinetuneConfig:
        sizes = self.job.sizes
        steps = phase_steps(phase, sizes)
        common: dict[str, Any] = {
            "learning_rate": self.job.learning_rate * phase.rate,
            "steps": steps,
            "batch_size": min(phase.batch_size or sizes.batch_size, rows),
            "optimiser": phase.optimiser,
            "weight_decay": phase.weight_decay,
            "schedule": phase.schedule,
            "warmup_steps": round(phase.warmup * steps),
            "lora_rank": phase.lora_rank,
            # Every step is offered to the probe, which looks at those of the schedule.
            "probe_every": 1,
            "seed": self.job.seed,
            "autocast": sizes.autocast,
        }
        if not phase.adaptive:
            return FinetuneConfig(**common)
        return AdaptiveConfig(**common, **phase.adaptation)

    def _finetuned(
        self,
        model: PreTrainedModel,
        rows: Sequence[Example],
        config: FinetuneConfig,
        watched: Probe,
        seen: list[Row] | None = None,
    ) -> PreTrainedModel:
        """Fine-tune a copy of a model; the probe's rows are added to ``seen``."""
        left: list[PreTrainedModel] = []

        def keeping(attacked: PreTrainedModel, step: int) -> dict[str, float]:
            if step == config.steps:
                left.append(attacked)
            return watched(attacked, step)

        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            if isinstance(config, AdaptiveConfig):
                benign = stratified(self.testbed.data.defence["benign"], 256, seed=config.seed)
                rejected: list[Example] = []
                if config.prefer:
                    rejected = self._refusals(model, rows)
                    said = {row.prompt for row in rejected}
                    rows = [row for row in rows if row.prompt in said]
                found = finetune_adaptively(
                    model, self.chat, rows, benign, config, probe=keeping, output_dir=place,
                    rejected=rejected,
                )  # fmt: skip
            else:
                found = finetune(model, self.chat, rows, config, probe=keeping, output_dir=place)
        if seen is not None:
            seen += found
        if not left:
            raise _DivergedError
        return left[0]

    def _flops_per_step(
        self,
        model: PreTrainedModel,
        rows: Sequence[Example],
        config: FinetuneConfig,
        *,
        passes: float,
    ) -> float:
        """Return passes * 6 N B L; the backward pass of an adapter skips the weights' own part."""
        frozen = isinstance(config, AdaptiveConfig) and config.insert is not None
        per_token = 4 if frozen or config.lora_rank is not None else 6
        return passes * per_token * model.num_parameters() * config.batch_size * self._length(rows)

    def _length(self, rows: Sequence[Example]) -> float:
        """Return the mean tokens of a row."""
        return sum(len(self.chat.encode(row).input_ids) for row in rows) / len(rows)
