"""The configuration of a GNNModel: frozen, JSON-able, and strict about names and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from everyrank.config.schema import Bool, Int, build, field, section
from everyrank.errors import ConfigError


def _as_path(value: Any) -> Any:
    """Turn a class (as ``!pyobject`` gives) into its full path, so that the configuration stays JSON."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Width = Annotated[Int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, BeforeValidator(_as_path)]
Pooling = Literal["mean", "max", "sum"]


@section
class BlockConfig:
    """One message-passing block: layer, normaliser, activation, dropout, and a skip connection around them."""

    out_dim: Width = field(doc="Width of the nodes that come out.")
    in_dim: Width | None = field(
        default=None, doc="Width of the nodes that come in; what the block before puts out, if left out."
    )
    layer: Name = field(
        default="sage",
        doc="Layer: sage, gcn, gat, gatv2, gin, gine, graph, transformer, tag, cheb, resgated, or the "
        "full path of any PyG layer.",
    )
    layer_kwargs: dict[str, Any] = field(factory=dict, doc="Further arguments of the layer.")
    norm: Name = field(
        default="layer",
        doc="Normaliser: none, layer, batch, graph, instance, pair, or a full path. `batch` makes the result "
        "depend on how a batch is shared among ranks.",
    )
    activation: Name = field(default="relu", doc="none, relu, leaky_relu, elu, gelu, silu, tanh, or a full path.")
    dropout: Probability = field(default=0.0, doc="Probability to drop a feature in training.")
    skip: Bool = field(
        default=True, doc="Add the block's input to its output, through a linear map if the widths differ."
    )
    edge_dim: Width | None = field(
        default=None, doc="Width of `edge_attr`, for layers that use edge features; none are passed if left out."
    )
    repeat: Int = field(default=1, ge=1, doc="How many such blocks follow each other.")


@section
class HeadConfig:
    """A perceptron on the pooled graph: class scores (logits) for a classification, values for a regression."""

    out_dim: Width = field(doc="Number of classes, or of values.")
    hidden: tuple[Width, ...] = field(default=(), doc="Widths of the layers in between.")
    activation: Name = field(default="relu", doc="Activation between the layers.")
    dropout: Probability = field(default=0.0, doc="Dropout between the layers.")


@section
class GNNConfig:
    """A graph network: blocks on the nodes, pooling, and one or more heads on each graph."""

    in_dim: Width = field(doc="Width of the node features.")
    blocks: Annotated[tuple[BlockConfig, ...], Field(min_length=1)] = field(doc="Message-passing blocks, in order.")
    heads: Annotated[dict[str, HeadConfig], Field(min_length=1)] = field(
        doc="Heads by name. With one head the model returns its tensor, with several a dictionary."
    )
    pooling: Annotated[tuple[Pooling, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = field(
        default=("mean",), doc="How a graph's nodes become one vector: mean, max, sum, or a list of them, side by side."
    )
    graph_dim: Int = field(
        default=0, ge=0, doc="Width of `graph_features` that are put beside the pooled vector; 0 for none."
    )


def read_config(config: Mapping[str, Any] | GNNConfig, *, path: str = "model") -> GNNConfig:
    """Check a mapping against :class:`GNNConfig`.

    Args:
        config: Nested mappings and sequences, as read from YAML, JSON or OmegaConf.
        path: Where they stand in the whole configuration, for the message.

    Raises:
        ConfigError: With all mistakes at once: the key, what was found, what is allowed, the nearest valid name.
    """
    try:
        return build(GNNConfig, config)
    except ConfigError as error:
        problems = [f"{path}.{problem}" for problem in error.problems] or [str(error)]
        raise ConfigError("The GNNModel cannot be built as configured.", problems) from None
