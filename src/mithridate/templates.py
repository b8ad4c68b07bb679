"""Chat templates: what a tokenizer's template writes around a prompt and its answer, checked."""

from __future__ import annotations

import datetime
import hashlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mithridate.errors import InputError
from mithridate.printable import printable
from mithridate.thinking import close_thought, final_answer, open_thought

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_PROMPT = "Question: {prompt}\nAnswer:"
PLAIN_ANSWER = " {answer}"

_PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}"
    + PLAIN_PROMPT.replace("{prompt}", "{{ m['content'] }}")
    + "{% else %}"
    + PLAIN_ANSWER.replace("{answer}", "{{ m['content'] }}")
    + "{% endif %}{% endfor %}"
)
# What `apply_chat_template` and the templates are given by us.
_OURS = {
    "messages", "tools", "documents", "add_generation_prompt", "conversation", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip
_DATE = "mithridate_date"
_DIRECTIVES = "aAwdbBmyYHIMSfpjUWcxXGuVFDeTzZ"
# A template's clock is the run's: its own would change the prompts of a run that goes on tomorrow.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set d = namespace(text=format) -%}"
    f"{{%- for code, text in {_DATE} -%}}{{%- set d.text = d.text | replace(code, text) -%}}"
    "{%- endfor -%}{{ d.text }}{%- endmacro %}\n"
)
_LONGEST_SECONDS = 5.0
_LONGEST_TEXT = 1_000_000
_MOST_KIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around every prompt and answer.

    Attributes
    ----------
    head
        Before the prompt.
    generation
        After a prompt that is to be answered.
    between
        Between prompt and answer.
    opening
        After the prompt, in training and in generation.
    lead
        Before an answer, to be learnt with it: the template's white space, or what closes the
        thought that ``opening`` leaves open.
    tail
        After the answer.
    """

    head: str
    generation: str
    between: str
    opening: str
    lead: str
    tail: str


class ChatTemplate:
    """A tokenizer's template, of which two renderings are known to agree.

    The rendering of a whole conversation must begin with that of its prompt, so that what is
    trained is what answers in use. What only the whole rendering has before the answer (an empty
    thought, a channel, the header where there is no generation prompt) ends every prompt. Where
    the generation prompt opens a thought, prompts do, and an answer to learn begins by closing it.
    Any other difference is refused.

    Parameters
    ----------
    system
        System turn put before every prompt; ``None`` leaves it to the template.
    arguments
        Given to the template; ``chat_template`` names one of several.
    date
        Day that the template is told; ``None`` takes today.

    Attributes
    ----------
    named
        Whether the tokenizer has a template; the plain form stands in for one that is missing.
    date
        Day that the template is told, at 00:00; ``None`` where it does not ask.
    warning
        How prompts differ from the template's own, in words.

    Raises
    ------
    InputError
        The template fails, changes, repeats or drops a text, or its renderings disagree.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None,
        arguments: Mapping[str, Any],
        date: datetime.date | None,
    ) -> None:
        self._tokenizer = tokenizer
        self.system = system
        self.arguments = dict(arguments)
        self.named = tokenizer.chat_template is not None
        self.source = _source(tokenizer, self.arguments.get("chat_template"))
        self._given = {
            name: value for name, value in self.arguments.items() if name != "chat_template"
        }
        _check_arguments(self._given, self.source)
        self.date: datetime.date | None = None
        self._text = self.source
        if "strftime_now" in self.source:
            self.date = date or datetime.date.today()
            self._text = _CLOCK + self.source
            clock = datetime.datetime.combine(self.date, datetime.time())
            days = [
                [f"%-{code}", clock.strftime(f"%{code}").lstrip("0") or "0"] for code in "dmjHI"
            ]
            days += [[f"%{code}", clock.strftime(f"%{code}")] for code in _DIRECTIVES]
            self._given[_DATE] = days
        self.parts = False
        self.warning: str | None = None
        self._watch: _Watch | None = _Watch()
        self.frame = self._frame()
        self._watch = None

    def prompt(self, prompt: str, *, where: str | None = None) -> str:
        """Return the prompt as the template writes it: as it is, or stripped.

        Parameters
        ----------
        where
            How a message names it; by default by its hash.

        Raises
        ------
        InputError
            The template writes something else around this prompt than around others.
        """
        text = self._render([("user", prompt)], generation=True)
        written = _inside(text, self.frame.head, prompt, self.frame.generation)
        if written is None:
            raise _otherwise("this prompt", where or place_of(prompt))
        return written

    def conversation(
        self, prompt: str, answer: str, *, where: str | None = None
    ) -> tuple[str, str]:
        """Return prompt and answer as the template writes them; raises as `prompt` does."""
        written, frame = self.prompt(prompt, where=where), self.frame
        text = self._render([("user", prompt), ("assistant", answer)], generation=False)
        head = f"{frame.head}{written}{frame.between}"
        if (told := _inside(text, head, answer, frame.tail)) is None:
            raise _otherwise("this prompt or its answer", where or place_of(prompt))
        return written, told

    def opened(self, turns: Sequence[Mapping[str, str]]) -> str:
        """Return a longer conversation as the model sees it, up to where its answer begins."""
        text = self._render([(turn["role"], turn["content"]) for turn in turns], generation=True)
        if not text.endswith(self.frame.generation):
            raise _otherwise("a longer conversation", place_of(turns[-1]["content"]))
        return text[: len(text) - len(self.frame.generation)] + self.frame.opening

    def _frame(self) -> Frame:
        try:
            return self._frame_of_texts()
        except InputError as error:
            # Some templates walk a list of parts and find nothing in a plain text.
            self.parts = True
            try:
                return self._frame_of_texts()
            except InputError:
                raise error from None

    def _frame_of_texts(self) -> Frame:
        frames = []
        for prompt, answer in _probes(self.source + (self.system or "") + repr(self.arguments)):
            asked = self._render([("user", prompt)], generation=True)
            told = self._render([("user", prompt), ("assistant", answer)], generation=False)
            for name, text, rendered in (
                ("prompt", prompt, asked), ("prompt", prompt, told), ("answer", answer, told),
            ):  # fmt: skip
                if (found := rendered.count(text)) != 1:
                    what = f"writes the {name} {found} times"
                    raise _unusable(what if found else f"changes or drops the {name}")
            head, _, rest = told.partition(prompt)
            between, found_answer, tail = rest.partition(answer)
            before, _, generation = asked.partition(prompt)
            if not found_answer:
                raise _unusable("writes the answer before the prompt")
            if before != head:
                raise _unusable("writes a prompt otherwise where its answer follows")
            ignored = asked == self._render([("user", prompt)], generation=False)
            frames.append((head, generation, between, tail, ignored))
        if len(set(frames)) > 1:
            raise _unusable("writes different texts around different prompts")
        head, generation, between, tail, ignored = frames[0]
        opening, lead, self.warning = _opening(generation, between)
        if self.warning and ignored:
            self.warning = (
                f"the chat template ignores add_generation_prompt: prompts end with "
                f"{_shown(opening)}, as its whole conversations do"
            )
        return Frame(head, generation, between, opening, lead, tail)

    def _render(self, turns: list[tuple[str, str]], *, generation: bool) -> str:
        if self.system is not None:
            turns = [("system", self.system), *turns]
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}
            for role, text in turns
        ]
        try:
            with self._watch or nullcontext():
                text = self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._text,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self._given,
                )
        # A template is a program of somebody else's: it may raise anything.
        except Exception as error:
            reason = printable(str(error).strip() or type(error).__name__, limit=160)
            raise InputError(
                f"the chat template refuses a conversation: {reason}",
                where="tokenizer",
                mend=("leave out the system turn, or " if self.system is not None else "")
                + "give the tokenizer another chat template",
            ) from None
        if len(text) > _LONGEST_TEXT + sum(len(part) for _, part in turns):
            raise _unusable(f"writes {len(text)} characters around a conversation")
        return str(text)


