"""Two processes look ahead, couple and unlearn as one does (`methods.md` D1, D3)."""

import multiprocessing
import socket

import pytest
import torch
from torch import distributed

from mithridate.methods.booster import Booster, BoosterConfig
from mithridate.methods.ctrap import CTRAP, CTRAPConfig
from mithridate.methods.repnoise import RepNoise, RepNoiseConfig
from mithridate.methods.seam import SEAM, SEAMConfig
from mithridate.methods.trajectory import Trajectory, TrajectoryConfig
from mithridate.methods.tvaccine import TVaccine, TVaccineConfig
from mithridate.methods.vaccine import Vaccine, VaccineConfig
from tests.tiny import relative_error, tiny_context, tiny_model

METHODS = {
    "ctrap": lambda: CTRAP(CTRAPConfig(lookahead_radius={"low": 0.1, "high": 0.5})),
    "ctrap exact": lambda: CTRAP(CTRAPConfig(lookahead_radius=0.3, gradient="exact")),
    "ctrap unrolled": lambda: CTRAP(CTRAPConfig(lookahead_direction="unrolled")),
    "seam": lambda: SEAM(SEAMConfig(coupling_weight=0.5, unlearning_layers=1)),
    "seam log exact": lambda: SEAM(SEAMConfig(unlearning="log", hvp="exact")),
    "vaccine": lambda: Vaccine(VaccineConfig()),
    "tvaccine": lambda: TVaccine(TVaccineConfig(layers=2)),
    "booster": lambda: Booster(BoosterConfig(lookahead_radius=0.3)),
    "repnoise": lambda: RepNoise(RepNoiseConfig(batch_size=8, noise_weight=1.0)),
    "seam trajectory": lambda: SEAM(SEAMConfig(coupling_at="trajectory", hvp="exact")),
    "trajectory": lambda: Trajectory(
        TrajectoryConfig(attackers=("sgd", "lora"), retain_kl=0.5, attack_steps=(2, 2))
    ),
    "seam without coupling": lambda: SEAM(SEAMConfig(coupling_weight=0.0)),
}


def gradients():
    found = {}
    for name, make in METHODS.items():
        method, context = make(), tiny_context(tiny_model("full", layers=3), micro_batch_size=4)
        method.prepare(context)
        terms = method.step(context)
        found[name] = [tensor.clone() for tensor in context.space.gradient()], terms
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
    context.set_forkserver_preload(["tests.tiny", "mithridate.methods.seam"])
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
