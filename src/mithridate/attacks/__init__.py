"""Attacks: what someone with the weights in hand would do to them."""

from mithridate.attacks.finetune import AttackRecord, FinetuneConfig, finetune, read_record
from mithridate.attacks.rl import RLConfig, entropy_bound, read_updates, reinforce

__all__ = [
    "AttackRecord",
    "FinetuneConfig",
    "RLConfig",
    "entropy_bound",
    "finetune",
    "read_record",
    "read_updates",
    "reinforce",
]
