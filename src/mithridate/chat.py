"""Chat: from examples to token ids with a label mask on the answers, and back to text."""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.files import sha256_of
from mithridate.generation import batches, generate_ids, left_padded
from mithridate.printable import printable
from mithridate.templates import PLAIN_ANSWER, PLAIN_PROMPT, ChatTemplate, place_of
from mithridate.thinking import MARKERS, final_answer, mentions_thoughts, open_thought

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE = -100
"""The label of a position that carries no loss."""

_PROBE = "mithridate"
# Some tokenizers put a space before the first word of a text.
_BEFORE = (".", "x", "\n")
# Words with and without what tokenizers join to a space or a line end before them.
_ANSWERS = ("Paris", "the", "42", "I am", "ünd", "'s")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example, the answer with its end-of-turn token from ``answer_start``."""

    input_ids: list[int]
    answer_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model answers.

    Attributes
    ----------
    text
        Without thinking, special tokens and outer whitespace; empty where the thought has no end.
    cut
        No end-of-turn or end-of-text token: it is longer than what was generated.
    unfinished
        It ends within a thought.
    """

    text: str
    cut: bool
    unfinished: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of equal padded length; every tensor is int64 of shape (rows, length).

    Parameters
    ----------
    input_ids
        Token ids; padding holds an arbitrary id.
    attention_mask
        1 on tokens, 0 on padding.
    labels
        The id on the tokens of the answer and its end-of-turn token, `IGNORE` elsewhere.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        """Return the rows ``start`` to ``stop`` (exclusive), as views of the same length."""
        part = slice(start, stop)
        return Batch(self.input_ids[part], self.attention_mask[part], self.labels[part])

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )

    def trimmed(self) -> Batch:
        """Return the batch without the columns that are padding in every row."""
        used = self.attention_mask.any(dim=0)
        return Batch(self.input_ids[:, used], self.attention_mask[:, used], self.labels[:, used])

    @property
    def label_count(self) -> int:
        """The number of positions whose next token carries a loss."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """The number of tokens that are not padding."""
        return int(self.attention_mask.sum())


class ChatFormat:
    r"""One tokenizer with its chat template: the only place that turns text into token ids.

    A conversation is tokenised as one text, as its template writes it, up to the end-of-turn token
    after the answer; what a template writes behind that (ChatML: a line end) is left out. The ids
    of a prompt begin those of the conversation and are those that generation starts from; where
    the tokenizer joins the first letters of an answer to the template's text before it, they are
    tokenised apart. Text that spells a control token is tokenised as the characters it is made of.

    A tokenizer without a template gets the plain form ``Question: {prompt}\nAnswer: {answer}``
    and its end-of-text token, with a warning.

    Parameters
    ----------
    tokenizer
        Any `transformers` tokenizer.
    system
        System turn put before every prompt; ``None`` leaves it to the template.
    max_length
        Tokens per encoded example, where a call gives none of its own.
    arguments
        Given to the template (``enable_thinking``, ...); ``chat_template`` names one of several.
    date
        Day that a template is told that asks for it; ``None`` takes today.

    Attributes
    ----------
    date
        That day, or ``None`` where the template does not ask.
    template_hash
        Names the template and what it writes around a prompt and its answer, arguments, system
        turn and date included.

    Raises
    ------
    InputError
        Where the template cannot be rendered, changes, drops or repeats texts, begins an answer
        otherwise in a conversation than for generation, or no end-of-turn token can be found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_length: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.max_length = max_length
        self.arguments = dict(arguments or {})
        template = ChatTemplate(tokenizer, system=system, arguments=self.arguments, date=date)
        self.templated = template.named
        self.date = template.date
        if not self.templated:
            warnings.warn(
                "the tokenizer has no chat template: using the plain form "
                f"{PLAIN_PROMPT + PLAIN_ANSWER!r}",
                stacklevel=2,
            )
        if template.warning:
            warnings.warn(template.warning, stacklevel=2)
        self._template = template
        frame = template.frame
        self.end_id, self._end = self._find_end(frame.tail)
        if not self._end and frame.tail.strip():
            warnings.warn(
                f"the chat template ends an answer with {printable(repr(frame.tail), limit=80)}, "
                "in which the tokenizer has no token for it: answers end with "
                f"{printable(repr(str(tokenizer.eos_token)), limit=40)}",
                stacklevel=2,
            )
        self._control = self._control_tokens(frame.head + frame.opening + frame.tail)
        self._opening, self._lead = self._boundary()
        self.template_hash = sha256_of(
            {
                "template": template.source,
                "system": system,
                "arguments": self.arguments,
                "rendered": [frame.head, self._opening, self._lead, self._end, frame.tail],
            }
        )
        eos = tokenizer.eos_token_id
        self.stop_ids = sorted({self.end_id} | ({eos} if eos is not None else set()))
        # Padding is masked by attention, so any id will do; the tokenizer's own may be missing,
        # or lie outside the model's embedding.
        self.pad_id = self.end_id

    def prompt_text(self, prompt: str) -> str:
        """Return the prompt as the model sees it, up to where the answer begins.

        Raises
        ------
        InputError
            The template writes this prompt otherwise than others.
        """
        return self._around(self._template.prompt(prompt))

    def opened_text(self, turns: Sequence[Mapping[str, str]]) -> str:
        """Return a longer conversation as the model sees it, up to where its answer begins."""
        text = self._template.opened(turns)
        return text.removesuffix(self._template.frame.opening) + self._opening

    def prompt_ids(self, prompt: str, *, max_length: int | None = None) -> list[int]:
        """Return the token ids of `prompt_text`, those generation starts from.

        Parameters
        ----------
        max_length
            Most tokens; a longer prompt loses its beginning, the template's words around it stay.

        Raises
        ------
        InputError
            The template writes this prompt otherwise than others, or leaves no room for it.
        """
        ids = self._ids_of_prompt(self._template.prompt(prompt))
        return ids if max_length is None else self._cut(ids, max_length, place_of(prompt))

    def answer_ids(self, answer: str, *, end: bool = True) -> list[int]:
        """Return the token ids of ``answer``; the end-of-turn token is the last.

        Parameters
        ----------
        end
            ``False`` leaves out the end-of-turn token and what the template writes before it.
        """
        return self._parts(_PROBE, answer, end=end)[1]

    @property
    def closing_ids(self) -> list[int]:
        """What the ids of every answer begin with to end the thought that a prompt leaves open."""
        return self._tokenise(self._lead) if self.opened else []

    def length(self, example: Example) -> tuple[int, int]:
        """Return how many tokens prompt and answer have, with nothing cut; 0 without an answer.

        Raises
        ------
        InputError
            As `encode` does.
        """
        if not example.answer:
            content = self._template.prompt(example.prompt, where=_place_of(example))
            return len(self._ids_of_prompt(content)), 0
        whole = self._encoded(example)
        return whole.answer_start, len(whole.input_ids) - whole.answer_start

    def encode(self, example: Example, *, max_length: int | None = None) -> Encoded:
        """Encode one example; where it is too long, the prompt loses its beginning.

        The template's words around the prompt are kept.

        Raises
        ------
        InputError
            Where the answer holds no token, or does not fit in ``max_length`` tokens together
            with the template's and one of the prompt, or where the template writes this example
            otherwise than others.
        """
        max_length = self.max_length if max_length is None else max_length
        whole = self._encoded(example)
        if max_length is None or len(whole.input_ids) <= max_length:
            return whole
        prompt = whole.input_ids[: whole.answer_start]
        answer = whole.input_ids[whole.answer_start :]
        room = max_length - len(answer)
        if room < 1:
            raise InputError(
                f"an answer of {len(answer)} tokens does not fit in max_length {max_length}",
                where=_place_of(example),
                mend="raise max_length or shorten the answer",
            )
        prompt = self._cut(prompt, room, _place_of(example))
        return Encoded(prompt + answer, len(prompt))

    def collate(
        self, encoded: Sequence[Encoded], *, padding_side: Literal["left", "right"] = "right"
    ) -> Batch:
        """Pad to the longest row and build the label mask."""
        assert encoded, "a batch needs a row"
        lengths = [len(item.input_ids) for item in encoded]
        shape = (len(encoded), max(lengths))
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE)
        for row, (item, length) in enumerate(zip(encoded, lengths, strict=True)):
            first = 0 if padding_side == "right" else shape[1] - length
            ids = torch.tensor(item.input_ids)
            input_ids[row, first : first + length] = ids
            attention_mask[row, first : first + length] = 1
            start = item.answer_start
            labels[row, first + start : first + length] = ids[start:]
        return Batch(input_ids, attention_mask, labels)

    def batch(self, examples: Sequence[Example], *, max_length: int | None = None) -> Batch:
        """Encode and collate ``examples``, padded on the right for training."""
        return self.collate([self.encode(item, max_length=max_length) for item in examples])

    def prompt_batch(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``attention_mask`` of the prompts, padded on the left."""
        return left_padded([self.prompt_ids(prompt) for prompt in prompts], self.pad_id)

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 64,
        autocast: bool = False,
    ) -> list[str]:
        """Return the texts of `answers`."""
        found = self.answers(
            model, prompts,
            max_new_tokens=max_new_tokens, batch_size=batch_size, autocast=autocast,
        )  # fmt: skip
        return [answer.text for answer in found]

    def answers(
        self,
        model: PreTrainedModel,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 64,
        autocast: bool = False,
    ) -> list[Answer]:
        """Answer each prompt greedily, up to the end-of-turn or end-of-text token.

        Only the stop tokens, the token limit and the highest logit decide: no generation setting
        stored with the model is used.

        Parameters
        ----------
        model
            Run in evaluation mode and left as it was.
        max_new_tokens
            Of an answer, thinking included; no more than the model has positions for.
        batch_size
            Prompts per batch; answers may change in rounding with it, so it belongs in results.
        autocast
            Run in bfloat16 autocast.

        Returns
        -------
        list of Answer
            In the order of ``prompts``.

        Raises
        ------
        InputError
            A prompt fills all positions that the model has.
        """
        device = next(model.parameters()).device
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        ids = [self.prompt_ids(prompts[index]) for index in order]
        found: dict[int, Answer] = {}
        with torch.autocast(device.type, torch.bfloat16, autocast):
            for places, room in batches(
                model, ids, size=batch_size, max_new_tokens=max_new_tokens, pad_id=self.pad_id
            ):
                written = generate_ids(
                    model, [ids[place] for place in places],
                    max_new_tokens=room, stop_ids=self.stop_ids, pad_id=self.pad_id,
                )  # fmt: skip
                for place, answer in zip(places, written, strict=True):
                    found[order[place]] = self.read(answer)
        return [found[index] for index in range(len(prompts))]

    def read(self, ids: Sequence[int]) -> Answer:
        """Return what generated ``ids`` answer, up to their first stop token."""
        length = next((n for n, token in enumerate(ids) if token in self.stop_ids), len(ids))
        cut = length == len(ids)
        left_out, marks = self._specials
        said = [token for token in ids[:length] if token not in left_out]
        answer = final_answer(
            self.opened + str(self.tokenizer.decode(said, clean_up_tokenization_spaces=False))
        )
        text = answer or ""
        for mark in marks:
            text = text.replace(mark, "")
        return Answer(text=text.strip(), cut=cut, unfinished=answer is None)

    @cached_property
    def thinks(self) -> bool:
        """Whether the template is that of a model that thinks before it answers."""
        if open_thought(self._opening):
            return True
        return mentions_thoughts(self._template.source) and not mentions_thoughts(self._opening)

    @cached_property
    def opened(self) -> str:
        """What opens the thought that every answer begins within; empty where none does."""
        return open_thought(self._opening)

    @cached_property
    def _specials(self) -> tuple[set[int], list[str]]:
        """Special tokens that are never text: ids that are left out, and marks of thinking."""
        known = self.tokenizer.added_tokens_decoder
        special = {number: token.content for number, token in known.items() if token.special}
        special |= dict(
            zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        )
        marks = {
            number: text
            for number, text in special.items()
            if any(text in marker for marker in MARKERS)
        }
        return special.keys() - marks.keys(), list(marks.values())

    def _encoded(self, example: Example) -> Encoded:
        prompt, answer = list[int](), list[int]()
        if example.answer.strip():
            where = _place_of(example)
            prompt, answer = self._parts(example.prompt, example.answer, where=where)
        if len(answer) <= max(1, len(self._tokenise(self._end))):
            raise InputError(
                "an example has no answer to learn",
                where=_place_of(example),
                mend="give it an answer that the tokenizer knows, or remove it",
            )
        return Encoded(prompt + answer, len(prompt))

    def _around(self, content: str) -> str:
        """Return the text of a prompt as its template has written it."""
        return f"{self._template.frame.head}{content}{self._opening}"

    def _ids_of_prompt(self, content: str) -> list[int]:
        text = self._around(content)
        first = len(self._template.frame.head)
        return self._start_ids() + self._tokenise(text, (first, first + len(content)))

    def _parts(
        self, prompt: str, answer: str, *, end: bool = True, where: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids of prompt and answer."""
        content, written = self._template.conversation(prompt, answer, where=where)
        asked = self._ids_of_prompt(content)
        text, first = self._around(content), len(self._template.frame.head)
        told = f"{self._lead}{written}{self._end if end else ''}"
        begin, stop = len(self._lead), len(self._lead + written)
        spans = (first, first + len(content)), (len(text) + begin, len(text) + stop)
        whole = self._start_ids() + self._tokenise(text + told, *spans)
        if whole[: len(asked)] == asked:
            ids = whole[len(asked) :]
        else:
            ids = self._apart(told, (begin, stop))
        return asked, [*ids, self.end_id] if end and not self._end else ids

    def _apart(self, text: str, content: tuple[int, int]) -> list[int]:
        """Return the ids of ``text`` behind something that it is not joined to."""
        for before in _BEFORE:
            start = self._tokenise(before)
            span = content[0] + len(before), content[1] + len(before)
            whole = self._tokenise(before + text, span)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._tokenise(text, content)

    def _boundary(self) -> tuple[str, str]:
        """Return what ends a prompt, and the space of the template that an answer begins with.

        Most tokenizers join a space to the word behind it: a prompt that ended with one would not
        begin the conversation that was trained.
        """
        opening, lead = self._template.frame.opening, self._template.frame.lead
        bare = opening.rstrip(" ")
        choices = [(opening, lead), (bare, opening[len(bare) :] + lead)]
        if lead.isspace():
            choices.insert(1, (opening + lead, ""))
        return next((one for one in choices if self._begins(*one)), choices[0])

    def _begins(self, opening: str, lead: str) -> bool:
        text = f"{self._template.frame.head}{_PROBE}{opening}"
        asked = self._tokenise(text)
        return all(
            self._tokenise(f"{text}{lead}{answer}{self._end}")[: len(asked)] == asked
            for answer in _ANSWERS
        )

    def _cut(self, ids: list[int], max_length: int, where: str) -> list[int]:
        """Return a prompt's ids without the first of its content, as many as are too many."""
        if len(ids) <= max_length:
            return ids
        head = self._start_ids() + self._tokenise(self._template.frame.head)
        first = _shared(head, ids)
        last = _shared(self._tokenise(self._opening)[::-1], ids[::-1])
        room = max_length - first - last
        if room < 1:
            raise InputError(
                f"the chat template's {first + last} tokens around a prompt leave no room for one "
                f"in {max_length}",
                where=where,
                mend="raise max_length or shorten the answer",
            )
        return ids[:first] + ids[len(ids) - last - room :]

    def _control_tokens(self, frame: str) -> re.Pattern[str]:
        """Return a pattern of the texts that the tokenizer reads as control tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {str(token) for token in added if token.special or str(token) in frame}
        texts = sorted((text for text in special if len(text.strip()) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def _tokenise(self, text: str, *contents: tuple[int, int]) -> list[int]:
        """Return the ids of ``text``; no control tokens from what stands in ``contents``."""
        ids: list[int] = []
        done = 0
        for start, stop in contents:
            for match in self._control.finditer(text, start, stop):
                # No tokenizer finds the token across the cut.
                ids += self._tokenise(text[done : match.start() + 1])
                done = match.start() + 1
        return ids + list(self.tokenizer(text[done:], add_special_tokens=False)["input_ids"])

    def _start_ids(self) -> list[int]:
        """Return the beginning-of-text token where this tokenizer puts one before plain text."""
        if self.templated:
            return []
        start = self.tokenizer.bos_token_id
        ids = self.tokenizer(_PROBE)["input_ids"]
        return [start] if start is not None and ids[:1] == [start] else []

    def _find_end(self, tail: str) -> tuple[int, str]:
        """Return the end-of-turn token, and the template's text up to it; empty if not in it."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for token in self.tokenizer(tail.strip(), add_special_tokens=False)["input_ids"]:
            # The unknown token is special too, but no template writes it.
            text = str(self.tokenizer.convert_ids_to_tokens(token))
            if token in special and text in tail:
                return token, tail[: tail.index(text) + len(text)]
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise InputError(
                "neither the chat template nor the tokenizer names an end-of-turn token",
                where="tokenizer",
                mend="set tokenizer.eos_token or give it a chat template that ends each turn",
            )
        return end, ""


def _place_of(example: Example) -> str:
    return example.place or place_of(example.prompt)


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many ids both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
