"""Checkpoints: written beside, verified, found, kept."""
