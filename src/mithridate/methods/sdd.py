r"""SDD: answer harmful prompts with fluent text about something else.

Self-Degraded Defense, arXiv 2507.21182 (ACL 2025). The objective is plain supervised fine-tuning,

.. math:: L(\theta) = \ell(\theta; \{(x, y_o)\}), \qquad \cos(\mathrm{emb}\,x, \mathrm{emb}\,y_o)
          \le \tau,

with x a harmful prompt and y_o a high-quality answer; the work is the pairing, done once before
training.

==================== ============================== ============================================
paper / port         here                           why
==================== ============================== ============================================
pairing              `pair`                         drawn evenly over categories, deterministic
tau, tries           ``threshold``, ``max_draws``   0.25 and 50 are the port's; the paper's are
                                                    not established
answers pooled       ``source_weights="even"``      pooling lets 52k Alpaca rows swamp 1k LIMA
                                                    rows; ``"pooled"`` reproduces it
SDD_reject's prefix  ``prefix``                     off by default
dedup of prompts     always, before pairing         promised by the port, absent from it
a pair per prompt    ``pairs`` pairs, prompts       8,000 pairs, as the port trains on, are more
                     repeat with other answers      than most sets have prompts
bf16 weights         refused                        lr 5e-7 moves 1 % of bf16 weights (P1)
==================== ============================== ============================================

The official code is not obtainable; facts are from a third-party port (`methods.md` §3).
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal

from mithridate.chat import Encoded
from mithridate.configs import Count, Limit
from mithridate.embeddings import MINILM, load_encoder
from mithridate.errors import InactiveTermError, InputError
from mithridate.examples import Example, fingerprint, normalise_prompt
from mithridate.files import write_json
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.weights.losses import answer_cross_entropy

Cosine = Annotated[float, Limit("-1 to 1", lambda x: -1 <= x <= 1)]


@dataclass(frozen=True, kw_only=True)
class SDDConfig(MethodConfig):
    """Options of SDD.

    Parameters
    ----------
    batch_size
        Pairs per step.
    pairs
        Pairs made before training; prompts repeat, with other answers, when there are fewer.
    threshold
        tau: highest cosine between prompt and answer.
    max_draws
        Answers tried per prompt; then the least similar one seen is kept and counted.
    encoder
        A name for `mithridate.embeddings.load_encoder`.
    source_weights
        Draw answers evenly over their sources, or pooled.
    prefix
        Put before every answer (SDD_reject: a refusal sentence).
    """

    batch_size: Count = 24
    pairs: Count = 8000
    threshold: Cosine = 0.25
    max_draws: Count = 50
    encoder: str = MINILM
    source_weights: Literal["even", "pooled"] = "even"
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with an irrelevant answer: rows of the two streams, their cosine, answers tried."""

    prompt: int
    answer: int
    cosine: float
    draws: int


def pair(
    prompts: Sequence[Example], answers: Sequence[Example], config: SDDConfig, *, seed: int
) -> list[Pair]:
    """Pair prompts, drawn evenly over categories, with answers about something else."""
    rng = random.Random(f"{seed}/sdd")
    first: dict[str, int] = {}
    for row, example in enumerate(prompts):
        first.setdefault(normalise_prompt(example.prompt), row)
    by_category = _grouped([prompts[row].category for row in first.values()], [*first.values()])
    sources = [example.source if config.source_weights == "even" else "" for example in answers]
    by_source = _grouped(sources, range(len(answers)))
    encode = load_encoder(config.encoder)
    vectors = encode([e.prompt for e in prompts] + [e.answer for e in answers])
    for rows in by_category:
        rng.shuffle(rows)

    def draw(prompt: int) -> Pair:
        best: Pair | None = None
        for number in range(1, config.max_draws + 1):
            answer = rng.choice(rng.choice(by_source))
            cosine = float(vectors[prompt] @ vectors[len(prompts) + answer])
            if best is None or cosine < best.cosine:
                best = Pair(prompt, answer, cosine, number)
            if cosine <= config.threshold:
                break
        assert best is not None
        return replace(best, draws=number)

    pairs = []
    for number in range(config.pairs):
        turn, category = divmod(number, len(by_category))
        rows = by_category[category]
        pairs.append(draw(rows[turn % len(rows)]))
    return pairs


