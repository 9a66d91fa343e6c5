"""State dicts come back exactly, types included, and decoding can build nothing but plain values."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everyrank.checkpoint.encoding import decode_json, encode_json, flatten_state, unflatten_state
from everyrank.errors import CheckpointError


def same(first: object, second: object) -> bool:
    """Equality that also looks at types and at the bits of numbers."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float):
        return math.isnan(first) == math.isnan(second) and (math.isnan(first) or repr(first) == repr(second))
    return first == second


def through_json(value: object) -> object:
    tensors, rest = flatten_state(value)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return unflatten_state(tensors, json.loads(json.dumps(rest, allow_nan=False)))


keys = st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.just("$tuple"), st.just("$")
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["$tuple", "$dict", "$tensor", "a"]), inner, max_size=3),
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(nested)
def test_any_nested_state_comes_back(value: object) -> None:
    assert same(through_json(value), value)
    assert same(decode_json(json.loads(json.dumps(encode_json(value), allow_nan=False))), value)


def test_rare_types_come_back() -> None:
    value = {
        "counter": Counter({3: 1, 7: 2}),
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "set": {1, 2},
        "frozen": frozenset({"x"}),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "complex": complex(1.5, -math.inf),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "number": np.float32(0.1),
        "tensors": [torch.tensor(1.5), (torch.ones(0, 3, dtype=torch.bfloat16),)],
        "a": {"b": torch.zeros(1)},
        "a.b": torch.ones(2),
    }
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.Adagrad([{"params": p[:1], "lr": 1.0}, {"params": p[1:]}], lr=0.1),
        lambda p: torch.optim.LBFGS(p),
    ],
)
def test_optimizers_go_on_as_if_never_saved(make) -> None:
    def run(num_steps: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(num_steps):

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = make(list(model.parameters()))
    run(3, model, optimizer)
    restored = torch.nn.Linear(3, 2)
    restored.load_state_dict(model.state_dict())
    other = make(list(restored.parameters()))
    other.load_state_dict(through_json(optimizer.state_dict()))
    run(3, model, optimizer)
    run(3, restored, other)
    assert torch.equal(model.weight, restored.weight)


def test_schedulers_come_back() -> None:
    def schedulers() -> list:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
        lr = torch.optim.lr_scheduler
        return [
            lr.MultiStepLR(optimizer, [2, 2, 5]),
            lr.CosineAnnealingWarmRestarts(optimizer, 3),
            lr.OneCycleLR(optimizer, 0.2, total_steps=9),
            lr.ReduceLROnPlateau(optimizer),
            lr.SequentialLR(optimizer, [lr.LinearLR(optimizer), lr.ExponentialLR(optimizer, 0.9)], [3]),
        ]

    for before, after in zip(schedulers(), schedulers(), strict=True):
        state = before.state_dict()
        after.load_state_dict(through_json(state))
        assert same(through_json(state), state)
        assert same(after.state_dict(), before.state_dict())


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("value", [Evil(), print, pickle.dumps, object(), np.array([Evil()], dtype=object)])
def test_what_would_need_code_to_come_back_is_refused_by_place(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"'outer\.1'"):
        flatten_state({"outer": [0, value]})


def test_a_tensor_where_json_belongs_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'a' is a tensor.*\.item\(\)"):
        encode_json({"a": torch.ones(1)})


@pytest.mark.parametrize("rest", [{"$call": ["os.system", "true"]}, {"$tensor": "gone"}, {"$dtype": "load"}])
def test_unknown_content_is_refused_and_not_looked_up(rest: object) -> None:
    with pytest.raises(CheckpointError):
        unflatten_state({}, rest)
