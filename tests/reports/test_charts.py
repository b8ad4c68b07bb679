from __future__ import annotations

import pytest

from mithridate.reports.charts import LineChart, Series, ShareBar, stretches


def test_stretches_join_neighbours_and_reach_halfway() -> None:
    steps = [0.0, 5.0, 10.0, 15.0, 20.0]
    assert stretches(steps, [False, True, True, False, True]) == [(2.5, 12.5), (17.5, 20.0)]
    assert stretches(steps, [False] * 5) == []


def test_bar_draws_every_share_that_is_there() -> None:
    svg = ShareBar(description="d", shares={"exact": 0.25, "refusal": 0.75, "gibberish": 0.0}).svg()
    assert svg.count("<rect") == 2


@pytest.mark.parametrize("points", [[(0, 0.5)], [(0, 1.0), (1, 1.0)], [(3, 1e-9), (4, -2e9)]])
def test_any_points_give_a_chart(points: list[tuple[float, float]]) -> None:
    chart = LineChart(
        name="c",
        description='"quoted" <b>',
        series=[Series(label="l", role="term", points=points)],
        x_label="step",
    )
    svg = chart.svg()
    assert "nan" not in svg
    assert "<b>" not in svg
    low, high = chart.data()["y"]
    assert low < min(y for _, y in points)
    assert high > max(y for _, y in points)
