"""Generators go on where they were."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from everyrank.checkpoint.encoding import decode_json, encode_json
from everyrank.checkpoint.rng import capture_rng, restore_rng


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_all_generators_draw_what_they_would_have_drawn() -> None:
    random.gauss(0, 1)
    np.random.randn()  # both keep a second normal number back, which is part of their state
    state = decode_json(json.loads(json.dumps(encode_json(capture_rng()), allow_nan=False)))
    expected = [draw() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    restore_rng(state)
    assert [draw() for _ in range(3)] == expected


def test_what_a_state_does_not_hold_is_left_alone() -> None:
    torch.manual_seed(3)
    restore_rng({})
    first = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), first)
