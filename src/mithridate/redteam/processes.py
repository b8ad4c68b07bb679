"""Independent jobs in processes of their own: one that fails or dies takes no other with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE = 5.0


@dataclass(frozen=True, kw_only=True)
class Finished(Generic[T]):
    """A job that is over.

    Attributes
    ----------
    error
        Why it failed, in one line; None if it did not.
    cause
        The name of the exception's class; empty where the process died.
    """

    job: T
    error: str | None
    cause: str = ""


def cores() -> int:
    """Return the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_in_processes(
    function: Callable[[T], None], jobs: deque[T], *, processes: int
) -> Generator[Finished[T], None, None]:
    """Run every job in one of several spawned processes, each on one thread.

    A process takes one job after another. Where it dies, its job has failed and another process
    takes its place. Leaving the generator early, as Ctrl-C does, ends all of them.

    Parameters
    ----------
    function
        Found by its module's name in the new process, as the jobs' classes are.
    jobs
        Taken off the left; the caller may add more whenever one is finished.
    processes
        At most.

    Yields
    ------
    Finished
        In the order in which the jobs end.
    """
    busy: dict[Connection, tuple[BaseProcess, T]] = {}
    idle: list[tuple[BaseProcess, Connection]] = []
    try:
        while jobs or busy:
            while jobs and len(busy) < processes:
                try:
                    process, connection = idle.pop() if idle else _start(function)
                except OSError as failure:
                    if busy:
                        break  # one of those that run takes the job
                    why = f"no process could be started: {failure.strerror or failure}"
                    yield Finished(job=jobs.popleft(), error=why)
                    continue
                job = jobs.popleft()
                busy[connection] = process, job
                _send(connection, job)
            for ready in wait(list(busy)) if busy else ():
                assert isinstance(ready, Connection), "only pipes are waited for"
                process, job = busy.pop(ready)
                try:
                    cause, error = ready.recv()
                except (EOFError, OSError):  # a process that dies as it starts resets the pipe
                    ready.close()
                    _end([process])
                    yield Finished(job=job, error=_death(process.exitcode))
                else:
                    idle.append((process, ready))
                    yield Finished(job=job, error=error, cause=cause)
    finally:
        # Those without a job leave by themselves when nobody can send them one any more.
        for _, connection in idle:
            connection.close()
        for process, _ in busy.values():
            process.terminate()
        _end([*(process for process, _ in idle), *(process for process, _ in busy.values())])


def _start(function: Callable[[Any], None]) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Set here, for a new process reads them when it imports its numerical libraries.
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    try:
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    return process, ours


def _send(connection: Connection, job: Any) -> None:
    try:
        connection.send(job)
    except OSError:  # broken, or reset
        return  # The process is dead; waiting for it finds its end.


def _leave_with_parent() -> None:
    """End this process, whatever it is doing, when its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a served process was started by another"
    wait([parent.sentinel])
    os._exit(1)


def _serve(connection: Connection, function: Callable[[Any], None]) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The libraries' own deprecations, which would garble the parent's display.
    warnings.simplefilter("ignore", FutureWarning)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        cause, error = "", None
        try:
            function(job)
        except Exception as failure:  # whatever it is, the other attacks go on
            cause = type(failure).__name__
            error = f"{cause}: {failure}".splitlines()[0]
        connection.send((cause, error))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = ": out of memory?" if -code == signal.SIGKILL else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with code {code}"


def _end(held: Sequence[BaseProcess]) -> None:
    for process in held:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
