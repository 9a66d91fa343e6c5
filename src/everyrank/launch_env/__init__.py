"""The only readers of launcher variables: which launcher started this process, and its place in the run."""
