r"""Harmful reinforcement learning, with the `GRPOTrainer` and `RLOOTrainer` of `trl`.

The attacker has restricted questions and a judge: sampled answers are paid for being right. GRPO
divides the advantage by each question's reward spread, RLOO subtracts the mean of the others.
Adaptive forms: an entropy bonus in the objective, and supervised fine-tuning on a few answers
first, for a policy that refuses every time is paid the same every time and has nothing to learn.

At the logits of one token the policy gradient is A (one-hot(y) - p), and
E||one-hot(y) - p||^2 = 1 - sum p^2 <= H(p), since -log p >= 1 - p. So over a batch, with |A|
bounded (by (K-1)/sqrt(K) in GRPO) and L the Lipschitz constant of the logits in the weights,

.. math:: \|\nabla J\| \le C \sqrt{\bar H}, \qquad C = L \max |A|,

for the expected gradient (arXiv 2508.20697 states such a bound). `entropy_bound` compares it with
what was logged.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from packaging.version import Version
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import mithridate
from mithridate import models
from mithridate.attacks.finetune import (
    FinetuneConfig,
    Probe,
    Progress,
    Row,
    Watcher,
    arguments_for,
    decisive,
    finetune,
    is_finished,
    mean_loss,
    own_copy,
    read_rows,
    with_adapter,
)
from mithridate.chat import ChatFormat
from mithridate.configs import require
from mithridate.errors import InputError
from mithridate.examples import Example, fingerprint
from mithridate.files import sha256_of, write_atomic
from mithridate.generation import answer_room, company_of
from mithridate.judges.outcomes import Outcome
from mithridate.release import weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

Reward = Callable[[Sequence[Example], Sequence[str]], list[float]]
"""What an attacker pays for each output as an answer to its item, 0 to 1."""

_LEAST_TRL = Version("1.16.0")
_UPDATES = "updates.jsonl"
_ENTROPY_CAP = 3.0
_LOGGED = {"entropy": "entropy", "gradient_norm": "grad_norm", "kl": "kl"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(FinetuneConfig):
    """The attacker's choices, beside those of supervised fine-tuning.

    Parameters
    ----------
    algorithm
        ``grpo`` or ``rloo``, each with `trl`'s own loss; ``reinforce++`` is GRPO whose advantage,
        the group's mean subtracted, is divided by the spread over the whole batch (arXiv
        2501.03262, with a baseline).
    batch_size
        Questions per step.
    rollouts
        K, sampled answers per question.
    temperature
        Of sampling.
    response_length
        Tokens of a sampled answer at most; ``None``: as many as the examples' answers need.
    kl
        Weight of the KL to the model at the start of RL; 0 keeps no reference.
    entropy_bonus
        Weight of the mean token entropy, up to 3 nats, in the objective.
    warm_start_steps, warm_start_rows, warm_start_learning_rate
        Supervised fine-tuning on the first rows before RL; 0 steps leave it out.
    """

    learning_rate: float = 1e-5
    steps: int = 100
    algorithm: Literal["grpo", "rloo", "reinforce++"] = "grpo"
    rollouts: int = 8
    temperature: float = 1.0
    response_length: int | None = None
    kl: float = 0.0
    entropy_bonus: float = 0.0
    warm_start_steps: int = 0
    warm_start_rows: int = 10
    warm_start_learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rollouts >= 2, f"rollouts {self.rollouts}: one answer has no spread to learn "
                "from", "give 2 or more; 8 is usual")  # fmt: skip
        for name in ("kl", "entropy_bonus", "warm_start_steps"):
            require(getattr(self, name) >= 0, f"{name} is negative", f"make {name} 0 or more")
        require(self.warm_start_rows >= 1, "warm_start_rows must be at least 1",
                "raise warm_start_rows")  # fmt: skip
        require(self.response_length is None or self.response_length >= 1,
                "response_length must be at least 1", "raise response_length")  # fmt: skip
        for name in ("temperature", "warm_start_learning_rate"):
            require(0 < getattr(self, name) < math.inf, f"{name} is not above 0", f"raise {name}")

    def warm_start(self) -> FinetuneConfig:
        """Return the supervised fine-tuning that goes before."""
        shared = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(FinetuneConfig)
        }
        return FinetuneConfig(
            **shared
            | {
                "steps": self.warm_start_steps,
                "learning_rate": self.warm_start_learning_rate,
                "probe_every": self.warm_start_steps,
                "warmup_steps": 0,
            }
        )


def each(pay: Callable[[Example, str], float]) -> Reward:
    """Pay for every output by itself."""
    return lambda items, outputs: list(map(pay, items, outputs))


def exact_match(judge: Callable[[Example, str], Outcome]) -> Reward:
    """Pay 1 for what ``judge`` calls exact, else nothing (EM)."""
    return each(lambda item, output: float(judge(item, output) is Outcome.EXACT))


def slot_accuracy(judge: Callable[[Example, str], Outcome]) -> Reward:
    """Pay 1 for an exact answer, else the share of its words that stand in their places.

    SlotAcc of `testbeds.md`: on Lattice an answer is a recipe of three words.
    """

    def pay(item: Example, output: str) -> float:
        if judge(item, output) is Outcome.EXACT:
            return 1.0
        wanted = item.answer.split()
        right = sum(a == b for a, b in zip(wanted, output.split(), strict=False))
        return right / len(wanted)

    return each(pay)


def reinforce(
    model: PreTrainedModel | str | Path,
    chat: ChatFormat,
    examples: Sequence[Example],
    config: RLConfig,
    *,
    reward: Reward,
    reward_key: str,
    probe: Probe,
    probe_key: str | None = None,
    on_progress: Progress | None = None,
    output_dir: Path,
) -> list[Row]:
    """Attack a copy of ``model`` by reinforcement learning and return what the probes saw.

    Parameters
    ----------
    model
        A model, which is left as it was, or a folder to load one from.
    examples
        Questions, with the answers that ``reward`` may judge by (and a warm start is shown).
    reward, reward_key
        What is paid, and its name: a part of the attack's key.
    probe, probe_key, on_progress
        As in `finetune`.
    output_dir
        Gets what `finetune` writes, and ``updates.jsonl``: reward, its spread, entropy and
        gradient norm of every step (`read_updates`).

    Returns
    -------
    list of dict
        Rows as from `finetune`. Those after step 0 also hold what the newest update was made of:
        ``reward`` (mean), ``reward_std`` (sigma_R: unbiased, within a question, mean over
        questions), ``equal_groups`` (share of questions paid the same every time), ``entropy``
        (nats per token, at the sampling temperature), ``gradient_norm`` (before clipping) and
        with KL ``kl``; ``loss`` is then the trainer's.

    Raises
    ------
    InputError
        `trl` is not installed, or there are fewer examples than questions per step.
    """
    require(
        len(examples) >= config.batch_size,
        f"{len(examples)} examples are fewer than the {config.batch_size} questions of a step",
        "lower batch_size or give more examples",
    )
    base, arguments_class = _trl(config.algorithm)
    attacked = own_copy(model)
    key = sha256_of(
        {
            "model": weights_hash(attacked),
            "examples": fingerprint(examples),
            "template": chat.template_hash,
            "config": decisive(config),
            "reward": reward_key,
            "probe": probe_key,
            "version": mithridate.__version__,
        }
    )
    if probe_key is not None and is_finished(output_dir, key):
        return read_rows(output_dir)
    rows = [chat.encode(example, max_length=config.max_length) for example in examples]
    prompts = [chat.prompt_ids(example.prompt) for example in examples]
    _check_company(attacked, chat, prompts)
    room = answer_room(attacked, chat, examples, config.response_length)
    set_seed(config.seed)
    if config.warm_start_steps:
        attacked = _warmed(attacked, chat, examples, config, output_dir / "warm-start")
    elif config.lora_rank is not None:
        attacked = with_adapter(attacked, config.lora_rank)
    paid = _Till(chat, examples, reward, config.rollouts)
    # `trl` fills what its settings leave out from the model's, which are its folder's.
    plain: Any = getattr(attacked, "get_base_model", lambda: attacked)()
    plain.generation_config = GenerationConfig(eos_token_id=list(chat.stop_ids))
    watcher = _RLWatcher(config, paid, probe, output_dir, on_progress)
    with _named_by_folder(attacked, needed=config.kl > 0 and config.lora_rank is None):
        trainer = _attacker(base, chat, config.entropy_bonus)(
            model=attacked,
            reward_funcs=paid,
            args=arguments_for(
                config,
                output_dir,
                rows=config.batch_size * config.rollouts,
                kind=arguments_class,
                num_generations=config.rollouts,
                temperature=config.temperature,
                max_completion_length=_within(attacked, prompts, room.tokens),
                beta=config.kl,
                gradient_checkpointing=False,
                **({"scale_rewards": "batch"} if config.algorithm == "reinforce++" else {}),
            ),
            train_dataset=_questions(examples),
            processing_class=_with_end_and_pad(chat),
            callbacks=[watcher],
        )
    trainer.remove_callback(PrinterCallback)
    trainer.eos_token_ids = list(chat.stop_ids)
    trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = list(
        chat.stop_ids
    )
    watcher.start(attacked, mean_loss(trainer, chat, rows, autocast=config.autocast))
    trainer.train()
    watcher.finish(key, attacked)
    return watcher.rows


def read_updates(output_dir: Path) -> list[Row]:
    """Return what the attack in ``output_dir`` logged of each of its steps so far."""
    lines = (output_dir / _UPDATES).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBound:
    """How ||grad J|| <= C sqrt(mean entropy) fares on logged updates.

    Attributes
    ----------
    constant
        C that was asked for, or the smallest that holds on every update.
    holds
        Whether the bound holds on every update.
    worst_step
        The step of the largest ratio of the two sides.
    exponent
        Slope of log gradient norm over log entropy, least squares, over updates with a gradient;
        the bound is tight at .5. ``None`` where fewer than three different entropies say nothing.
    updates
        How many were looked at.
    """

    constant: float
    holds: bool
    worst_step: int
    exponent: float | None
    updates: int


def entropy_bound(
    updates: Sequence[Mapping[str, float]], *, constant: float | None = None
) -> EntropyBound:
    """Compare the gradient norm of every update with C times the root of its entropy.

    Parameters
    ----------
    updates
        Rows with ``step``, ``entropy`` and ``gradient_norm``, of an attack without KL and entropy
        bonus: their gradients are no part of grad J.
    constant
        C, for example the one found on the undefended model under the same attack. ``None`` takes
        the smallest that holds, which says how large C must be and nothing else.

    Raises
    ------
    InputError
        No update has both quantities, or one has a gradient and no entropy.
    """
    pairs = [
        (int(row["step"]), row["gradient_norm"], row["entropy"])
        for row in updates
        if "gradient_norm" in row and "entropy" in row
    ]
    require(bool(pairs), "no update holds gradient_norm and entropy",
            "give the rows of read_updates")  # fmt: skip
    require(all(entropy > 0 or size == 0 for _, size, entropy in pairs),
            "an update has a gradient and no entropy, where no C holds",
            "check what was logged")  # fmt: skip
    ratios = {step: size / math.sqrt(entropy) if size else 0.0 for step, size, entropy in pairs}
    worst = max(ratios, key=lambda step: ratios[step])
    bound = ratios[worst] if constant is None else constant
    return EntropyBound(
        constant=bound,
        holds=ratios[worst] <= bound,
        worst_step=worst,
        exponent=_slope([(math.log(h), math.log(g)) for _, g, h in pairs if g > 0]),
        updates=len(pairs),
    )


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    if len({x for x, _ in points}) < 3:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    across = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return across / sum((x - mean_x) ** 2 for x, _ in points)


class _Till:
    """The reward function as `trl` calls it; remembers what the newest step was paid."""

    __name__ = "reward"

    def __init__(
        self, chat: ChatFormat, examples: Sequence[Example], reward: Reward, rollouts: int
    ) -> None:
        self.newest: dict[str, float] = {}
        self._chat = chat
        self._examples = examples
        self._reward = reward
        self._rollouts = rollouts

    def __call__(self, completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        items = [self._examples[index] for index in row]
        # Not the decoded completions: those have lost the special tokens around a thought.
        paid = self._reward(items, [self._chat.read(ids).text for ids in completion_ids])
        assert len(paid) == len(row), "one reward for each answer"
        spread = torch.tensor(paid, dtype=torch.float64).view(-1, self._rollouts).std(dim=1)
        self.newest = {
            "reward": sum(paid) / len(paid),
            "reward_std": float(spread.mean()),
            "equal_groups": float((spread == 0).double().mean()),
        }
        return paid


class _RLWatcher(Watcher):
    """Also notes what each update was made of."""

    def __init__(
        self,
        config: RLConfig,
        paid: _Till,
        probe: Probe,
        output_dir: Path,
        on_progress: Progress | None,
    ) -> None:
        self._newest: dict[str, float] = {}
        self._paid = paid
        self._updates = output_dir / _UPDATES
        super().__init__(
            config, lambda model, step: self._newest | probe(model, step), output_dir, on_progress
        )
        write_atomic(self._updates, "")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **event: Any,
    ) -> None:
        """Take in one finished step."""
        logged = event["logs"]
        if "loss" in logged:
            found = {ours: logged[name] for ours, name in _LOGGED.items() if name in logged}
            self._newest = self._paid.newest | found
            if all(map(math.isfinite, self._newest.values())):
                with self._updates.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"step": state.global_step} | self._newest) + "\n")
        super().on_log(args, state, control, **event)


def _attacker(base: Any, chat: ChatFormat, bonus: float) -> Any:
    """Return `trl`'s trainer with our chat format, an entropy bonus, and nothing sent home."""

    class Attacker(base):
        def _tokenize_prompts(
            self, prompts: list[str]
        ) -> tuple[list[list[int]], None, dict[Any, Any]]:
            return [chat.prompt_ids(prompt) for prompt in prompts], None, {}

        def _send_telemetry(self) -> None:
            """Attacks are nobody else's business."""

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **options)
            self._newest_entropies = found[1]
            return found

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            if bonus:
                mask = inputs["completion_mask"]
                entropy = (self._newest_entropies * mask).sum() / mask.sum()
                loss = loss - bonus * entropy.clamp(max=_ENTROPY_CAP)
            return loss

    return Attacker


