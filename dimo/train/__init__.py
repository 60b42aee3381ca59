"""The engine: configuration, the training loop, the run folder."""
