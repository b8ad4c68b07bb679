"""One function on two processes of a gloo group."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

NEEDS_GLOO = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this torch build has no gloo",
)


def _work(rank: int, port: int, folder: Path, make: Callable[..., Any], given: tuple) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank
    )
    torch.save(make(*given), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@contextmanager
def on_two_processes(
    folder: Path, make: Callable[..., Any], *given: Any, preload: str, seconds: float = 120.0
) -> Iterator[list[Any]]:
    """Run ``make(*given)`` on two processes beside the body; yields what both returned, at its end.

    The list that is given is filled when the body ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    processes = [
        context.Process(target=_work, args=(rank, port, folder, make, given)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found: list[Any] = []
    yield found
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    found += [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
