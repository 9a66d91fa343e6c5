"""Batches of any form keep their type on the way to a device. The device is ``meta``: a real move, without a GPU."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from everyrank.data.containers import map_tensors
from everyrank.training.batch import make_apply, make_mover

META = torch.device("meta")
Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict):
    """As transformers' BatchEncoding: a UserDict with further state, made from a mapping of data."""

    def __init__(self, data: dict[str, Any], encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    names: list[str]
    size: int = field(init=False, default=3)


@attrs.frozen
class Attrs:
    x: Tensor
    inner: Any


class Words(list):
    origin = "somewhere"


class Shape(tuple):
    pass


class Own:
    """A container of one's own, with ``to`` and ``pin_memory`` as torch's documentation asks for."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Own:
        return Own(self.x.to(device))


def x() -> Tensor:
    return torch.ones(2, 3)


BATCHES: list[tuple[Any, Any]] = [
    (lambda: Pair(x(), "y"), lambda b: b.x),
    (lambda: Encoding({"x": x()}, encodings="kept"), lambda b: b["x"]),
    (lambda: OrderedDict(x=x()), lambda b: b["x"]),
    (lambda: defaultdict(list, {"x": x()}), lambda b: b["x"]),
    (lambda: Frozen(x(), ["a"]), lambda b: b.x),
    (lambda: Attrs(1, [Pair(x(), None)]), lambda b: b.inner[0].x),
    (lambda: Words([x(), "word"]), lambda b: b[0]),
    (lambda: Shape((x(), 1)), lambda b: b[0]),
    (lambda: Own(x()), lambda b: b.x),
    (lambda: {"a": [(x(), 1)]}, lambda b: b["a"][0][0]),
]


@pytest.mark.parametrize(
    ("make", "look"),
    BATCHES,
    ids=lambda item: type(item()).__name__ if callable(item) and item.__code__.co_argcount == 0 else "",
)
def test_a_container_keeps_its_type_and_state(make: Any, look: Any) -> None:
    batch, move = make(), make_mover(META, torch.float64)
    assert move is not None
    moved = move(batch)
    assert type(moved) is type(batch)
    assert look(moved).device == META
    assert look(moved).dtype == (torch.float64 if not isinstance(batch, Own) else torch.float32)
    assert look(batch).device.type == "cpu", "the batch itself is left as it was"
    if isinstance(batch, Encoding):
        assert moved.encodings == "kept"
    if isinstance(batch, Frozen):
        assert (moved.names, moved.size) == (["a"], 3)


def test_a_packed_sequence_moves_but_for_its_batch_sizes() -> None:
    packed = pack_sequence([torch.ones(2, 3), torch.ones(4, 3)], enforce_sorted=False)
    move = make_mover(META, torch.float64)
    assert move is not None
    moved = move({"sequence": packed})["sequence"]
    assert type(moved) is PackedSequence
    assert (moved.data.device, moved.data.dtype, moved.sorted_indices.device) == (META, torch.float64, META)
    assert moved.batch_sizes is packed.batch_sizes, "torch wants them on the CPU"
    output, _ = make_apply(nn.GRU(3, 4), packed)(nn.GRU(3, 4), packed)  # the model gets it whole
    assert output.data.shape == (6, 4)


def test_what_is_no_container_is_left_to_the_caller() -> None:
    assert map_tensors([1, "a", None, Own], torch.neg) == [1, "a", None, Own]
    assert map_tensors([1], torch.neg, lambda item: item + 1) == [2]
