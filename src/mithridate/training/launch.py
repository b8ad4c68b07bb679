"""How a run is launched and stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mithridate.errors import InputError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_unsupported_launch(environment: Mapping[str, str]) -> None:
    """Refuse launch configurations in which perturbing and restoring weights is not exact.

    Parameters
    ----------
    environment
        What ``accelerate launch`` has set.

    Raises
    ------
    InputError
        Naming the configuration (`methods.md` D2).
    """
    name = None
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        name = f"FSDP{environment.get('FSDP_VERSION', '1')}"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        name = f"DeepSpeed ZeRO-{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if name:
        raise InputError(
            f"immunisation does not run under {name}: its sharded or engine-owned weights cannot "
            "be moved and restored exactly",
            where="accelerate launch",
            mend="launch plain multi-process training (accelerate launch --multi_gpu, or torchrun)",
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise InputError(
            f"accelerate's mixed precision ({precision}) would also round the passes that must "
            "be in true float32",
            where="accelerate launch",
            mend="launch with --mixed_precision no and set training.autocast: true",
        )
    # With --cpu accelerate names a meeting point for the processes asked for, and starts one.
    alone = "MASTER_ADDR" in environment and not any(
        name in environment for name in ("WORLD_SIZE", *_MPI_SIZES)
    )
    if alone and environment.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise InputError(
            "accelerate was asked for several processes and started only this one: with --cpu it "
            "needs MPI",
            where="accelerate launch --cpu",
            mend="use torchrun --nproc_per_node N, or accelerate launch --multi_gpu "
            "--num_processes N, which serves processors too",
        )


class StopRequest:
    """Whether the user asked the run to stop."""

    requested = False


@contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM) into "finish this step, save, stop".

    A second one stops at once. Processes of a multi-process launch would not get it at the same
    step, so there the signal keeps its usual effect.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread() or trainer.args.world_size > 1:
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(*_: object) -> None:
        stop.requested = True
        restore()

    class Stopper(TrainerCallback):
        def on_step_end(
            self,
            args: TrainingArguments,  # noqa: ARG002
            state: TrainerState,  # noqa: ARG002
            control: TrainerControl,
            **_: Any,
        ) -> None:
            if stop.requested:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(Stopper())
    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
