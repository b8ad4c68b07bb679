"""Tiny immunisations in processes of their own, which can be killed at a chosen moment.

The processes come from a fork server that has imported torch once: a second each, not ten.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from transformers import Trainer

from mithridate.errors import InputError, RunInterruptedError, RunStoppedError
from mithridate.training import TrainingConfig, immunise, trainer
from tests.training.tiny_world import method, tiny_examples, tiny_model, tiny_tokenizer

STEPS = 12
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "peft"])


def run(folder, name, where=None, step=None, **options):
    """Run in a process of its own; return its exit code.

    ``where`` is ``step`` (SIGKILL in the middle of a step), ``save`` (SIGKILL while the
    optimiser's state is being written), ``seal`` (SIGKILL after the save, before the mark),
    ``release`` (SIGKILL while the final model is being written), ``interrupt`` (SIGINT in the
    middle of a step) or ``None``.
    """
    return launch([{}], folder, name, where, step, options)[0]


def run_two(folder, name, where=None, step=None, **options):
    """Run as two gloo processes on this machine; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return launch(ranks, folder, name, where, step, options)


def run_beside(folder, name):
    """Run while another run waits in the same folder; return both exit codes, that one's first.

    The second one's error is left in ``said.txt`` beside the folder.
    """
    sign = folder.parent / "holds"
    first = CONTEXT.Process(target=_main, args=({"SIGN": str(sign)}, folder, name, "hold", 4, {}))
    first.start()
    deadline = time.monotonic() + 60
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    second = launch([{}], folder, name, None, None, {})[0]
    sign.unlink()
    first.join(60)
    return first.exitcode, second


def launch(environments, *arguments):
    started = [CONTEXT.Process(target=_main, args=(env, *arguments)) for env in environments]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _main(environment, folder, name, where, step, options):
    os.environ.update(environment)
    # Its hooks would be quiet, but it would hold a parameter-sized bucket for nothing.
    torch.nn.parallel.DistributedDataParallel.__init__ = None
    torch.set_num_threads(1)
    made = method(name)
    if where is not None:
        _arm(made, where, step)
    settings = {"steps": STEPS, "learning_rate": 1e-2, "save_every": 3, "warmup_steps": 2}
    config = TrainingConfig(**(settings | options))
    try:
        immunise(tiny_model(), tiny_tokenizer(), tiny_examples(), made, config, folder)
    except RunInterruptedError as error:
        (folder / "said.txt").write_text(str(error))
        sys.exit(130)
    except InputError as error:
        (folder.parent / "said.txt").write_text(str(error))
        sys.exit(2)
    except RunStoppedError as error:
        (folder / "said.txt").write_text(str(error))
        sys.exit(3)


def _arm(made, where, step):
    def die():
        if where == "hold":
            sign = Path(os.environ["SIGN"])
            sign.touch()
            while sign.exists():
                time.sleep(0.02)
            return
        os.kill(os.getpid(), signal.SIGINT if where == "interrupt" else signal.SIGKILL)

    if where in ("step", "interrupt", "hold"):
        inner = made.step

        def step_and_die(context):
            terms = inner(context)
            if context.step == step:
                die()
            return terms

        made.step = step_and_die
    elif where == "save":
        save = Trainer._save_optimizer_and_scheduler

        def save_and_die(self, output_dir):
            save(self, output_dir)
            if self.state.global_step == step:
                os.truncate(Path(output_dir) / "optimizer.pt", 100)
                die()

        Trainer._save_optimizer_and_scheduler = save_and_die
    elif where == "release":
        trainer.save_release = lambda *_, **__: die()
    else:
        seal = trainer.seal

        def seal_or_die(folder):
            if folder.name == f"checkpoint-{step}":
                die()
            seal(folder)

        trainer.seal = seal_or_die