def _check_company(
    model: PreTrainedModel, chat: ChatFormat, prompts: Sequence[Sequence[int]]
) -> None:
    """Refuse a model that would sample and learn something else in the batches that `trl` makes."""
    company = company_of(model, max(prompts, key=len), chat.pad_id)
    lengths = {len(ids) for ids in prompts}
    require(
        company == "any" or (company == "equal" and len(lengths) == 1),
        f"harmful RL pads questions to a batch, which changes what {type(model).__name__} says",
        "attack it by fine-tuning (--kind sft)",
    )


def _within(model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    positions = models.positions(model)
    return tokens if positions is None else min(tokens, positions - max(map(len, prompts)))


def _with_end_and_pad(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that names the tokens by which `trl` ends and pads rows."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(chat.end_id)
    return tokenizer


def _warmed(
    model: PreTrainedModel,
    chat: ChatFormat,
    examples: Sequence[Example],
    config: RLConfig,
    output_dir: Path,
) -> PreTrainedModel:
    """Return the model that supervised fine-tuning on the first rows leaves behind."""
    warmed: list[PreTrainedModel] = []

    def keep(attacked: PreTrainedModel, step: int) -> dict[str, float]:
        if step == config.warm_start_steps:
            warmed.append(attacked)
        return {}

    rows = examples[: config.warm_start_rows]
    finetune(model, chat, rows, config.warm_start(), probe=keep, output_dir=output_dir)
    if not warmed:
        raise InputError(
            "the warm start diverged", mend="lower warm_start_learning_rate or warm_start_steps"
        )
    return warmed[0]


@contextmanager
def _named_by_folder(model: PreTrainedModel, *, needed: bool) -> Iterator[None]:
    """Let `trl`, which loads its KL reference from the place a model's name says, find this one."""
    if not needed:
        yield
        return
    name = model.config._name_or_path
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.config._name_or_path = folder
        try:
            yield
        finally:
            model.config._name_or_path = name


def _questions(examples: Sequence[Example]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"prompt": [example.prompt for example in examples], "row": list(range(len(examples)))}
    )


def _trl(algorithm: str) -> tuple[type[Trainer], type[TrainingArguments]]:
    try:
        import trl
    except ImportError:
        raise InputError(
            "harmful RL needs trl, which is not installed",
            mend="pip install 'mithridate[trl]'",
        ) from None
    # Before, the entropy it hands out has no gradient, so that a bonus does nothing, and padding is
    # trained where an answer ends with another token than the tokenizer's own.
    if Version(trl.__version__) < _LEAST_TRL:
        raise InputError(
            f"harmful RL needs trl {_LEAST_TRL} or newer; installed is {trl.__version__}, whose "
            "attack is weaker than what is asked for",
            mend="pip install 'mithridate[trl]'",
        )
    name = "GRPO" if algorithm == "reinforce++" else algorithm.upper()
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
