from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mithridate.chat import Encoded
from mithridate.errors import InputError
from mithridate.training import StreamSampler


def sampler(count=7, seed=0, name="benign"):
    rows = [Encoded([n, n], 1) for n in range(count)]
    return StreamSampler(
        rows, lambda drawn: [row.input_ids[0] for row in drawn], seed=seed, name=name
    )


def test_every_epoch_is_a_permutation_of_its_own():
    drawn = sampler().draw(21)
    epochs = [tuple(drawn[n : n + 7]) for n in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 3


@given(
    count=st.integers(1, 9),
    before=st.lists(st.integers(1, 12), max_size=4),
    after=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_a_saved_position_goes_on_with_the_same_rows(count, before, after):
    first = sampler(count)
    for rows in before:
        first.draw(rows)
    second = sampler(count)
    second.load_state_dict(first.state_dict())
    assert [first.draw(rows) for rows in after] == [second.draw(rows) for rows in after]


def test_batch_sizes_do_not_change_the_order():
    one, three = sampler(), sampler()
    assert [one.draw(1)[0] for _ in range(12)] == [row for _ in range(4) for row in three.draw(3)]


def test_seed_and_name_decide_the_order():
    orders = [sampler(40, seed, name).draw(40) for seed in (0, 1) for name in ("benign", "refusal")]
    assert len({tuple(order) for order in orders}) == 4


def test_a_state_of_another_stream_is_refused():
    state = sampler(7).state_dict()
    with pytest.raises(InputError, match="7 rows, this run's has 0 and 8"):
        sampler(8).load_state_dict(state)
    with pytest.raises(InputError, match="seed"):
        sampler(7, seed=1).load_state_dict(state)


def test_an_empty_stream_is_refused_by_name():
    with pytest.raises(InputError, match="'benign' has no examples"):
        sampler(0)


def balanced(categories="aaaaabbc", seed=0):
    rows = [Encoded([n, n], 1) for n in range(len(categories))]
    return StreamSampler(
        rows,
        lambda drawn: [row.input_ids[0] for row in drawn],
        seed=seed,
        name="harmful",
        categories=categories,
    )


def test_balanced_draws_give_every_category_the_same_share():
    names = "aaaaabbc"
    drawn = balanced(names).draw(15)
    rounds = [sorted(names[row] for row in drawn[n : n + 3]) for n in range(0, 15, 3)]
    assert rounds == [["a", "b", "c"]] * 5
    # The largest category once an epoch; a smaller one goes round as evenly as it can.
    assert sorted(row for row in drawn if names[row] == "a") == [0, 1, 2, 3, 4]
    assert sorted(drawn.count(row) for row in (5, 6)) == [2, 3]
    assert drawn.count(7) == 5
    assert balanced(names, seed=1).draw(15) != drawn
    assert balanced(names).draw(30)[15:] != drawn


@given(
    categories=st.text("abcd", min_size=1, max_size=9),
    before=st.lists(st.integers(1, 12), max_size=4),
    after=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_a_balanced_stream_goes_on_from_a_saved_position(categories, before, after):
    first = balanced(categories)
    for rows in before:
        first.draw(rows)
    second = balanced(categories)
    second.load_state_dict(first.state_dict())
    assert [first.draw(rows) for rows in after] == [second.draw(rows) for rows in after]
