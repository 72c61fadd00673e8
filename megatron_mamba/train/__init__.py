"""The trainer: loop, metrics, progress and plots."""
