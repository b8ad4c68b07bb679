"""What a reasoning model thinks before it answers: it is not the answer, and nothing judges it."""

from __future__ import annotations

_PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|im_start|>think", "<|im_start|>answer"),
    ("<|channel>thought", "<channel|>"),
    ("<unused94>", "<unused95>"),
)
_WRAPPERS = (
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
    ("<output>", "</output>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
# In words that may also begin an ordinary answer, so that one without the other says nothing.
_SPOKEN = ("Here is my thought process:", "Here is my response:")
# gpt-oss writes messages, each to the channel that it names; only the final one answers.
_CHANNEL, _FINAL, _MESSAGE = "<|channel|>", "<|channel|>final", "<|message|>"
_MESSAGE_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", _CHANNEL)

MARKERS: tuple[str, ...] = (
    *(mark for pair in (*_PAIRS, *_WRAPPERS) for mark in pair),
    *(_MESSAGE, *_MESSAGE_ENDS),
)
"""What separates thoughts from answers; a tokenizer may hold them as special tokens."""


def final_answer(text: str) -> str | None:
    """Return what ``text`` answers, without the thinking before it and outer whitespace.

    All up to the last end of a thought is left out, also where its beginning stood in the prompt.
    Text without thoughts is its own answer. In linear time.

    Returns
    -------
    str or None
        ``None`` where the thought is not finished, so that no answer begins.
    """
    if _CHANNEL in text:
        _, found, rest = text.rpartition(_FINAL)
        _, begun, message = rest.partition(_MESSAGE)
        return _before_any(message, _MESSAGE_ENDS).strip() if found and begun else None
    begin, close = _SPOKEN
    if text.lstrip().startswith(begin) and close in text:
        return text.partition(close)[2].strip()
    end = max((text.rfind(close) + len(close) for _, close in _PAIRS if close in text), default=0)
    rest = text[end:]
    answer = _before_any(rest, [begin for begin, _ in _PAIRS])
    if len(answer) < len(rest) and not answer.strip():
        return None
    answer = answer.strip()
    for begin, close in _WRAPPERS if end else ():
        if answer.startswith(begin):
            return answer.removeprefix(begin).partition(close)[0].strip()
    return answer


def open_thought(text: str) -> str:
    """Return what opens the thought that ``text`` leaves open at its end; empty where none is.

    Parameters
    ----------
    text
        What a chat template puts before an answer.
    """
    _, channel, message = text.rpartition(_CHANNEL)
    if channel and not (channel + message).startswith(_FINAL):
        name, begun, inside = message.partition(_MESSAGE)
        if begun and _before_any(inside, _MESSAGE_ENDS) == inside:
            return channel + name + begun
    place, begin, close = max((text.rfind(begin), begin, close) for begin, close in _PAIRS)
    return begin if place >= 0 and close not in text[place:] else ""


def mentions_thoughts(text: str) -> bool:
    """Whether a mark of thinking stands in ``text``."""
    return _CHANNEL in text or any(mark in text for pair in _PAIRS for mark in pair)


def close_thought(opening: str) -> str | None:
    """Return what ends a thought that ``opening`` begins; ``None`` where no text does."""
    return dict(_PAIRS).get(opening)


def _before_any(text: str, marks: tuple[str, ...] | list[str]) -> str:
    """Return ``text`` up to the first of the marks in it."""
    return text[: min((text.find(mark) for mark in marks if mark in text), default=len(text))]
