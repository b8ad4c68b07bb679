"""Damaged data and configurations: read, or refused in a short message, and always soon."""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from mithridate.attacking import AttackPlan
from mithridate.attacking import read_settings as read_attack
from mithridate.audit import AuditPlan
from mithridate.audit.run import read_settings as read_audit
from mithridate.configs import read_yaml
from mithridate.errors import InputError
from mithridate.examples import STREAMS, Reading, read_source
from mithridate.immunisation import ImmunisationPlan, read_settings
from mithridate.measures.rows import BATTERY_VALUES

SECONDS = 10
ROWS = [
    {"prompt": f"p{n}", "response": "a", "is_safe": n % 2 == 0, "category": {"x": True}}
    for n in range(6)
]
TURNS = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"p{n}"},
                  {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}
    for n in range(4)
]  # fmt: skip
CHOICES = [{"question": "q", "choices": ["a", "b"], "answer": 1, "subject": "s"}]
LINES = "\n".join(map(json.dumps, [*ROWS, *TURNS, *CHOICES])).encode()


def arrow(make: Callable[..., ipc.RecordBatchStreamWriter]) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    with make(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def tables() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


DATA = {
    "a.jsonl": LINES,
    "a.json": json.dumps([*ROWS, *TURNS]).encode(),
    "b.json": json.dumps({"data": ROWS}, indent=1).encode(),
    "c.json": json.dumps({"prompt": ["p", "q"], "answer": ["a", "b"]}).encode(),
    "a.csv": b"prompt,answer,category\r\n" + b'"one, two",a,b\r\n' * 4,
    "a.tsv": b"prompt\tanswer\nq\ta\n",
    "b.jsonl.gz": gzip.compress(LINES),
    "c.jsonl.xz": lzma.compress(LINES),
    "a.parquet": tables(),
    "a.arrow": arrow(ipc.new_stream),
    "b.arrow": arrow(ipc.new_file),
}
CONFIG = b"""method: {batch_size: 4, harmful_weight: &w 1e-1}
training: &t
  learning_rate: 1e-4
  steps: 20
  balanced: [harmful]
  lora_rank: null
attack: {steps: 3, <<: {seed: 0}}
audit:
  permutations: 200
"""
PIECES = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"'", b"{", b"}", b"[", b"]", b":",
    b",", b"- ", b"? ", b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"!!set ",
    b".inf", b".nan", b"NaN", b"1e999", b"-0", b"9" * 5000, b"0x_", b"2026-11-30", b"\\ud800",
    b"[" * 2000, b'{"a":' * 2000, b"null", b"true", b"\xe2\x80\xae", b"\x1b[2J", b"x" * 50_000,
    b"*t", b"&t ", b"%YAML 9.9\n", b"---\n", b"|\n", b"#",
)  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four pieces cut, doubled, flipped, put in or moved."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((1, 2, 8, 64)))
        part = data[start:stop]
        new = rng.choice(
            (b"", part * 2, bytes(byte ^ 1 << rng.randrange(8) for byte in part),
             part + rng.choice(PIECES), rng.choice(PIECES), part[::-1])
        )  # fmt: skip
        data = data[:start] + new + data[stop:]
        if rng.random() < 0.05:
            data = data[: rng.randrange(len(data) + 1)]
    return data


def outcome(read: Callable[[], object]) -> str:
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        said, found = "", "read"
        try:
            read()
        except InputError as error:
            said, found = str(error), "refused"
    assert max(map(len, [said, *(str(warning.message) for warning in told)])) < 10_000
    assert time.perf_counter() - started < SECONDS
    return found


def damage_data(folder: Path, name: str, seeds: range) -> set[str]:
    found = set()
    for seed in seeds:
        rng = random.Random(f"{name}/{seed}")
        path = folder / name
        path.write_bytes(damaged(DATA[name], rng))
        reading = Reading(drop_invalid=rng.random() < 0.5)
        read = functools.partial(read_source, path, stream=rng.choice(STREAMS), reading=reading)
        found.add(outcome(read))
    return found


def damage_configs(folder: Path, seeds: range) -> set[str]:
    path, found = folder / "run.yaml", set()
    common = {"model": "m", "output_dir": folder, "config": path}
    readers: list[Callable[[], object]] = [
        lambda: read_settings(ImmunisationPlan(method="sft", streams={}, **common)),
        lambda: read_attack(AttackPlan(harmful="h", evaluation="e", **common)),
        lambda: read_audit(AuditPlan(config=path, output_dir=folder)),
        lambda: read_yaml(path),
    ]
    for seed in seeds:
        path.write_bytes(damaged(CONFIG, random.Random(f"config/{seed}")))
        found |= {outcome(read) for read in readers}
    return found


@pytest.mark.parametrize("name", DATA)
def test_whole_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DATA[name])
    assert outcome(lambda: read_source(tmp_path / name, stream="benign")) == "read"


@pytest.mark.parametrize("name", DATA)
def test_damaged_data_is_read_or_refused(tmp_path: Path, name: str) -> None:
    assert damage_data(tmp_path, name, range(25)) <= {"read", "refused"}


def test_damaged_configurations_are_read_or_refused(tmp_path: Path) -> None:
    assert damage_configs(tmp_path, range(40)) == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_much_damaged_data_is_read_or_refused(tmp_path: Path, name: str) -> None:
    assert damage_data(tmp_path, name, range(25, 2000)) == {"read", "refused"}


@pytest.mark.slow
def test_many_damaged_configurations_are_read_or_refused(tmp_path: Path) -> None:
    assert damage_configs(tmp_path, range(40, 2000)) == {"read", "refused"}


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} {{<<: [*{before}, *{before}]}}\n"
    for before, name in zip("abcdefghijklmnopqrstuvwx", "bcdefghijklmnopqrstuvwxy", strict=True)
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (ALIASES, "more than 20000 values"),
        (MERGES, "more than 20000 values"),
        ("a: &a [[*a]]\n", "the alias stands within what it names"),
        ("a: &a {<<: *a}\n", "the alias stands within what it names"),
        ("[" * 100_000, "too deep"),
        ("? " * 40_000, "too deep"),
        ("a: [" + "1," * 200_000 + "]", "more than 20000 values"),
        ("a: 1\n" * 300_000, "more than 1015 KiB"),
        ("a: 0x_\n", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!set {x}\n", "tag:yaml.org,2002:set"),
        ("a: !!timestamp 2026-11-30\n", "tag:yaml.org,2002:timestamp"),
        ("&" + "a" * 300_000 + "!: 1", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused_before_it_is_built(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_dates_stay_text_and_aliases_within_bounds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: 2026-11-30\nb: &b [1, 2]\nc: *b\nd: [*b, *b]\n")
    assert read_yaml(path) == {"a": "2026-11-30", "b": [1, 2], "c": [1, 2], "d": [[1, 2]] * 2}


def test_long_values_are_quoted_in_part(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{steps: {'x' * 100_000}, {'k' * 1000}: 1}}\n")
    with pytest.raises(InputError) as caught:
        read_settings(
            ImmunisationPlan(model="m", method="sft", streams={}, output_dir=tmp_path, config=path)
        )
    assert "steps: 'xxx" in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_a_battery_of_many_attacks_is_read(tmp_path: Path) -> None:
    path = tmp_path / "battery.yaml"
    attack = "- {id: A, phases: [{do: train, rate: 1}]}\n"
    path.write_text("attacks:\n" + attack * 2500)
    with pytest.raises(InputError, match="more than 20000 values"):
        read_yaml(path)
    assert len(read_yaml(path, most_values=BATTERY_VALUES)["attacks"]) == 2500
