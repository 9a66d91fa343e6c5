"""Poisson sprinklings into a causal diamond of Minkowski space: the orders that do look like a spacetime."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def diamond_volume(dimension: int, duration: float = 1.0) -> float:
    """Return the spacetime volume of a causal diamond (Alexandrov interval).

    ``V_d(T) = 2 π^((d-1)/2) (T/2)^d / (d Γ((d+1)/2))``: two cones of height ``T/2`` over a (d-1)-ball of radius
    ``T/2`` (Myrheim 1978, "Statistical geometry", CERN TH.2538; Brightwell & Gregory 1991, PRL 66, 260).

    Args:
        dimension: Spacetime dimension d, one of time and d - 1 of space; at least 2.
        duration: Proper time T between the diamond's lower and upper tip, in the unit of the coordinates.
    """
    _check(dimension, duration)
    half = duration / 2
    return 2 * math.pi ** ((dimension - 1) / 2) * half**dimension / (dimension * math.gamma((dimension + 1) / 2))


def density_for_mean_size(mean_size: float, dimension: int, duration: float = 1.0) -> float:
    """Return the density rho (points per volume) at which a diamond holds ``mean_size`` points on average."""
    return mean_size / diamond_volume(dimension, duration)


def sprinkle(
    rng: np.random.Generator,
    dimension: int,
    *,
    density: float | None = None,
    size: int | None = None,
    duration: float = 1.0,
) -> NDArray[np.float64]:
    """Sprinkle points uniformly by volume into the diamond between (-T/2, 0) and (T/2, 0).

    A point at height ``|t| = T/2 - s`` sees a ball of radius s, of volume proportional to s^(d-1): so
    ``s = (T/2) U^(1/d)``, t = ±(T/2 - s), and x is uniform in the (d-1)-ball of radius s.

    Args:
        rng: The source of randomness.
        dimension: Spacetime dimension d >= 2.
        density: Points per volume; the number of points is then Poisson(density · V_d(T)).
        size: A fixed number of points instead (a binomial process). Exactly one of the two is given.
        duration: Proper time T between the tips.

    Returns:
        Coordinates [n, d], sorted by time, which is column 0.
    """
    _check(dimension, duration)
    if (density is None) == (size is None):
        raise ValueError("sprinkle() needs either a density or a size, and not both.")
    if size is None:
        assert density is not None
        size = int(rng.poisson(density * diamond_volume(dimension, duration)))
    return sort_by_time(uniform_points(rng, dimension, size, duration))


def uniform_points(rng: np.random.Generator, dimension: int, size: int, duration: float = 1.0) -> NDArray[np.float64]:
    """Draw points [size, d] independently and uniformly in the diamond, in no order of time."""
    radius = duration / 2 * rng.random(size) ** (1 / dimension)
    time = (duration / 2 - radius) * rng.choice((-1.0, 1.0), size)
    return np.column_stack((time, _in_unit_ball(rng, size, dimension - 1) * radius[:, None]))


def sort_by_time(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sort points [n, d] by time, which is column 0."""
    return points[np.argsort(points[:, 0], kind="stable")]


def causal_matrix(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the causal order of points in Minkowski space.

    Args:
        points: Coordinates [n, d], time in column 0.

    Returns:
        Boolean matrix [n, n]; entry (i, j) says that point i precedes point j, that is ``t_j - t_i > |x_j - x_i|``.
        It is strictly upper triangular when the points are sorted by time.
    """
    time, space = points[:, 0], points[:, 1:].T
    later = time[None, :] - time[:, None]
    apart = sum((axis[None, :] - axis[:, None]) ** 2 for axis in space)
    return (later > 0) & (later * later > apart)


def _in_unit_ball(rng: np.random.Generator, size: int, dimension: int) -> NDArray[np.float64]:
    """Return points [size, dimension], uniform in the unit ball: an isotropic direction times U^(1/dimension)."""
    if dimension == 1:
        return rng.uniform(-1.0, 1.0, (size, 1))
    direction = rng.standard_normal((size, dimension))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return direction * rng.random((size, 1)) ** (1 / dimension)


def _check(dimension: int, duration: float) -> None:
    if dimension < 2:
        raise ValueError(f"A causal diamond needs at least 2 spacetime dimensions, found {dimension}.")
    if not duration > 0:
        raise ValueError(f"The diamond's duration must be positive, found {duration}.")
