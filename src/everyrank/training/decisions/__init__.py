"""What follows from results and counts: stop, best, prune; what is due when."""
