"""Freed memory is kept: measured by page faults in a fresh process."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from mithridate.allocation import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(5)
def work():
    blocks = [torch.ones(2_000_000) for _ in range(20)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    done = subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, text=True)
    if done.returncode == 5:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kept_memory_needs_no_fresh_pages():
    assert faults("keep") < 0.7 * faults("give back")
