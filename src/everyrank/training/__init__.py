"""The trainer: the step, evaluation, early stopping, history, progress."""
