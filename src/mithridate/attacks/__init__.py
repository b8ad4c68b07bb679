"""Attacks: what someone with the weights in hand would do to them."""

from mithridate.attacks.finetune import AttackRecord, FinetuneConfig, finetune, read_record

__all__ = ["AttackRecord", "FinetuneConfig", "finetune", "read_record"]
