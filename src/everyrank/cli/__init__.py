"""The command line: compose, validate, name the folder, plan, run."""
