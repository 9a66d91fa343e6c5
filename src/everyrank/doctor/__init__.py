"""What a machine and its environment can do, and what will bite: ``everyrank doctor``."""
