"""Published recipes, cures and ablations under one attack.

Writes docs/results-<testbed>.md and benchmarks/results/spine-<testbed>.json.

    python benchmarks/spine.py --testbed lattice --seeds 0 1 2 --workers 2
    python benchmarks/spine.py --variants ablations --seeds 0 1 2

Each variant of ``spine_<testbed>.yaml`` is one `mithridate demo`; finished ones are kept in
``--output-dir`` and not repeated. ``--variants ablations`` takes those of
``ablations_<testbed>.yaml`` and writes docs/results-ablations-<testbed>.md in the same way.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import yaml

import common
from common import UNDEFENDED, Found, Measured
from mithridate.demo import Bench, DemoConfig, read_preset
from mithridate.events import silent
from mithridate.testbeds import load_testbed

TITLES = {"spine": "Results on {}", "ablations": "Cures and ablations on {}"}


def read_variants(testbed: str, variants: str = "spine") -> dict[str, dict[str, Any]]:
    """Return the variants of a testbed by name."""
    text = (common.HERE / f"{variants}_{testbed}.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found


def measure(
    testbed: str, name: str, seed: int, folder: Path, *, variants: str = "spine"
) -> Measured:
    """Measure one variant, or the undefended model."""
    if name != UNDEFENDED:
        return common.defended(testbed, read_variants(testbed, variants)[name], seed, folder)
    bed = load_testbed(testbed)
    config = DemoConfig(testbed=testbed, seed=seed, output_dir=folder)
    bench = Bench(bed, read_preset(testbed), seed, silent)
    return common.control(bench, name, bed.aligned_model(), config)


def table(found: Found, labels: dict[str, str]) -> str:
    """Return the Markdown table of all variants, undefended row first."""
    rates = [
        entry["learning_rate"]
        for entry in found.rows[UNDEFENDED][0]["attacked"]["per_learning_rate"]
    ]
    head = ["variant", "refusal before", "utility before", "worst useful harm",
            *(f"at {rate:g}" for rate in rates), "without the utility bound (utility there)",
            "benign task", "utility after benign", "unnamed permitted facts", "passes", "clock",
            "peak memory"]  # fmt: skip
    lines = []
    for name, runs in found.rows.items():
        own = [run["attacked"] for run in runs]
        n, permitted = own[0]["n_restricted"], own[0]["n_permitted"]
        lines.append([
            labels[name],
            *common.before(runs),
            f"**{common.share([one['after']['useful_harm'] for one in own], n)}**",
            *(
                common.share([one["per_learning_rate"][i]["useful_harm"] for one in own], n)
                for i in range(len(rates))
            ),
            common.share([one["after"]["unbounded_useful_harm"] for one in own], n)
            + f" ({common.share([one['after']['unbounded_utility'] for one in own], permitted)})",
            *common.benign(runs),
            common.unnamed(runs),
            *common.costs(runs),
        ])  # fmt: skip
    return common.markdown(head, lines)


def main() -> None:
    """Run the variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--testbed", default="lattice")
    parser.add_argument("--variants", choices=TITLES, default="spine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=None, help="names of variants")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/spine"))
    options = parser.parse_args()
    testbed, seeds = options.testbed, options.seeds
    written = options.variants
    variants = read_variants(testbed, written)
    found = common.measure_rows(
        functools.partial(measure, variants=written), testbed, options.only or list(variants),
        seeds, root=options.output_dir / written / testbed, workers=options.workers,
    )  # fmt: skip
    labels = {UNDEFENDED: "undefended (aligned)"}
    labels |= {name: sections["label"] for name, sections in variants.items()}
    named = {} if written == "spine" else {"variants": written}
    command = common.command(
        "spine", **named, testbed=testbed, seeds=seeds, only=options.only or None
    )
    common.store(written, command, testbed, seeds, labels, found)
    common.write(
        f"results-{testbed}" if written == "spine" else f"results-{written}-{testbed}",
        TITLES[written].format(testbed.capitalize()),
        common.caption(
            command,
            "Unnamed permitted facts: the accuracy that is left, before any attack, on permitted "
            "facts that no row of the defence names, of those that the undefended model knows.",
        ),
        table(found, labels),
        common.failures(found),
    )


if __name__ == "__main__":
    main()
