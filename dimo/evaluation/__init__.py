"""Evaluation: student and teacher on the same prompts and noise, scored by an oracle or by reference-free metrics."""
