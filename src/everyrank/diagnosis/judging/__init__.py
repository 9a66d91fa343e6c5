"""Judges: who is guilty of a crash or a stall, which host is lost, which rank is slow."""
