"""Two processes look ahead, couple and unlearn as one does (`methods.md` D1, D3)."""

import multiprocessing
import socket

import pytest
import torch
from torch import distributed

from tests.methods.every import EVERY, MASKED, step
from tests.tiny import relative_error


def gradients():
    steps = {name: {} for name in EVERY}
    # The first process has no row with a label.
    steps |= {f"{name}, unlabelled": {"unlabelled": 4} for name in MASKED}
    found = {}
    for name, options in steps.items():
        gradient, terms, _ = step(name.split(",")[0], micro_batch_size=4, **options)
        found[name] = [torch.zeros(()) if g is None else g for g in gradient], terms
    return found


def work(rank, port, folder):
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank
    )
    torch.save(gradients(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this torch build has no gloo",
)
@pytest.mark.filterwarnings("ignore:the look-ahead left")
def test_two_processes_leave_the_gradient_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.methods.every"])
    processes = [context.Process(target=work, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    expected = gradients()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (gradient, terms) in expected.items():
            assert relative_error(found[name][0], gradient) < 1e-9, (rank, name)
            assert found[name][1] == pytest.approx(terms, rel=1e-9), (rank, name)
