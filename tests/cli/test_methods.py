"""`mithridate methods`: what it tells of each defence and of its options."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from mithridate.methods import METHODS
from mithridate.methods.describe import describe, help_of
from tests.cli.test_app import run


@pytest.mark.parametrize("name", [*METHODS.names(), "seam+tokenbuncher"])
def test_every_option_of_every_method_is_told(name: str) -> None:
    kind = METHODS.load(name)
    entry = describe(kind)
    assert all(entry[key] for key in ("name", "summary", "paper", "spaces", "defends", "limits"))
    assert [option["name"] for option in entry["options"]] == [
        field.name for field in fields(kind.config_class)
    ]
    for option in entry["options"]:
        assert option["help"][-1] == ".", option["name"]
        assert "``" not in option["help"]
        assert "typing" not in option["values"], option["name"]
    json.dumps(entry, allow_nan=False)


def options_of(name: str) -> dict[str, dict[str, Any]]:
    return {option["name"]: option for option in describe(METHODS.load(name))["options"]}


def test_what_is_told_is_what_is_checked() -> None:
    options = options_of("tokenbuncher")
    assert options["noise_weight"]["default"] == 0.1
    assert options["noise_weight"]["values"] == "float (inside (0, 1))"
    assert options["rollouts"]["values"].startswith("int (2 or more")
    inherited = options_of("tvaccine")
    assert inherited["radius"]["default"] == 3.0
    assert inherited["radius"]["help"].startswith("rho, an L2 length")


def test_help_is_read_from_the_docstring() -> None:
    class Base:
        """Options.

        Parameters
        ----------
        first, second
            One line
            and ``None`` more.
        """

    class Own(Base):
        """Options.

        Parameters
        ----------
        second
            Another.

        Notes
        -----
        second
            Not this.
        """

    found = help_of(Own)  # type: ignore[arg-type]
    assert found == {"first": "One line and null more.", "second": "Another."}


def test_the_command_prints_the_methods_that_are_named() -> None:
    text = run("methods", "booster", "lox").stdout
    for said in ("arXiv 2409.01586", "harmful, refusal", "3 passes per step, 1 buffer ",
                 "flatness_weight", "float (0 or more)", "all weights"):  # fmt: skip
        assert said in text
    assert "arXiv 2505.12186" not in text
    document = json.loads(run("methods", "booster", "--json").stdout)
    assert [entry["name"] for entry in document["methods"]] == ["booster"]
    assert "did you mean 'booster'" in run("methods", "bosster", code=2).stderr
