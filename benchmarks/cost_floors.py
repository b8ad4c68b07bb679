"""Clock and peak memory of a step beside the floor they must reach; prints one table per shape.

    python benchmarks/cost_floors.py --shape lattice --seconds 60

A step may cost 1.15 times its batch equivalents in time, and SFT's peak plus its buffers plus a
tenth in memory. SEAM's inner layers are read through the output head; what that costs depends on
the share of answer tokens, so its row shows the clock's floor with those operations as well. Other
programs on a CPU stretch the clock: it is not called over the floor where processor time is within.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from mithridate.cli.progress import listening
from mithridate.costing import CostPlan, run_cost
from mithridate.errors import InputError
from mithridate.measures.shapes import SHAPES, find_shape

TIME, MEMORY = 1.15, 1.1
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a step is made of.

    Attributes
    ----------
    batch_equivalents
        Traversals of a batch, (forwards + 2 x backwards) / 3.
    buffers
        Parameter-sized, beyond weights, gradient and optimiser state.
    sites
        Perturbed activations per layer that are kept from one pass to the next.
    """

    method: str
    batch_equivalents: float
    buffers: int
    sites: int = 0
    options: dict[str, Any] = field(default_factory=dict)


LENS = "seam"
FLOORS = {
    "ctrap": Floor(method="ctrap", batch_equivalents=3, buffers=1),
    "seam log": Floor(method="seam", batch_equivalents=5, buffers=3, options={"unlearning": "log"}),
    LENS: Floor(method="seam", batch_equivalents=17 / 3, buffers=3),
    "booster": Floor(method="booster", batch_equivalents=3, buffers=1),
    "vaccine": Floor(method="vaccine", batch_equivalents=2, buffers=0, sites=1),
}


def measure(shape: str, seconds: float) -> str:
    """Return the table of one shape."""
    with listening() as listener:
        document = run_cost(
            CostPlan(shape=shape, methods=("sft",), seconds=seconds),
            variants={label: (floor.method, floor.options) for label, floor in FLOORS.items()},
            on_event=listener,
        )
    rows, machine = document["methods"], document["machine"]
    sft: dict[str, Any] = rows["sft"]
    config: Any = find_shape(shape).config()
    tokens = document["batch_size"] * document["length"]
    lines = [
        f"{shape}: {document['parameters']:,} float32 parameters, {document['batch_size']} rows of "
        f"{document['length']} tokens, {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['torch']}",
        f"{'method':10}{'clock':>8}{'95 %':>15}{'minima':>8}{'CPU':>8}{'floor':>8}"
        f"{'MiB':>9}{'floor':>9}{'steps':>7}",
    ]
    for label, floor in FLOORS.items():
        row = rows[label]
        if "not_timed" in row:
            lines.append(f"{label:10}not timed: {row['not_timed']}")
            continue
        allowed = TIME * floor.batch_equivalents
        sites = floor.sites * config.num_hidden_layers * tokens * config.hidden_size * 4
        room = MEMORY * (sft["peak_memory_bytes"] + floor.buffers * 4 * document["trainable"]
                         + sites)  # fmt: skip
        low, high = row["clock_ratio_interval"]
        on_gpu = row["peak_reserved_bytes"] is not None
        time = row["clock_ratio"] if on_gpu else min(row["clock_ratio"], row["cpu_ratio"])
        over = [
            name
            for name, found, most in (
                ("clock", time, allowed),
                ("memory", row["peak_memory_bytes"], room),
            )
            if found > most
        ]
        note = f"  over the floor: {', '.join(over)}" if over else ""
        if label == LENS and "flops" in rows["seam log"]:
            heads = row["flops_ratio"] - rows["seam log"]["flops_ratio"]
            extra = floor.batch_equivalents - FLOORS["seam log"].batch_equivalents
            with_heads = TIME * (floor.batch_equivalents + max(0.0, heads - extra))
            note += f"  ({with_heads:.2f} with the heads' operations)"
        lines.append(
            f"{label:10}{row['clock_ratio']:8.2f}{f'{low:.2f}-{high:.2f}':>15}"
            f"{row['clock_ratio_of_minima']:8.2f}{row['cpu_ratio']:8.2f}{allowed:8.2f}"
            f"{row['peak_memory_bytes'] / MIB:9,.0f}{room / MIB:9,.0f}{row['rounds']:7}{note}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure each shape asked for that fits this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["lattice", "smollm2-135m"])
    parser.add_argument("--seconds", type=float, default=300.0, help="to time for, per shape")
    arguments = parser.parse_args()
    for shape in arguments.shape:
        try:
            print(measure(shape, arguments.seconds), flush=True)
        except InputError as error:
            print(f"{shape}: not measured: {error.what}")


if __name__ == "__main__":
    main()
