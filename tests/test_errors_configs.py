from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import stat
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mithridate import registry
from mithridate.configs import (
    Count,
    Positive,
    Range,
    Share,
    Steps,
    Weight,
    check_values,
    from_mapping,
    read_yaml,
    require,
)
from mithridate.errors import (
    GateError,
    InactiveTermError,
    InputError,
    NonFiniteError,
    RunStoppedError,
)
from mithridate.files import sha256_file, sha256_of, sync, write_atomic, write_json
from mithridate.registry import Registry

# Errors


def test_an_input_error_says_what_where_and_how_to_mend() -> None:
    error = InputError("the file is empty", where="a.jsonl", mend="fill it")
    assert str(error) == "a.jsonl: the file is empty\n  mend: fill it"
    assert (error.what, error.where, error.mend) == ("the file is empty", "a.jsonl", "fill it")
    assert str(InputError("no", mend="yes")) == "no\n  mend: yes"
    assert isinstance(error, ValueError)


def test_a_non_finite_term_is_named() -> None:
    error = NonFiniteError("collapse", math.nan)
    assert (error.term, math.isnan(error.value)) == ("collapse", True)
    assert str(error).startswith("the term 'collapse' became nan; lower the learning rate")
    assert str(NonFiniteError("x", math.inf, "look there")) == (
        "the term 'x' became inf; look there"
    )


def test_stopped_runs_are_no_input_errors() -> None:
    for kind in (NonFiniteError, InactiveTermError, GateError):
        assert issubclass(kind, RunStoppedError)
        assert not issubclass(kind, InputError)


# Files


@pytest.mark.parametrize("content", ["grüße\n", b"\x00\xff", ""])
def test_atomic_writes_replace_the_whole_file(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_atomic(path, "older and longer than the next")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("value", [math.nan, math.inf, {"deep": [1.0, -math.inf]}])
def test_json_without_nan(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    assert "é" in path.read_text(encoding="utf-8")


def test_hashes_of_files_and_values(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1_000_000)
    sync(path)
    sync(tmp_path)
    assert sha256_file(path) == "f4096a131e7e6ebfa7a512b5c299e13b065df34d15624ee1202ab394cc4d7e90"
    assert sha256_of({"b": 1, "a": (2, Path("x"))}) == sha256_of({"a": [2, "x"], "b": 1})
    assert sha256_of({"a": 1}) != sha256_of({"a": "1"})
    words = {f"word{number}" for number in range(100)}
    assert sha256_of(words) == sha256_of(sorted(words))
    assert sha256_of(iter([1, 2])) == sha256_of([1, 2])


def test_what_has_no_content_is_not_hashed() -> None:
    with pytest.raises(TypeError, match="object has no content to hash"):
        sha256_of({"a": object()})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_a_hash_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    assert sha256_of(value) == sha256_of(dict(reversed(value.items())))


# Registry


def registered(monkeypatch: pytest.MonkeyPatch, own: dict[str, str], **points: str) -> Registry:
    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "mithridate.things"
        return [EntryPoint(name, value, group) for name, value in points.items()]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return Registry("thing", "mithridate.things", own)


def test_names_are_loaded_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    things = registered(
        monkeypatch,
        {"join": "os.path:join", "lost": "no.such.module:thing"},
        dumps="json:dumps",
        join="os.path:join",
    )
    assert things.names() == ["join", "lost", "dumps"]
    assert things.load("join") is os.path.join
    assert things.load("dumps") is json.dumps
    with pytest.raises(ModuleNotFoundError):
        things.load("lost")


def test_an_unknown_name_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    things = registered(monkeypatch, {"ctrap": "a:b", "seam": "a:c"})
    with pytest.raises(InputError) as caught:
        things.load("crtap")
    assert caught.value.what == "unknown thing 'crtap'"
    assert caught.value.mend == "did you mean 'ctrap'? known: ctrap, seam"
    with pytest.raises(InputError) as caught:
        things.load("zzz")
    assert caught.value.mend == "known: ctrap, seam"


def test_a_collision_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    things = registered(monkeypatch, {"join": "os.path:join"}, join="other:join")
    with pytest.raises(InputError, match=r"thing 'join': os\.path:join and other:join"):
        things.load("join")


# Configurations


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int
    rate: float = 1e-4
    rank: int | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    names: tuple[str, ...] = ()
    band: tuple[float, float] = (0.0, 1.0)
    extra: dict[str, Any] = field(default_factory=dict)
    either: int | float = 0
    open: Any = None
    quick: bool = False

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps: {self.steps} is not above 0", "give 1 or more")


def faults(**values: Any) -> str:
    with pytest.raises(InputError) as caught:
        from_mapping(Config, values, where="run.yaml: method")
    assert caught.value.where == "run.yaml: method"
    return caught.value.what


def test_values_become_what_the_fields_say() -> None:
    config = from_mapping(
        Config,
        {"steps": 3, "rate": 1, "rank": None, "names": ["a", "b"], "band": [0, 2], "either": 4},
        where="here",
    )
    assert config == Config(steps=3, rate=1.0, names=("a", "b"), band=(0.0, 2.0), either=4)
    assert [type(value) for value in (config.rate, *config.band, config.either)] == [
        float,
        float,
        float,
        int,
    ]
    assert from_mapping(Config, dataclasses.asdict(config), where="here") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": "fast"}, "rate: 'fast' is not float"),
        ({"rate": True}, "rate: True is not float"),
        ({"rate": math.nan}, "rate: nan is not float"),
        ({"rate": None}, "rate: None is not float"),
        ({"rank": 1.0}, "rank: 1.0 is not int or null"),
        ({"rank": True}, "rank: True is not int or null"),
        ({"schedule": "linear"}, "schedule: 'linear' is not one of 'constant', 'cosine'"),
        ({"names": "ab"}, "names: 'ab' is not list of str"),
        ({"names": ["a", 1]}, "names: ['a', 1] is not list of str"),
        ({"band": [1.0]}, "band: [1.0] is not [float, float]"),
        ({"band": [1.0, "x"]}, "band: [1.0, 'x'] is not [float, float]"),
        ({"extra": []}, "extra: [] is not mapping to Any"),
        ({"quick": 1}, "quick: 1 is not bool"),
        ({"stpes": 1}, "unknown key 'stpes' (did you mean 'steps'?)"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({1: 1}, "unknown key 1"),
        ({"steps": 0}, "steps: 0 is not above 0"),
    ],
)
def test_a_faulty_value_is_named(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_mapping(Config, {"steps": 1, **values}, where="run.yaml: method")
    assert caught.value.what == message
    assert caught.value.where == "run.yaml: method"
    assert caught.value.mend


@dataclass(frozen=True, kw_only=True)
class Limited:
    rows: Count = 1
    share: Share | None = None
    radius: Positive | Literal["auto"] = "auto"
    steps: Steps = (1, 2)
    rates: Range = (1e-4, 1e-3)
    each: tuple[Positive, ...] = ()
    named: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "rows: 0 is not 1 or more"),
        ({"share": 1.1}, "share: 1.1 is not 0 to 1"),
        ({"radius": 0}, "radius: 0 is not above 0"),
        ({"radius": math.inf}, "radius: inf is not above 0"),
        ({"radius": "atuo"}, "radius: 'atuo' is not float (above 0) or 'auto'"),
        ({"steps": (0, 2)}, "steps: (0, 2) is not 1 <= low <= high"),
        ({"rates": (2e-3, 1e-3)}, "rates: (0.002, 0.001) is not 0 < low <= high"),
        ({"each": (1.0, 0.0)}, "each: (1.0, 0.0) is not list of float (above 0)"),
        ({"named": {"a": -1.0}}, "named: {'a': -1.0} is not mapping to float (0 or more)"),
        (
            {"rows": 0, "steps": (2, 1)},
            "rows: 0 is not 1 or more; steps: (2, 1) is not 1 <= low <= high",
        ),
    ],
)
def test_limits_hold_for_files_and_for_code_alike(values: dict[str, Any], message: str) -> None:
    for make in (partial(from_mapping, Limited, values, where="-"), partial(Limited, **values)):
        with pytest.raises(InputError) as caught:
            make()
        assert caught.value.what == message


