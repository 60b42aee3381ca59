"""Scoring: students and teacher on the same prompts and seeds, against exact truth."""
