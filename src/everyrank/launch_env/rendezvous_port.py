"""A TCP port that all processes of a job find by themselves, where their launcher names none."""

from __future__ import annotations

import hashlib

_LOWEST, _COUNT = 15000, 15000  # below the ephemeral ports (Linux: from 32768), above the well-known services


def derive_port(*parts: str) -> int:
    """Return the port for the job named by ``parts``: the same on all its processes, most likely free of other jobs.

    Args:
        parts: What tells this job from others, for example a scheduler's job and step id.
    """
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return _LOWEST + int.from_bytes(digest[:8], "big") % _COUNT
