"""How much memory a piece of work holds at its peak, by the allocators' own books.

What the operating system reports for a process is blind here: freed blocks stay with it, and
libraries weigh more than a small model. On a CPU torch's profiler records every block that is
taken and given back; a GPU's allocator keeps its own peak.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_MEMORY_EVENT = "[memory]"


@dataclass
class MemoryBook:
    """Bytes on each device (``cpu``, ``cuda:0``, ...), counted from when the book was opened.

    Attributes
    ----------
    held
        Still taken at the end of the last `watch`; below 0 where more was given back than taken.
    peak
        Most at one time during the last `watch`.
    reserved
        Most that a GPU's allocator had set aside during the last `watch`, in all.
    """

    held: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    _start: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follow the body's memory; between two watches of one book nothing may be freed.

        A block of host memory that was taken before the first watch and is given back during one
        is not noticed.
        """
        # Kineto announces every start and stop on standard error otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        for index in range(torch.cuda.device_count()):
            self._start.setdefault(f"cuda:{index}", torch.cuda.memory_allocated(index))
            torch.cuda.reset_peak_memory_stats(index)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield
        profiler: Any = record.profiler
        now = most = self.held.get("cpu", 0)
        for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == _MEMORY_EVENT and event.device_type().name == "CPU":
                now += event.nbytes()
                most = max(most, now)
        self.held["cpu"], self.peak["cpu"] = now, most
        for name, start in self._start.items():
            self.held[name] = torch.cuda.memory_allocated(name) - start
            self.peak[name] = torch.cuda.max_memory_allocated(name) - start
            self.reserved[name] = torch.cuda.max_memory_reserved(name)


def bytes_of(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Return the bytes that ``tensors`` occupy on each device; shared storage counts once."""
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in tensors
    }
    found: dict[str, int] = {}
    for (device, _), size in storages.items():
        found[str(device)] = found.get(str(device), 0) + size
    return found
