"""The trainer that drives a method over streams, with checkpoints that resume bit for bit."""

from mithridate.training.checkpoints import newest_complete
from mithridate.training.config import TrainingConfig
from mithridate.training.runs import ImmunisationResult
from mithridate.training.streams import StreamSampler
from mithridate.training.trainer import ImmunisationTrainer, immunise

__all__ = [
    "ImmunisationResult",
    "ImmunisationTrainer",
    "StreamSampler",
    "TrainingConfig",
    "immunise",
    "newest_complete",
]
