"""Runs: the run folder, checkpoints, launching processes, signals, progress."""
