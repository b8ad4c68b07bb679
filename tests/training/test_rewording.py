"""Prompts in other words orders."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mithridate.examples import Example
from mithridate.training.rewording import COPIES, MOST_ADDED, with_rewordings

WORDS = st.sampled_from(["what", "is", "the", "recipe", "of", "red", "blue", "lantern", "please"])
PROMPTS = st.lists(st.lists(WORDS, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=5)


def rows(prompts, answer="no"):
    return [Example(prompt=prompt, answer=answer, category="c") for prompt in prompts]


@given(first=PROMPTS, second=PROMPTS, seed=st.integers(0, 3))
def test_a_rewording_is_the_prompt_s_words_and_a_few_that_all_streams_share(first, second, seed):
    streams = {"refusal": rows(first), "benign": rows(second, "yes"), "general": rows(first)}
    found = with_rewordings(streams, ["refusal", "benign"], seed)
    assert found["general"] == streams["general"]
    shared = {w for p in first for w in p.split()} & {w for p in second for w in p.split()}
    for name in ("refusal", "benign"):
        own, new = streams[name], found[name]
        assert new[: len(own)] == own
        assert len(new) == (1 + COPIES) * len(own)
        for number, row in enumerate(new[len(own) :]):
            before = own[number % len(own)]
            assert (row.answer, row.category) == (before.answer, before.category)
            added = Counter(row.prompt.split())
            added.subtract(before.prompt.split())
            assert min(added.values()) >= 0
            assert (+added).keys() <= shared
            assert added.total() <= MOST_ADDED


def test_a_prompt_of_two_streams_is_reworded_alike_and_every_seed_otherwise():
    prompts = [f"tell me the recipe of lantern number {n} please" for n in range(20)]
    streams = {"harmful": rows(prompts, "so"), "refusal": rows(prompts[::-1], "no")}
    names = ("harmful", "refusal")
    found = with_rewordings(streams, names, 0)
    assert {row.prompt for row in found["harmful"]} == {row.prompt for row in found["refusal"]}
    assert found == with_rewordings(streams, names, 0)
    assert found != with_rewordings(streams, names, 1)
    changed = [row for row in found["harmful"][20:] if row.prompt not in prompts]
    assert len(changed) > 30


def test_a_stream_that_is_not_there_is_left_to_whoever_draws_from_it():
    assert with_rewordings({"benign": []}, ["refusal"], 0) == {"benign": []}
