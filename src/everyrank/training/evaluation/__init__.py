"""Validation and tests: each sample counted once, whatever the ranks share."""