def test_within_their_limits_values_are_converted_as_elsewhere() -> None:
    found = from_mapping(Limited, {"radius": "1e-2", "rates": ["1e-3", 1], "each": [2]}, where="-")
    assert found == Limited(radius=0.01, rates=(0.001, 1.0), each=(2.0,))
    assert type(found.each[0]) is float


def test_all_faults_at_once() -> None:
    assert faults(rate="x", quick=3, sheduel=1) == (
        "rate: 'x' is not float; quick: 3 is not bool; "
        "unknown key 'sheduel' (did you mean 'schedule'?); missing key 'steps'"
    )
    with pytest.raises(InputError) as caught:
        from_mapping(Config, {}, where="here")
    assert "known keys: steps, rate, rank" in caught.value.mend


def test_a_section_that_is_no_mapping() -> None:
    with pytest.raises(InputError, match=r"run\.yaml: method: \[3\] is not a mapping"):
        from_mapping(Config, [3], where="run.yaml: method")  # type: ignore[arg-type]


def read(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yaml(path)


def test_yaml_is_read_as_plain_values(tmp_path: Path) -> None:
    assert read(tmp_path, "") == {}
    assert read(tmp_path, "# nothing\n") == {}
    assert read(tmp_path, "a: [1, x]\nb: {c: null}\n") == {"a": [1, "x"], "b": {"c": None}}
    assert read(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "text", ["1e-4", "1E-4", "2.e3", "-5e5", "+1.5e-10", "1.0e-4", "1.0e+4", "0e0"]
)
def test_numbers_with_an_exponent_are_numbers_where_numbers_are_due(
    tmp_path: Path, text: str
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Rates:
        rate: float | None
        rates: tuple[float, ...]
        name: str = "x"

    values = read(tmp_path, f"rate: {text}\nrates: [{text}, 1]\nname: '{text}'\n")
    rates = from_mapping(Rates, values, where="here")
    assert rates == Rates(rate=float(text), rates=(float(text), 1.0), name=text)
    assert type(rates.rate) is float


@pytest.mark.parametrize("text", ["1e", "e5", "1e-4x", "0x1e4", "nan", "1", "1.5"])
def test_other_text_is_no_number(text: str) -> None:
    assert faults(steps=1, rate=text) == f"rate: {text!r} is not float"


@given(st.dictionaries(st.text(min_size=1), json_values, max_size=4))
def test_yaml_reads_what_yaml_writes(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("yaml")
    assert read(folder, yaml.safe_dump(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "the key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 1\n", "the key 'b' is given twice"),
        ("- a\n", "the top level is not a mapping"),
        ("a\n", "the top level is not a mapping"),
        (b"a: caf\xe9\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert caught.value.where == str(tmp_path / "run.yaml")


def test_yaml_that_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        InputError("no rows", where="a.jsonl", mend="add some"),
        NonFiniteError("retain", float("inf"), "lower it"),
    ],
)
def test_errors_survive_the_way_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert vars(again) == vars(error)