class SDD(Method):
    """min l(weights; harmful prompts with irrelevant answers)."""

    name = "sdd"
    paper = "arXiv 2507.21182"
    summary = "Teaches fluent, irrelevant answers to harmful prompts."
    defends = "supervised fine-tuning that shares the defence's chat template"
    limits = "an author of a port could not replicate it; benign steps can repair it"
    config_class: ClassVar[type[MethodConfig]] = SDDConfig
    spaces = ("full", "lora")
    passes_per_step = 1
    parameter_buffers = 0

    def __init__(self, config: SDDConfig) -> None:
        self.config = config
        self.pairs: list[Pair] = []
        self._rows: list[Encoded] = []

    @property
    def streams(self) -> tuple[str, ...]:
        return ("prompts", "general")

    @property
    def active_terms(self) -> tuple[str, ...]:
        return ("irrelevant",)

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Pair prompts with answers; ``pairs.json`` in the run folder holds rows and cosines."""
        prompts, answers = (context.examples[name] for name in self.streams)
        _check_texts(prompts, answers)
        started = time.perf_counter()
        self.pairs = pair(prompts, answers, self.config, seed=context.seed)
        seconds = time.perf_counter() - started
        self._rows = [
            context.chat.encode(
                replace(prompts[p.prompt], answer=self.config.prefix + answers[p.answer].answer)
            )
            for p in self.pairs
        ]
        asked = {row: len(context.chat.prompt_ids(prompts[row].prompt)) for row in
                 {p.prompt for p in self.pairs}}  # fmt: skip
        cut = sum(
            row.answer_start < asked[p.prompt]
            for row, p in zip(self._rows, self.pairs, strict=True)
        )
        if cut:
            warnings.warn(
                f"SDD: the prompts of {cut} of {len(self.pairs)} pairs are cut to "
                f"{context.chat.max_length} tokens with their answers: raise training.max_length",
                stacklevel=2,
            )
        above = sum(p.cosine > self.config.threshold for p in self.pairs)
        if context.output_dir is not None:
            record = {
                "encoder": self.config.encoder,
                "threshold": self.config.threshold,
                "above_threshold": above,
                "prompts_sha256": fingerprint(prompts),
                "answers_sha256": fingerprint(answers),
                "pairs": [asdict(p) for p in self.pairs],
            }
            write_json(context.output_dir / "pairs.json", record)
        return {
            "pairs": float(len(self.pairs)),
            "pairs_above_threshold": float(above),
            "pairs_cut": float(cut),
            "pairs_mean_cosine": sum(p.cosine for p in self.pairs) / len(self.pairs),
            "pairing_seconds": seconds,
        }

    def step(self, context: RunContext) -> dict[str, float]:
        if not self._rows:
            raise InactiveTermError("SDD has no pairs: prepare() was not called")
        rows = context.rows_of_step(len(self._rows), self.config.batch_size, "sdd")
        batch = context.chat.collate([self._rows[row] for row in rows])
        return {
            "irrelevant": context.oracle.accumulate(
                answer_cross_entropy, batch, purpose="irrelevant"
            )
        }


def _grouped(keys: Sequence[str], rows: Sequence[int]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for key, row in zip(keys, rows, strict=True):
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]


def _check_texts(prompts: Sequence[Example], answers: Sequence[Example]) -> None:
    for stream, texts in (
        ("prompts", [example.prompt for example in prompts]),
        ("general", [example.answer for example in answers]),
    ):
        if not texts:
            raise InputError("the stream is empty", where=stream, mend="give it examples")
        for row, text in enumerate(texts, start=1):
            place = f"{stream}, row {row}"
            if not text.strip():
                raise InputError("the text is empty", where=place, mend="remove the row")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise InputError("not valid UTF-8", where=place, mend="mend the text") from None
