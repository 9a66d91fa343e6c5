"""Nested Python state as JSON plus tensors, and back, without pickle.

State dicts of optimizers, schedulers and the like hold integer keys, tuples, infinities and tensors, none of which JSON
knows. ``flatten_state`` takes the tensors out under dotted names and writes the rest as JSON in which every value that
is not plain JSON is an object with one key that starts with ``$``::

    (1, 2)          {"$tuple": [1, 2]}
    {0: "a"}        {"$dict": [[0, "a"]]}
    float("inf")    {"$float": "inf"}
    a tensor        {"$tensor": "state.0.exp_avg"}

Decoding builds values of these few types and nothing else: no name in the JSON is ever looked up or called.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from everyrank.errors import CheckpointError

Json = Any
"""A value that ``json.dumps(value, allow_nan=False)`` writes and ``json.loads`` reads back unchanged."""


def flatten_state(state: Any) -> tuple[dict[str, torch.Tensor], Json]:
    """Split a nested state into its tensors and a JSON-able rest.

    Args:
        state: Any nesting of dict, OrderedDict, Counter, list, tuple, set, frozenset, None, bool, int, float, complex,
            str, bytes, numpy arrays and numbers, ``torch.Size``, ``torch.dtype`` and tensors.

    Returns:
        The tensors by name (the state's own tensors, not copies), and the rest, to be given to ``unflatten_state``.

    Raises:
        CheckpointError: If the state holds anything else; the message names where.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _encode(state, (), tensors)


def unflatten_state(tensors: Mapping[str, torch.Tensor], rest: Json) -> Any:
    """Put together again what ``flatten_state`` split.

    Args:
        tensors: The tensors by name.
        rest: The JSON-able rest.

    Raises:
        CheckpointError: If a tensor is missing or the rest is not of the known form.
    """
    return _decode(rest, tensors)


def encode_json(state: Any) -> Json:
    """Return nested state without tensors as JSON; the inverse of ``decode_json``.

    Raises:
        CheckpointError: If the state holds a tensor or a type that cannot be written.
    """
    return _encode(state, (), None)


def decode_json(value: Json) -> Any:
    """Return the state that ``encode_json`` wrote."""
    return _decode(value, {})


def _encode(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor] | None) -> Json:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
    if kind in _MAPPINGS:
        pairs = [
            [_encode(key, (*path, "key"), tensors), _encode(item, (*path, str(key)), tensors)]
            for key, item in value.items()
        ]
        return {_MAPPINGS[kind]: pairs}
    if kind in _SEQUENCES:
        items = sorted(value, key=repr) if kind in (set, frozenset) else value
        return {_SEQUENCES[kind]: [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(items)]}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path, tensors)
    return _encode_rare(value, path, tensors)


def _encode_rare(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor] | None) -> Json:
    if type(value) is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if type(value) is complex:
        return {"$complex": [_encode(value.real, path, None), _encode(value.imag, path, None)]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        data = base64.b64encode(value.tobytes()).decode("ascii")
        return {"$ndarray": [value.dtype.str, list(value.shape), data]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"$number": [value.dtype.str, base64.b64encode(value.tobytes()).decode("ascii")]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    raise CheckpointError(
        f"The state at {_where(path)} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint "
        "cannot hold: only numbers, strings, bytes, None, tensors, arrays, and dicts, lists, tuples and sets of them "
        "can be read back without running code. Save what it is made of instead, in its state_dict()."
    )


def _encode_tensor(value: torch.Tensor, path: tuple[str, ...], tensors: dict[str, torch.Tensor] | None) -> Json:
    if tensors is None:
        raise CheckpointError(
            f"The state at {_where(path)} is a tensor, but this part of a checkpoint holds JSON. Give tensors in "
            "save(tensors=...), for example after flatten_state, or turn it into a number with .item()."
        )
    name = base = ".".join(path) or "value"
    number = 1
    while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
        number += 1
        name = f"{base}~{number}"
    tensors[name] = value.detach()
    return {"$tensor": name}


def _where(path: tuple[str, ...]) -> str:
    return repr(".".join(path)) if path else "its top"


def _decode(value: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decode(item, tensors) for key, item in value.items()}
    body = value[tag]
    if tag == "$tensor":
        if body not in tensors:
            raise CheckpointError(f"The checkpoint's state names a tensor {body!r}, but none of its files holds it.")
        return tensors[body]
    if tag in _BUILD_MAPPING:
        return _BUILD_MAPPING[tag]((_decode(key, tensors), _decode(item, tensors)) for key, item in body)
    if tag in _BUILD_SEQUENCE:
        return _BUILD_SEQUENCE[tag](_decode(item, tensors) for item in body)
    if tag in _BUILD_RARE:
        return _BUILD_RARE[tag](body)
    raise CheckpointError(
        f"The checkpoint's state holds {tag!r}, which this version of everyrank does not know. "
        "Read it with the version that its manifest.json names, or a later one."
    )


def _array(body: Json) -> np.ndarray:
    dtype, shape, data = body
    return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype)).reshape(shape).copy()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"The checkpoint's state names a type torch.{name}, which this version of torch lacks.")
    return dtype


_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}
_SEQUENCES: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset", torch.Size: "$size"}
_BUILD_MAPPING: dict[str, Callable[[Any], Any]] = {
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": lambda pairs: Counter(dict(pairs)),
}
_BUILD_SEQUENCE: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$size": lambda items: torch.Size(tuple(items)),
}
_BUILD_RARE: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": base64.b64decode,
    "$complex": lambda body: complex(float(_decode(body[0], {})), float(_decode(body[1], {}))),
    "$ndarray": _array,
    "$number": lambda body: np.frombuffer(base64.b64decode(body[1]), dtype=np.dtype(body[0]))[0],
    "$dtype": _dtype,
}
