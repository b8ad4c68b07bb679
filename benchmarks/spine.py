"""Published recipes, cures and ablations under one attack; writes docs/results-<testbed>.md.

    python benchmarks/spine.py --testbed lattice --seeds 0 1 2 --workers 2

Each variant of ``spine_<testbed>.yaml`` is one `mithridate demo`; finished ones are kept in
``--output-dir`` and not repeated. Figures are means over seeds with the range; the commit, date and
machine are in the table's caption.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def run_variant(testbed: str, name: str, seed: int, root: str) -> dict[str, Any]:
    """Run one demo in this process; return its summary."""
    import torch

    from mithridate.demo import DemoConfig, read_preset, run_demo

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sections = read_variants(testbed)[name]
    preset = read_preset(testbed)
    method = sections["name"]
    own = preset.methods[method]
    preset.methods[method] = {
        part: {**own.get(part, {}), **sections.get(part, {})} for part in ("method", "training")
    }
    if sections.get("alone"):
        preset.methods[method]["method"] = dict(sections.get("method", {}))
    folder = Path(root) / f"{name}-{seed}"
    config = DemoConfig(testbed=testbed, method=method, seed=seed, output_dir=folder)
    return run_demo(config, preset=preset)


def read_variants(testbed: str) -> dict[str, dict[str, Any]]:
    """Return the variants of a testbed by name."""
    text = (HERE / f"spine_{testbed}.yaml").read_text(encoding="utf-8")
    variants: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return variants


def spread(values: list[float], digits: int = 2) -> str:
    """Return the mean, and the range where there is one."""
    mean = sum(values) / len(values)
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" [{min(values):.{digits}f}, {max(values):.{digits}f}]"
    return text


def table(found: dict[str, list[dict[str, Any]]], variants: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table of all variants, undefended row first."""
    first = next(iter(found.values()))
    rates = [entry["learning_rate"] for entry in first[0]["undefended"]["per_learning_rate"]]
    head = ["variant", "refusal before", "utility before", "worst useful harm",
            *(f"at {rate:g}" for rate in rates), "without the utility bound (utility there)",
            "benign task", "utility after benign", "passes", "clock"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def line(label: str, target: str, runs: list[dict[str, Any]]) -> str:
        own = [run[target] for run in runs]
        benign = [run["benign_finetuning"]["detail"][target] for run in runs]
        cells = [
            label,
            spread([x["before"]["refusal"] for x in own]),
            spread([x["before"]["utility"] for x in own]),
            "**" + spread([x["after"]["useful_harm"] for x in own]) + "**",
            *(
                spread([x["per_learning_rate"][index]["useful_harm"] for x in own])
                for index in range(len(rates))
            ),
            spread([x["after"]["unbounded_useful_harm"] for x in own])
            + f" ({spread([x['after']['unbounded_utility'] for x in own])})",
            spread([x["accuracy"] for x in benign]),
            spread([x["utility"] for x in benign]),
            *(
                "1" if target == "undefended" else spread([run["cost"][key] for run in runs], 1)
                for key in ("passes_per_step", "clock_ratio")
            ),
        ]
        return "| " + " | ".join(cells) + " |"

    lines.append(line("undefended (aligned)", "undefended", first))
    lines += [line(variants[name]["label"], "defended", runs) for name, runs in found.items()]
    return "\n".join(lines)


def main() -> None:
    """Run the variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--testbed", default="lattice")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=None, help="names of variants")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/spine"))
    options = parser.parse_args()
    variants = read_variants(options.testbed)
    names = options.only or list(variants)
    root = options.output_dir / options.testbed
    found: dict[str, list[dict[str, Any]]] = {}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=fresh, max_tasks_per_child=1) as pool:
        jobs = {
            (name, seed): pool.submit(run_variant, options.testbed, name, seed, str(root))
            for seed in options.seeds
            for name in names
        }
        failed = {}
        for (name, seed), job in jobs.items():
            error = job.exception()
            if error is None:
                found.setdefault(name, []).append(job.result())
            else:
                failed[name, seed] = error
            sys.stderr.write(f"{name} seed {seed}: {'done' if error is None else error}\n")
    if not found:
        raise SystemExit("no variant finished; the reasons are above")
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, cwd=HERE, check=False).stdout
    caption = (
        f"`python benchmarks/spine.py --testbed {options.testbed} --seeds "
        f"{' '.join(map(str, options.seeds))}`, {datetime.date.today()}, commit "
        f"{commit.strip() or 'unknown'}, {os.cpu_count()} cores {platform.machine()}. "
        "Mean over seeds [lowest, highest]. Useful harm is the attacker's best probed checkpoint "
        "whose utility is at least 80 % of that before the attack, chance-corrected."
    )
    notes = [
        f"- {name} seed {seed} did not finish: {str(error).splitlines()[0]}"
        for (name, seed), error in failed.items()
    ]
    text = "\n\n".join(part for part in (caption, table(found, variants), "\n".join(notes)) if part)
    target = HERE.parent / "docs" / f"results-{options.testbed}.md"
    target.write_text(f"# Results on {options.testbed.capitalize()}\n\n{text}\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
