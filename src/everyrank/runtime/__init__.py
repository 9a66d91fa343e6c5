"""Inside one process: who it is, its device, its process group, its collectives and its logs."""
