"""lm-evaluation-harness: the only place that imports it. Offline, and no code of a model's runs."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedModel

from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.generation import THOUGHT_TOKENS, company_of
from mithridate.templates import PLAIN_PROMPT
from mithridate.thinking import final_answer
from mithridate.utility.choosing import Task

_ASKED = "What is the capital of France?"


def check_installed() -> str:
    """Return the harness's version.

    Raises
    ------
    InputError
        It is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "lm-evaluation-harness is not installed here",
            mend="pip install 'mithridate[eval]'",
        )
    return version("lm_eval")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task as the harness asks it.

    Attributes
    ----------
    metrics
        Its metrics; the first is the one that counts.
    chance
        Accuracy of guessing: the testbed's own; of the best constant answer where all items have
        the same choices or none; of a blind choice where each item has choices of its own.
    """

    task: Task
    ready: Any
    metrics: tuple[str, ...]
    chance: float


@dataclass(kw_only=True)
class Scores:
    """What some items scored.

    Attributes
    ----------
    right
        By metric, for each item in order, 1 or 0.
    truncated
        Of each portion asked at once, the requests whose beginning was cut because the model
        reads no further.
    """

    right: dict[str, list[int]] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)


def open_task(task: Task, *, plain: bool) -> Asked:
    """Return the task as the harness asks it; nothing is downloaded.

    Parameters
    ----------
    plain
        Prompts are sent without a chat template.

    Raises
    ------
    InputError
        The harness does not understand the task file, or a row lacks what the task reads.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = dict(task.config)
    if plain and "process_results" in config:
        config["doc_to_text"] = PLAIN_PROMPT.replace("{prompt}", "{{prompt}}")
    config["metadata"] = None  # it would be handed to the function below
    where = task.where.get(task.split, task.name)
    try:
        with _quiet():
            data = {split: Dataset.from_list(rows) for split, rows in task.splits.items()}
            ready = ConfigurableTask(config={**config, "custom_dataset": lambda: data})
            metrics = tuple(ready.aggregation())
            guessed = _chance(ready, data[task.split], where)
    except InputError:
        raise
    except (
        jinja2.TemplateError,
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        SyntaxError,
    ) as error:
        raise InputError(
            f"the harness cannot ask the task {task.name!r}: {_told(error)}",
            where=where,
            mend="every row needs the fields that the task file's doc_to_ lines read, in the same "
            "form; docs/utility.md lists those of our tasks",
        ) from error
    return Asked(
        task=task,
        ready=ready,
        metrics=metrics,
        chance=guessed if task.chance is None else task.chance,
    )


