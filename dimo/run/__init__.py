"""A run as a folder and as processes: checkpoints, launching, signals, progress."""
