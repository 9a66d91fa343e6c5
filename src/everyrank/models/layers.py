"""Names for graph layers, normalisers and activations, and the import of any other by its full path."""

from __future__ import annotations

import importlib
import linecache
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from everyrank.config.resolve import import_object
from everyrank.errors import ConfigError, UserError, did_you_mean
from everyrank.models.gnn_config import BlockConfig

LAYERS = {
    "sage": "SAGEConv",
    "gcn": "GCNConv",
    "gat": "GATConv",
    "gatv2": "GATv2Conv",
    "gin": "GINConv",
    "gine": "GINEConv",
    "graph": "GraphConv",
    "transformer": "TransformerConv",
    "tag": "TAGConv",
    "cheb": "ChebConv",
    "resgated": "ResGatedGraphConv",
}
"""Short names of layers and the PyG classes they stand for. Every parameter of theirs gets a gradient, as DDP needs."""

NORMS = {
    "none": None,
    "layer": "torch.nn.LayerNorm",
    "batch": "torch.nn.BatchNorm1d",
    "graph": "torch_geometric.nn.GraphNorm",
    "instance": "torch_geometric.nn.InstanceNorm",
    "pair": "torch_geometric.nn.PairNorm",
}
"""Short names of normalisers. ``batch`` makes the result depend on how a batch is shared among ranks; the others
work on each node or each graph alone."""

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
"""Short names of activations."""

_WITH_INNER_MLP = ("GINConv", "GINEConv")
_WITH_CONCATENATED_HEADS = ("GATConv", "GATv2Conv", "TransformerConv")
_OWN_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"ChebConv": {"K": 2}}
_GENERATED = ("_propagate", "_edge_updater")
_IGNORES_WIDTH = ("PairNorm",)


def pyg_nn() -> Any:
    """Import and return ``torch_geometric.nn``.

    Raises:
        UserError: PyTorch Geometric is not installed.
    """
    try:
        return importlib.import_module("torch_geometric.nn")
    except ImportError as error:
        raise UserError(
            f"A GNNModel was asked for, but PyTorch Geometric cannot be imported ({error}). "
            "Install it with: pip install 'everyrank[gnn]'"
        ) from None


def import_path(path: str, *, key: str, names: Mapping[str, Any], kind: str) -> Any:
    """Import ``package.module.Name``.

    Args:
        path: The dotted path as the user wrote it.
        key: Where it stands in the configuration, for the message.
        names: The short names that are allowed as well.
        kind: What is looked for, e.g. "graph layer".

    Raises:
        ConfigError: There is no such thing; the message lists the short names and the nearest one.
    """
    hint = f"Use one of {', '.join(names)}, or the full path of a class."
    if "." not in path:
        raise ConfigError(f"{key}: found {path!r}, which is no {kind}.{did_you_mean(path, names)} {hint}")
    try:
        return import_object(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error} {hint}") from None


def make_layer(config: BlockConfig, in_dim: int, path: str) -> nn.Module:
    """Make a block's graph layer, which maps nodes [n, in_dim] to [n, out_dim].

    Layers with several attention heads share ``out_dim`` among them (unless ``concat`` is false); GIN layers get a
    perceptron of two linear maps inside.
    """
    layer, out_dim, key = config.layer, config.out_dim, f"{path}.layer"
    short = LAYERS.get(layer.lower())
    found = getattr(pyg_nn(), short) if short else import_path(layer, key=key, names=LAYERS, kind="graph layer")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{key}: found {layer!r}, which is no torch module. Name a class of graph layers.")
    arguments: dict[str, Any] = {**_OWN_ARGUMENTS.get(found.__name__, {}), **config.layer_kwargs}
    if config.edge_dim is not None:
        arguments.setdefault("edge_dim", config.edge_dim)
    positional: tuple[Any, ...] = (in_dim, out_dim)
    if found.__name__ in _WITH_INNER_MLP and "nn" not in arguments:
        positional = (nn.Sequential(nn.Linear(in_dim, out_dim), nn.ReLU(), nn.Linear(out_dim, out_dim)),)
    elif found.__name__ in _WITH_CONCATENATED_HEADS and arguments.get("concat", True):
        heads = arguments.get("heads", 1)
        if out_dim % heads:
            raise ConfigError(
                f"{path}.out_dim: found {out_dim}, which cannot be shared among {heads} attention heads. "
                f"Choose a multiple of {heads}, or set layer_kwargs.concat to false."
            )
        positional = (in_dim, out_dim // heads)
    return construct(found, *positional, key=f"{key}_kwargs", **arguments)


def make_norm(norm: str, width: int, key: str) -> nn.Module | None:
    """Make a normaliser for nodes [n, width]; None for ``none``."""
    path = NORMS.get(norm.lower(), norm)
    if path is None:
        return None
    if path.startswith("torch_geometric."):
        pyg_nn()
    found = import_path(path, key=key, names=NORMS, kind="normaliser")
    return construct(found, *(() if found.__name__ in _IGNORES_WIDTH else (width,)), key=key)


def make_activation(activation: str, key: str) -> nn.Module:
    """Make an activation by its short name or full path."""
    found = ACTIVATIONS.get(activation.lower())
    return construct(found or import_path(activation, key=key, names=ACTIVATIONS, kind="activation"), key=key)


@contextmanager
def _no_files_left() -> Iterator[None]:
    """Remove the Python files that PyG's layers write to the temporary folder when a class is first used, and leave.

    They are loaded by then; their source stays in ``linecache`` for tracebacks and compilers.
    """
    before, wrote_bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = wrote_bytecode
        for name in set(sys.modules) - before:
            file = Path(getattr(sys.modules[name], "__file__", None) or "")
            if name.endswith(_GENERATED) and file.parent == Path(tempfile.gettempdir()) and file.exists():
                source = file.read_text(encoding="utf-8")
                linecache.cache[str(file)] = (len(source), None, source.splitlines(keepends=True), str(file))
                file.unlink()


def construct(cls: Callable[..., nn.Module], *args: Any, key: str, **kwargs: Any) -> nn.Module:
    """Construct a module; arguments that it does not take are the user's mistake."""
    try:
        with _no_files_left():
            return cls(*args, **kwargs)
    except (TypeError, ValueError) as error:
        name = getattr(cls, "__name__", str(cls))
        raise ConfigError(f"{key}: {name} cannot be made with {kwargs or 'these arguments'}: {error}") from error