def wrap(model: PreTrainedModel, chat: ChatFormat, *, batch_size: int) -> Any:
    """Return the model as the harness sees it; greedy, whatever its folder says of sampling.

    Thinking is taken out of what it writes. Where padding or a batch changes what the model says,
    it is asked one thing at a time.
    """
    from lm_eval.models.huggingface import HFLM

    class Answering(HFLM):
        def generate_until(self, *args: Any, **options: Any) -> list[str]:
            written = super().generate_until(*args, **options)
            return [final_answer(chat.opened + text) or "" for text in written]

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Write prompts as training does, where the harness leaves the answer to the model."""
            if not add_generation_prompt:
                return str(super().apply_chat_template(chat_history, add_generation_prompt=False))
            try:
                return chat.opened_text(chat_history)
            except InputError:
                # So does the harness where a template has no system turn.
                rest = [turn for turn in chat_history if turn["role"] != "system"]
                if len(rest) == len(chat_history):
                    raise
                return chat.opened_text(rest)

    alone = company_of(model, chat.prompt_ids(_ASKED), chat.pad_id) != "any"
    kept = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=getattr(kept, "bos_token_id", None),
        eos_token_id=list(chat.stop_ids),
        pad_token_id=chat.pad_id,
    )

    with _quiet():
        return Answering(
            pretrained=model,
            tokenizer=chat.tokenizer,
            backend="causal",
            batch_size=1 if alone else batch_size,
            trust_remote_code=False,
        )


def score(lm: Any, asked: Asked, chat: ChatFormat, first: int, last: int, *, plain: bool) -> Scores:
    """Let the model answer the task's items from ``first`` to ``last`` (exclusive).

    Raises
    ------
    InputError
        The model reads too few tokens for the task, or its first metric is no accuracy.
    """
    from lm_eval.evaluator import evaluate

    ready, split = asked.ready, asked.task.split
    whole = ready.dataset
    # The harness can choose items too, but goes through all rows each time.
    ready.dataset = {**whole, split: whole[split].select(range(first, last))}
    if ready.OUTPUT_TYPE == "generate_until":
        end = chat.tokenizer.decode([chat.end_id])
        given = asked.task.config.get("generation_kwargs") or {}
        until = given.get("until") or []
        room = given.get("max_gen_toks", lm.max_gen_toks)
        if chat.thinks and not plain:
            room += THOUGHT_TOKENS
        ready.set_config(
            "generation_kwargs", {"until": [*until, end], "max_gen_toks": room}, update=True
        )
    ready.set_fewshot_seed(first)
    try:
        with _quiet() as heard:
            found: Any = evaluate(
                lm,
                {"tasks": {asked.task.name: ready}},
                bootstrap_iters=0,
                apply_chat_template=not plain,
                fewshot_as_multiturn=True,
            )
    except AssertionError as error:
        # So the harness says that an answer is longer than what the model reads.
        raise InputError(
            f"the harness cannot ask the task {asked.task.name!r} of this model: {_told(error)}",
            mend="leave the task out, or lower max_gen_toks in a copy of its file; what other "
            "tasks scored is kept",
        ) from error
    finally:
        ready.dataset = whole
    scores = Scores(truncated=[heard.truncated])
    samples = found["samples"][asked.task.name]
    # A task with several ways of reading an answer is judged by its first.
    samples = [one for one in samples if one["filter"] == samples[0]["filter"]]
    for metric in asked.metrics:
        values = [one.get(metric) for one in samples]
        if all(isinstance(value, int | float) and value in (0, 1) for value in values):
            scores.right[metric] = [int(value) for value in values]
    if asked.metrics[0] not in scores.right:
        raise InputError(
            f"the first metric of the task {asked.task.name!r}, {asked.metrics[0]}, does not say "
            "right or wrong of each item",
            mend="put acc, acc_norm or exact_match first in its metric_list",
        )
    return scores


def _chance(ready: Any, rows: Sequence[Mapping[str, Any]], where: str) -> float:
    options, answers = [], []
    for number, row in enumerate(rows, start=1):
        target = ready.doc_to_target(row)
        known = tuple(ready.doc_to_choice(row)) if ready.config.doc_to_choice else ()
        right = target in known if isinstance(target, str) else 0 <= target < len(known)
        if known and not right:
            raise InputError(
                f"the right answer {str(target)[:40]!r} is none of the {len(known)} choices",
                where=f"{where}: row {number}",
                mend="correct the row's label",
            )
        options.append(known)
        answers.append(str(target))
    if len(set(options)) > 1:
        return sum(1 / len(known) for known in options) / len(options)
    return max(Counter(answers).values()) / len(answers)


class _Heard(logging.Handler):
    """Takes the harness's warnings, and counts those of requests that were cut."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.truncated = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.truncated += "truncat" in record.getMessage().lower()


@contextlib.contextmanager
def _quiet() -> Iterator[_Heard]:
    """Keep the harness from drawing bars of its own for every few items."""
    logger, heard = logging.getLogger("lm_eval"), _Heard()
    before = logger.propagate
    logger.addHandler(heard)
    logger.propagate = False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield heard
    finally:
        logger.removeHandler(heard)
        logger.propagate = before


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
