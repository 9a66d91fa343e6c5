"""The global permutation of samples, its sharding over ranks, and loaders."""
