"""The trainer: the step, evaluation, decisions, history, progress."""
