"""What is measured: probes, trajectories, cost."""
