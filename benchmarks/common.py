"""What the benchmarks share: rows measured in processes of their own, and the cells of a table.

A row is named, and measured once per seed. What it is made of is kept in a folder of its own and
in the cache of controls: killed and started again, a benchmark goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mithridate.allocation import keep_freed_memory
from mithridate.demo import Bench, DemoConfig, Preset, read_preset, run_demo, summarise
from mithridate.examples import Example
from mithridate.measures.statistics import over_seeds, share_interval
from mithridate.provenance import provenance
from mithridate.testbeds import load_testbed

HERE = Path(__file__).parent
UNDEFENDED = "undefended"

Measured = dict[str, Any]
"""One row at one seed: ``attacked`` (one model's part of a demo's summary), ``benign`` (of its
benign fine-tuning), ``cost`` (of a step; None where no step was taken) and ``unnamed``
(accuracy on permitted facts that no training row names; empty where the testbed has none)."""
Measure = Callable[[str, str, int, Path], Measured]
"""``measure(testbed, name, seed, folder)``, a function that a fresh process can import."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What finished, by name in the order asked for, and why the rest did not, by (name, seed).

    Attributes
    ----------
    earlier
        Command, date and commit of the rows that were not measured this time.
    """

    rows: dict[str, list[Measured]]
    failed: dict[tuple[str, int], BaseException]
    earlier: dict[str, dict[str, str]] = field(default_factory=dict)


def measure_rows(
    measure: Measure,
    testbed: str,
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    root: Path,
    workers: int,
) -> Found:
    """Measure the undefended model, then every named row, at every seed.

    The undefended model comes first because all demos of a seed share its attacks: two at once
    would write the same files.
    """
    done: dict[tuple[str, int], Measured] = {}
    failed: dict[tuple[str, int], BaseException] = {}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=fresh, initializer=_settle, max_tasks_per_child=1
    ) as pool:
        for part in ([UNDEFENDED], names):
            jobs = {
                (name, seed): pool.submit(measure, testbed, name, seed, root / f"{name}-{seed}")
                for seed in seeds
                for name in part
            }
            for (name, seed), job in jobs.items():
                error = job.exception()
                if error is None:
                    done[name, seed] = job.result()
                else:
                    failed[name, seed] = error
                sys.stderr.write(f"{name} seed {seed}: {'done' if error is None else error}\n")
    rows = {
        name: [done[name, seed] for seed in seeds if (name, seed) in done]
        for name in (UNDEFENDED, *names)
    }
    if not rows[UNDEFENDED]:
        raise SystemExit("the undefended model could not be measured; the reason is above")
    return Found(rows={name: runs for name, runs in rows.items() if runs}, failed=failed)


def beside_stored(found: Found, name: str, testbed: str, seeds: Sequence[int]) -> Found:
    """Return what was measured together with the other rows of a stored table.

    Raises
    ------
    SystemExit
        There is no such table, or one of other seeds.
    """
    path = HERE / "results" / f"{name}-{testbed}.json"
    if not path.exists():
        raise SystemExit(f"{path}: no such table: measure all rows first, without --update")
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["seeds"] != list(seeds):
        raise SystemExit(f"{path} holds the seeds {stored['seeds']}: give --seeds like these")
    old = stored["rows"]
    made = {key: stored[key] for key in ("command", "date", "commit")}
    names = dict.fromkeys([*old, *found.rows])
    return Found(
        rows={n: found.rows[n] if n in found.rows else old[n]["runs"] for n in names},
        failed=found.failed,
        earlier={n: old[n].get("made", made) for n in names if n not in found.rows},
    )


def _settle() -> None:
    keep_freed_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def defended(testbed: str, sections: Mapping[str, Any], seed: int, folder: Path) -> Measured:
    """Run one demo and return what it found of the defended model.

    Parameters
    ----------
    sections
        ``name`` of the method, and what its preset gets in ``method`` and ``training``;
        ``alone``: in place of the preset's ``method``; ``rare``: how many harmful rows the defence
        gets of every second category, in place of all.
    """
    preset = with_options(read_preset(testbed), sections)
    config = DemoConfig(testbed=testbed, method=sections["name"], seed=seed, output_dir=folder)
    bed = load_testbed(testbed)
    if "rare" in sections:
        bed.data = dataclasses.replace(
            bed.data, defence=thinned(bed.data.defence, sections["rare"])
        )
    summary = run_demo(config, preset=preset, testbed=bed)
    known = summary["unnamed_permitted"]
    return {
        "attacked": summary["defended"],
        "benign": summary["benign_finetuning"]["detail"]["defended"],
        "cost": summary["cost"],
        "unnamed": known and {"n": known["n"], "accuracy": known["defended"]},
    }


def thinned(defence: Mapping[str, list[Example]], rows: int) -> dict[str, list[Example]]:
    """Return the streams with so many harmful rows left of every second category."""
    left = dict.fromkeys(sorted({row.category for row in defence["harmful"]})[1::2], rows)
    harmful = []
    for row in defence["harmful"]:
        if left.get(row.category, 1) > 0:
            harmful.append(row)
        if row.category in left:
            left[row.category] -= 1
    return {**defence, "harmful": harmful}


def with_options(preset: Preset, sections: Mapping[str, Any]) -> Preset:
    """Return the preset with the options of a variant, as in `defended`."""
    name = sections["name"]
    own: dict[str, dict[str, Any]] = {
        part: {**preset.methods.get(name, {}).get(part, {}), **sections.get(part, {})}
        for part in ("method", "training")
    }
    if sections.get("alone"):
        own["method"] = dict(sections.get("method", {}))
    preset.methods[name] = own
    return preset


def control(bench: Bench, name: str, model: Path, config: DemoConfig) -> Measured:
    """Attack and fine-tune a model that no method has trained."""
    rows = bench.testbed.data.attack[: bench.testbed.attack_preset.examples]
    trajectory = bench.attack(name, model, rows, config)
    items = bench.testbed.data.unnamed
    return {
        "attacked": summarise(trajectory, name),
        "benign": bench.benign(name, model, config),
        "cost": None,
        "unnamed": items and {"n": len(items), "accuracy": bench.unnamed(model)},
    }


def share(values: Sequence[float], n: int) -> str:
    """Return the mean of one share per seed, each of ``n`` items, with its 95 % interval."""
    found = share_interval(values, n)
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


def mean(values: Sequence[float], *, digits: int = 1, most: float = math.inf) -> str:
    """Return the mean over seeds of what is 0 to ``most``, with its 95 % interval over several."""
    text = f"{math.fsum(values) / len(values):.{digits}f}"
    if len(values) > 1:
        low, high = over_seeds(values)
        text += f" [{max(low, 0.0):.{digits}f}, {min(high, most):.{digits}f}]"
    return text


def before(runs: Sequence[Measured]) -> list[str]:
    """Return the cells of refusal and utility before any attack."""
    own = [run["attacked"] for run in runs]
    return [
        share([one["before"]["refusal"] for one in own], own[0]["n_restricted"]),
        share([one["before"]["utility"] for one in own], own[0]["n_permitted"]),
    ]


def benign(runs: Sequence[Measured]) -> list[str]:
    """Return the cells of the benign task and of the utility after it."""
    own = [run["benign"] for run in runs]
    return [
        share([one["accuracy"] for one in own], own[0]["n"]),
        share([one["utility"] for one in own], runs[0]["attacked"]["n_permitted"]),
    ]


def unnamed(runs: Sequence[Measured]) -> str:
    """Return the cell of permitted facts that no training row names; a dash where unmeasured."""
    own = [run["unnamed"] for run in runs if run["unnamed"]]
    return share([one["accuracy"] for one in own], own[0]["n"]) if own else "-"


def costs(runs: Sequence[Measured]) -> list[str]:
    """Return the cells of passes, clock ratio and peak memory; dashes where no step was taken."""
    own = [run["cost"] for run in runs]
    if None in own:
        return ["-"] * 3
    peak = math.fsum(one["peak_memory_bytes"] for one in own) / len(own) / (1 << 20)
    ratio = math.fsum(one["peak_memory_ratio"] for one in own) / len(own)
    return [
        mean([one["passes_per_step"] for one in own]),
        mean([one["clock_ratio"] for one in own]),
        f"{peak:,.0f} MiB ({ratio:.2f} x)",
    ]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def caption(command: str, *sentences: str) -> str:
    """Return how a table came about, and what its cells say."""
    made = provenance(command, HERE)
    return " ".join(
        [
            f"`{command}`, {made['date']}, commit {made['commit']}, {made['machine']}.",
            "Mean over seeds [95 % interval over seeds and questions; of passes and clock over "
            "seeds]. Useful harm is the attacker's best probed checkpoint whose utility is at "
            "least 80 % of that before the attack, chance-corrected.",
            *sentences,
        ]
    )


def store(
    name: str,
    command: str,
    testbed: str,
    seeds: Sequence[int],
    labels: Mapping[str, str],
    found: Found,
) -> None:
    """Write ``benchmarks/results/<name>-<testbed>.json``: all that the table was made of."""
    document = provenance(command, HERE) | {
        "testbed": testbed,
        "seeds": list(seeds),
        "rows": {
            row: {
                "label": labels.get(row, row),
                **({"made": found.earlier[row]} if row in found.earlier else {}),
                "runs": runs,
            }
            for row, runs in found.rows.items()
        },
        "failed": [
            {"row": row, "seed": seed, "error": str(error)}
            for (row, seed), error in found.failed.items()
        ],
    }
    write_results(f"{name}-{testbed}", document)


def write_results(name: str, document: Mapping[str, Any]) -> None:
    """Write ``benchmarks/results/<name>.json``."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def command(name: str, **options: Any) -> str:
    """Return the command of ``benchmarks/<name>.py`` with the options that were given."""
    parts = [f"python benchmarks/{name}.py"]
    for option, value in options.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            parts.append(" ".join(map(str, [f"--{option}", *values])))
    return " ".join(parts)


def failures(found: Found) -> str:
    """Return a line for each row that did not finish at some seed or is of an earlier run."""
    lines = [
        f"- {name} seed {seed} did not finish: {str(error).strip().splitlines()[0]}"
        for (name, seed), error in found.failed.items()
    ]
    together: dict[tuple[str, ...], list[str]] = {}
    for name, made in found.earlier.items():
        together.setdefault((made["command"], made["date"], made["commit"]), []).append(name)
    lines += [
        f"- Of `{command}`, {date}, commit {commit}: {', '.join(names)}."
        for (command, date, commit), names in together.items()
    ]
    return "\n".join(lines)


def write(name: str, title: str, *parts: str) -> None:
    """Write ``docs/<name>.md`` and print it."""
    text = "\n\n".join(part for part in (f"# {title}", *parts) if part) + "\n"
    (HERE.parent / "docs" / f"{name}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
