"""What a training says: history, trackers, progress, plots."""
