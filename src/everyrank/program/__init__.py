"""Somebody's own program on every rank: what it is, what it is told, and how it runs as it would by itself."""
