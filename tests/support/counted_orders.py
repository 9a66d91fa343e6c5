"""What the tests ask of causal sets and the package does not: is it an order at all, how much of it is related."""

from __future__ import annotations

import math

import numpy as np


def is_partial_order(causal: np.ndarray) -> bool:
    """Say whether the relation is irreflexive, antisymmetric and transitive."""
    irreflexive = not causal.diagonal().any()
    antisymmetric = not (causal & causal.T).any()
    between = causal.astype(np.float32) @ causal.astype(np.float32)
    return irreflexive and antisymmetric and not ((between > 0) & ~causal).any()


def ordering_fraction(causal: np.ndarray) -> float:
    """Return the share of pairs that are related, ``r = 2 R / (n (n - 1))``; 0 for fewer than two elements."""
    size = len(causal)
    return 2 * int(causal.sum()) / (size * (size - 1)) if size > 1 else 0.0


def diamond_volume(dimension: int, duration: float) -> float:
    """Return the volume of a causal diamond of Minkowski space: two cones of height T/2 over a ball of radius T/2.

    ``V_d(T) = 2 π^((d-1)/2) (T/2)^d / (d Γ((d+1)/2))`` (Brightwell & Gregory 1991, PRL 66, 260).
    """
    half = duration / 2
    return 2 * math.pi ** ((dimension - 1) / 2) * half**dimension / (dimension * math.gamma((dimension + 1) / 2))
