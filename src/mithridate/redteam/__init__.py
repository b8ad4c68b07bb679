"""Batteries of attacks on a defended model and its controls: `run_redteam` in ``run``."""
