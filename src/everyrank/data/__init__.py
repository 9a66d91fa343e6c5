"""The global order of samples, its sharding over ranks, and loaders."""
