from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from mithridate.redteam import processes
from mithridate.redteam.processes import run_in_processes
from tests.redteam.jobs import work


def test_one_that_fails_or_dies_takes_no_other_with_it(tmp_path):
    before = os.environ.get("OMP_NUM_THREADS")
    names = ["a", "raise", "b", "die", "c", "exit", "d"]
    jobs = [(str(tmp_path), name) for name in names]
    done = list(run_in_processes(work, deque(jobs), processes=2))
    errors = {one.job[1]: one.error for one in done}
    assert set(errors) == set(names)
    assert {name for name in names if errors[name] is None} == {"a", "b", "c", "d"}
    assert errors["raise"] == "ValueError: this attack is broken"
    assert {one.cause for one in done if one.job[1] == "raise"} == {"ValueError"}
    assert "SIGKILL" in errors["die"]
    assert errors["exit"] == "its process ended with code 3"
    written = [(tmp_path / name).read_text().split() for name in "abcd"]
    assert {threads for _, threads in written} == {"1"}
    assert str(os.getpid()) not in {process for process, _ in written}
    assert os.environ.get("OMP_NUM_THREADS") == before


class DiesAsItStarts:
    """A job that ends the process which unpickles it, before that has begun to work."""

    def __reduce__(self):
        return os._exit, (7,)


def test_a_process_that_dies_as_it_starts_fails_its_job_alone(tmp_path):
    jobs = [(str(tmp_path), DiesAsItStarts()), (str(tmp_path), "a")]
    done = list(run_in_processes(work, deque(jobs), processes=2))
    assert sorted(str(one.error) for one in done) == ["None", "its process ended with code 7"]
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, BrokenPipeError])
def test_a_pipe_that_breaks_or_is_reset_is_the_end_of_one_job(tmp_path, monkeypatch, error):
    broken = []

    class Pipe(Connection):
        def recv(self):
            if not broken:
                broken.append(1)
                raise error
            return super().recv()

        def send(self, job):
            super().send(job)
            if len(broken) == 0 and error is not EOFError:
                raise error

    started = processes._start

    def start(function):
        process, pipe = started(function)
        ours = Pipe(os.dup(pipe.fileno()))
        pipe.close()
        return process, ours

    monkeypatch.setattr(processes, "_start", start)
    jobs = deque([(str(tmp_path), name) for name in "ab"])
    done = {one.job[1]: one.error for one in run_in_processes(work, jobs, processes=1)}
    assert list(done) == ["a", "b"]
    assert done["a"] == "its process ended with code 0"
    assert done["b"] is None


def test_where_no_process_can_be_started_every_job_fails_and_says_so(monkeypatch):
    def refuse(function):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(processes, "_start", refuse)
    done = list(run_in_processes(work, deque([1, 2]), processes=2))
    assert [one.job for one in done] == [1, 2]
    assert {one.error for one in done} == {
        "no process could be started: Resource temporarily unavailable"
    }


def test_leaving_early_ends_every_process(tmp_path):
    jobs = [(str(tmp_path), "a"), (str(tmp_path), "wait"), (str(tmp_path), "never")]
    running = run_in_processes(work, deque(jobs), processes=2)
    next(running)
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("waiting-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    process = int(found[0].name.removeprefix("waiting-"))
    running.close()
    assert not psutil.pid_exists(process)


def test_processes_leave_when_the_one_that_started_them_is_killed(tmp_path):
    script = (
        "from collections import deque\n"
        "from mithridate.redteam.processes import run_in_processes\n"
        "from tests.redteam.jobs import work\n"
        "if __name__ == '__main__':\n"
        f"    list(run_in_processes(work, deque([({str(tmp_path)!r}, 'wait')]), processes=1))\n"
    )
    file = tmp_path / "battery.py"
    file.write_text(script)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, file], env={**os.environ, "PYTHONPATH": str(root)})
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("waiting-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = psutil.Process(int(found[0].name.removeprefix("waiting-")))
    parent.kill()
    parent.wait()
    worker.wait(30)  # its job sleeps for a minute


def test_a_finished_job_may_bring_another(tmp_path):
    jobs = deque([(str(tmp_path), "a")])
    seen = []
    for done in run_in_processes(work, jobs, processes=2):
        seen.append(done.job[1])
        if seen == ["a"]:
            jobs.append((str(tmp_path), "b"))
    assert seen == ["a", "b"]


def test_no_jobs_no_processes():
    assert list(run_in_processes(work, deque(), processes=2)) == []
