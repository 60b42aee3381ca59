"""Generators with known ground truth: a checkpoint folder in URSA's layout plus an exact oracle."""