def day(value: str | datetime.date) -> datetime.date:
    """Return the day that ``value`` names as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(str(value)[:10])
    except ValueError:
        raise InputError(
            f"{printable(str(value), limit=40)} is no day",
            where="template_date",
            mend="write YYYY-MM-DD",
        ) from None


def place_of(prompt: str) -> str:
    """Return how a message names an example without quoting it."""
    digest = hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:12]
    return f"the example whose prompt has SHA-256 {digest}…"


def _source(tokenizer: PreTrainedTokenizerBase, name: Any) -> str:
    given: Any = tokenizer.chat_template
    if given is None:
        given = _PLAIN
    where, names = "tokenizer", ""
    if isinstance(given, Mapping):
        names = printable(", ".join(map(str, sorted(given))), limit=120)
        if name is None and "default" not in given:
            raise InputError(
                f"the chat templates are {names}, and none is the default",
                where=where,
                mend="name one of them: template_arguments: {chat_template: NAME}",
            )
        if name is not None and name not in given:
            raise InputError(
                f"there is no chat template {printable(repr(name), limit=60)}",
                where="template_arguments: chat_template",
                mend=f"name one of {names}",
            )
        given = given["default" if name is None else name]
    elif name is not None:
        raise InputError(
            "the tokenizer has not several chat templates to choose from",
            where="template_arguments: chat_template",
            mend="leave it out",
        )
    if given == "":
        raise _unusable("is empty")
    if not isinstance(given, str):
        raise InputError(
            f"the chat template is {type(given).__name__}, not text",
            where=where,
            mend="give the tokenizer another chat template",
        )
    return given


def _check_arguments(arguments: Mapping[str, Any], source: str) -> None:
    for name in arguments:
        known = isinstance(name, str) and name not in _OURS
        if not known or not re.search(rf"\b{re.escape(name)}\b", source):
            raise InputError(
                f"the chat template takes no {printable(repr(name), limit=60)}",
                where="template_arguments",
                mend="correct the name or leave it out",
            )


def _probes(avoid: str) -> tuple[tuple[str, str], ...]:
    """Return two conversations of words that occur nowhere in ``avoid``."""
    word = "Kf"
    while word in avoid:
        word += "f"
    return (
        (f"What is {word}1?", f"It is {word}2."),
        (f"Two lines:\nwhich {word}3, 'a' & \"b\" <c>?", f"Those,\nperhaps {word}4."),
    )


def _opening(generation: str, between: str) -> tuple[str, str, str | None]:
    """Return what ends a prompt and what begins an answer, and how the template's own differ."""
    begins = between.startswith(generation)
    if thought := open_thought(generation):
        before, _, inside = generation.rpartition(thought)
        before, close = before.rstrip(), close_thought(thought)
        if close is None or inside.strip() or not between.startswith(before):
            raise _unusable(f"begins an answer within a thought, {_shown(generation)}")
        own = between[len(before) :].lstrip().removeprefix(thought)
        if begins:
            own = between.removeprefix(generation)
        elif not own.lstrip().startswith(close):
            own = f"{inside}{close}" + ("\n\n" if inside else "") + own.lstrip()
        if open_thought(generation + own):
            raise _unusable(f"never ends the thought that it opens with {_shown(generation)}")
        return (
            generation,
            own,
            (
                "the generation prompt of the chat template opens a thought: what is learnt begins "
                f"with {_shown(own)}, the thought left empty"
            ),
        )
    if open_thought(between):
        raise _unusable(f"begins an answer within a thought, {_shown(between)}")
    if begins:
        extra = between.removeprefix(generation)
        if not extra.strip():
            return generation, extra, None
        return (
            between,
            "",
            (
                f"the chat template writes {_shown(extra)} before an answer, which its generation "
                "prompt leaves out: prompts end with it here, in training and in generation"
            ),
        )
    same = 0
    while generation[same : same + 1] == between[same : same + 1] != "":
        same += 1
    added, own = generation[same:], between[same:]
    if own.strip() == "" and (added.strip() == "" or final_answer(added) == ""):
        return (
            generation,
            "",
            (
                f"prompts end with {_shown(generation)}, the template's generation prompt; "
                f"its whole conversations have {_shown(between)} there"
            ),
        )
    raise _unusable(
        f"ends a prompt with {_shown(generation)}, and writes {_shown(between)} before an answer"
    )


