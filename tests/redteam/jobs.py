"""Jobs for processes of their own: nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def work(job):
    """Do what the job says; each leaves a file with its process and its threads."""
    folder, what = job
    if what == "raise":
        raise ValueError("this attack is broken\nand says more")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "wait":
        Path(folder, f"waiting-{os.getpid()}").touch()
        time.sleep(60)
    Path(folder, what).write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
