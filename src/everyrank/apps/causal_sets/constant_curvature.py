"""Sprinklings into causal diamonds of de Sitter and anti-de Sitter space.

A spacetime of constant curvature K = ±1/l² is conformally flat: around any point there are coordinates in which

    ds² = η_μν dx^μ dx^ν / (1 + K x²/4)²,    x² = η_μν x^μ x^ν = r² - t²

(Riemann's form; Wolf, "Spaces of Constant Curvature"; it holds in every signature). K > 0 is de Sitter,
K < 0 anti-de Sitter. Light cones are those of Minkowski space, so **the order of given points is the flat order**; what
tells curvature is where the points lie: their density is the volume element ``(1 + K x²/4)^-d``.

With the diamond's tips at (±τ, 0), in units of τ, all depends on the one number ``a = K τ²/4`` between -1 and 1: the
density is ``(1 + a (r² - t²))^-d``. De Sitter crowds the points near the tips, anti-de Sitter near the waist. The
proper time between the tips is ``T = 4 l artanh(√a)`` in de Sitter space, which has room for any, and
``T = 4 l arctan(√-a)`` in anti-de Sitter space: below π l, where the diamond reaches the boundary at infinity.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from everyrank.apps.causal_sets.minkowski import sort_by_time, uniform_points


def strength(duration: float, sign: int) -> float:
    """Return ``a = K τ²/4`` of the diamond whose tips are ``duration`` apart.

    Args:
        duration: Proper time T between the tips in units of the radius of curvature l; below π if ``sign`` is -1.
        sign: The sign of the curvature: 1 for de Sitter, -1 for anti-de Sitter, 0 for Minkowski.
    """
    if sign < 0:
        if duration >= math.pi:
            raise ValueError(f"A diamond of anti-de Sitter space lasts less than π radii, found {duration}.")
        return -(math.tan(duration / 4) ** 2)
    return math.tanh(duration / 4) ** 2 if sign else 0.0


def volume_element(points: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Return the density ``(1 + a (r² - t²))^-d`` [n] at points [n, d] of the diamond with tips at (±1, 0)."""
    interval = (points[:, 1:] ** 2).sum(axis=1) - points[:, 0] ** 2
    return (1 + a * interval) ** -float(points.shape[1])


def sprinkle(rng: np.random.Generator, dimension: int, size: int, a: float) -> NDArray[np.float64]:
    """Sprinkle points by volume into the diamond with tips at (±1, 0), by rejection from the uniform distribution.

    The volume element is at most ``(1 - |a|)^-d``, at the tips (a > 0) or at the waist (a < 0).

    Args:
        rng: The source of randomness.
        dimension: Spacetime dimension d >= 2.
        size: Number of points n: a Poisson process, given its number of points.
        a: Curvature and size of the diamond, see :func:`strength`.

    Returns:
        Conformal coordinates [n, d], sorted by time; :func:`~.minkowski.causal_matrix` gives their order.
    """
    highest, accepted, found = (1 - abs(a)) ** -float(dimension), [], 0
    while found < size:
        proposed = uniform_points(rng, dimension, 4 * size)
        kept = proposed[rng.random(len(proposed)) * highest < volume_element(proposed, a)]
        accepted.append(kept)
        found += len(kept)
    return sort_by_time(np.concatenate(accepted)[:size])