def _inside(text: str, head: str, content: str, tail: str) -> str | None:
    """Return what stands between head and tail, if that is the content, stripped or not."""
    inside = text[len(head) : len(text) - len(tail)]
    same = inside.strip() == content.strip() and inside in content
    return inside if same and text == head + inside + tail else None


def _unusable(what: str) -> InputError:
    return InputError(
        f"the chat template {what}",
        where="tokenizer",
        mend="give the tokenizer a chat template for plain conversations of text, or remove it to "
        "have the plain form of question and answer",
    )


def _otherwise(what: str, where: str) -> InputError:
    return InputError(
        f"the chat template writes {what} otherwise than others",
        where=where,
        mend="remove from the text what the template acts on (thoughts, switches), or the example",
    )


def _shown(text: str) -> str:
    return printable(repr(text[-80:]))


class _ExplodingError(Exception):
    """A template took too long or too much memory."""


class _Watch:
    """Stops a template whose loops spin or whose texts explode; for all first renderings."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _LONGEST_SECONDS
        self._most = _memory() + _MOST_KIB

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._look)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _look(self, *_: Any) -> Any:
        if time.monotonic() > self._end:
            raise _ExplodingError(f"it takes more than {_LONGEST_SECONDS:g} s")
        if _memory() > self._most:
            raise _ExplodingError(f"it takes more than {_MOST_KIB >> 10} MiB of memory")
        return self._look


def _memory() -> int:
    """Return the most memory that this process has held, in KiB; 0 where nobody can say."""
    if sys.platform == "win32":
        return 0
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held // 1024 if sys.platform == "darwin" else held
