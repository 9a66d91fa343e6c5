"""Points of a causal diamond of Minkowski space, and their order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def uniform_points(rng: np.random.Generator, dimension: int, size: int) -> NDArray[np.float64]:
    """Draw points [size, d] independently and uniformly in the diamond with tips at (±1, 0), in no order of time.

    A point at height ``|t| = 1 - s`` sees a ball of radius s, of volume proportional to s^(d-1): so ``s = U^(1/d)``,
    t = ±(1 - s), and x is uniform in the (d-1)-ball of radius s.

    Args:
        rng: The source of randomness.
        dimension: Spacetime dimension d >= 2: one of time, which is column 0, and d - 1 of space.
        size: Number of points.
    """
    radius = rng.random(size) ** (1 / dimension)
    time = (1 - radius) * rng.choice((-1.0, 1.0), size)
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
