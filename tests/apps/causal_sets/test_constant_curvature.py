"""Curved sprinklings against the geometry of hyperboloids in flat space, which nothing in the package uses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from counted_orders import diamond_volume, is_partial_order, ordering_fraction
from five_sigma import SIGMAS, assert_mean

from everyrank.apps.causal_sets import minkowski
from everyrank.apps.causal_sets.constant_curvature import sprinkle, strength, volume_element

DURATION = 2.0
SIGNS = [-1, 0, 1]


def embed(points: torch.Tensor, a: float) -> torch.Tensor:
    """Stereographic projection of the diamond with tips (±1, 0) onto ``X·X + sign(a) W² = sign(a)``, radius 1.

    Coordinates [.., d] to [.., d + 1], W last; in flat space of signature (-, +, .., +, sign of a).
    """
    scaled = 2 * math.sqrt(abs(a)) * points  # units of the radius of curvature
    quarter = math.copysign(1.0, a) * interval(scaled, scaled) / 4
    return torch.cat([scaled, (1 - quarter)[..., None]], dim=-1) / (1 + quarter)[..., None]


def interval(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left[..., 1:] * right[..., 1:]).sum(-1) - left[..., 0] * right[..., 0]


def volume(dimension: int, duration: np.ndarray | float, sign: int, steps: int = 4000) -> np.ndarray:
    """The volume of a diamond in static coordinates, where ``√-g = r^(d-2)`` and light needs ``r*(r)`` to come to r.

    ``V = S_(d-2) ∫ 2 (T/2 - r*) r^(d-2) dr`` with r* = artanh r (de Sitter), arctan r (anti-de Sitter), r (flat); the
    radius of curvature is 1 and S the surface of the unit sphere. As an integral over r*, by the midpoint rule.
    """
    half = np.asarray(duration, dtype=np.float64)[..., None] / 2
    star = half * (np.arange(steps) + 0.5) / steps
    r = {-1: np.tan, 0: lambda x: x, 1: np.tanh}[sign](star)
    slope = 1 - sign * r**2  # dr / dr*
    sphere = 2 * math.pi ** ((dimension - 1) / 2) / math.gamma((dimension - 1) / 2)
    return sphere * (2 * (half - star) * r ** (dimension - 2) * slope * half / steps).sum(-1)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dimension", [2, 4])
def test_the_density_is_the_volume_element_of_the_embedded_metric(dimension: int, sign: int) -> None:
    a = strength(DURATION, sign)
    points = torch.from_numpy(sprinkle(np.random.default_rng(0), dimension, size=20, a=0.0))
    embedded = embed(points, a)
    ambient = torch.diag(torch.tensor([-1.0, *[1.0] * (dimension - 1), float(sign)], dtype=torch.float64))
    torch.testing.assert_close(((embedded @ ambient) * embedded).sum(-1), torch.full((20,), float(sign)).double())
    jacobian = torch.func.vmap(torch.func.jacrev(lambda point: embed(point, a)))(points)
    metric = jacobian.mT @ ambient @ jacobian
    conformal = metric[:, 1, 1]
    flat = torch.diag(torch.tensor([-1.0, *[1.0] * (dimension - 1)], dtype=torch.float64))
    torch.testing.assert_close(metric, conformal[:, None, None] * flat, rtol=0, atol=1e-12)
    element = metric.det().abs().sqrt()
    found = torch.from_numpy(volume_element(points.numpy(), a))
    torch.testing.assert_close(found / found[0], element / element[0])


@pytest.mark.parametrize("sign", [-1, 1])
def test_order_and_proper_time_are_those_of_the_hyperboloid(sign: int) -> None:
    """Two points are related where their geodesic is timelike: cosh (de Sitter) or cos of its length is X·Y."""
    a = strength(DURATION, sign)
    points = sprinkle(np.random.default_rng(1), 3, size=60, a=a)
    embedded = embed(torch.from_numpy(points), a)
    flipped = embedded * torch.tensor([-1.0, 1.0, 1.0, float(sign)])
    products = sign * (flipped @ embedded.T)  # 1 for a point with itself
    timelike = products > 1 if sign > 0 else products < 1
    timelike.fill_diagonal_(False)
    causal = minkowski.causal_matrix(points)
    np.testing.assert_array_equal(causal | causal.T, timelike.numpy())
    tips = embed(torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64), a)
    product = sign * ((tips[0] * tips[1] * torch.tensor([-1.0, 1.0, 1.0, float(sign)])).sum())
    duration = torch.acosh(product) if sign > 0 else torch.acos(product)
    assert duration.item() == pytest.approx(DURATION)


def test_volumes_of_the_theory_are_those_that_are_known() -> None:
    """In closed form for d = 2, to first order in the curvature for each (Gibbons, Solodukhin, hep-th/0703098)."""
    for duration in (0.5, 2.0):
        assert volume(2, duration, 1) == pytest.approx(4 * math.log(math.cosh(duration / 2)), rel=1e-6)
        assert volume(2, duration, -1) == pytest.approx(-4 * math.log(math.cos(duration / 2)), rel=1e-6)
    for dimension in (2, 3, 4, 5):
        flat = diamond_volume(dimension, 0.1)
        assert volume(dimension, 0.1, 0) == pytest.approx(flat, rel=1e-6)
        for sign in (-1, 1):
            slope = -sign * dimension * (dimension - 1) / (12 * (dimension + 2))
            assert (volume(dimension, 0.1, sign) / flat - 1) / 0.01 == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dimension", [2, 3, 4, 5])
def test_the_past_of_the_middle_holds_its_share_of_the_volume(dimension: int, sign: int) -> None:
    """The lower half is a diamond of half the duration: V(T/2) / V(T), which is 2^-d in flat space alone."""
    rng, a = np.random.default_rng(100 + 10 * dimension + sign), strength(DURATION, sign)
    points = sprinkle(rng, dimension, size=40_000, a=a)
    time, distance = points[:, 0], np.linalg.norm(points[:, 1:], axis=1)
    assert (np.abs(time) + distance <= 1).all()
    assert (np.diff(time) >= 0).all()
    share = float(volume(dimension, DURATION / 2, sign) / volume(dimension, DURATION, sign))
    error = math.sqrt(share * (1 - share) / len(points))
    for inside in (-time > distance, time > distance):
        assert abs(inside.mean() - share) < SIGMAS * error
    assert_mean(time, 0.0)
    for axis in points[:, 1:].T:
        assert_mean(axis, 0.0)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dimension", [2, 3, 4, 5])
def test_ordering_fraction_has_its_mean(dimension: int, sign: int) -> None:
    """An element's past is a diamond too, from the lower tip p to it: the mean is 2 ∫ V(T(p, x)) dV(x) / V(T)²."""
    a = strength(DURATION, sign)
    # x by light-cone coordinates u = t + r and v = t - r from -1 to 1; a half plane, so |u - v| counts both sides.
    grid = -1 + 2 * (np.arange(300) + 0.5) / 300
    u, v = (axis.ravel() for axis in np.meshgrid(grid, grid))
    events = np.stack([(u + v) / 2, (u - v) / 2, *[np.zeros_like(u)] * (dimension - 2)], axis=1)
    weight = np.abs(u - v) ** (dimension - 2) * volume_element(events, a)
    # In units of the tips, where a flat diamond from (-1, 0) to x lasts √((1 + u)(1 + v)); in a curved one the product
    # of the embedded points tells its duration.
    if sign:
        tip = torch.tensor([-1.0, *[0.0] * (dimension - 1)], dtype=torch.float64)
        ambient = torch.tensor([-1.0, *[1.0] * (dimension - 1), float(sign)], dtype=torch.float64)
        product = sign * (embed(torch.from_numpy(events), a) @ (ambient * embed(tip, a)))
        lasts = (torch.acosh(product) if sign > 0 else torch.acos(product)).numpy()
        scale = DURATION
    else:
        lasts, scale = np.sqrt((1 + u) * (1 + v)), 2.0
    table = np.linspace(0, scale, 400)
    volumes = np.interp(lasts, table, volume(dimension, table, sign, steps=500))
    expected = 2 * np.average(volumes, weights=weight) / float(volume(dimension, scale, sign))
    if sign == 0:
        assert expected == pytest.approx({2: 1 / 2, 3: 8 / 35, 4: 1 / 10, 5: 0.0430}[dimension], rel=0.01)
    rng = np.random.default_rng(200 + 10 * dimension + sign)
    orders = [minkowski.causal_matrix(sprinkle(rng, dimension, 40, a)) for _ in range(1000)]
    assert is_partial_order(orders[0])
    assert_mean([ordering_fraction(order) for order in orders], expected)


def test_strength_and_its_ends() -> None:
    assert strength(DURATION, 0) == 0
    assert 4 * math.atanh(math.sqrt(strength(DURATION, 1))) == pytest.approx(DURATION)
    assert 4 * math.atan(math.sqrt(-strength(DURATION, -1))) == pytest.approx(DURATION)
    assert strength(math.pi - 1e-9, -1) == pytest.approx(-1)
    with pytest.raises(ValueError, match="less than π radii"):
        strength(math.pi, -1)
