"""Figures: functions from data to a matplotlib Figure, used by notebooks, widgets and the training loop alike."""
