"""The configuration of a GNNModel: frozen, JSON-able, and strict about names and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from everyrank.errors import ConfigError, did_you_mean

_STRICT = ConfigDict(extra="forbid")


def _as_path(value: Any) -> Any:
    """Turn a class (as ``!pyobject`` gives) into its full path, so that the configuration stays JSON."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Width = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, BeforeValidator(_as_path)]
Pooling = Literal["mean", "max", "sum"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BlockConfig:
    """One message-passing block: layer, normaliser, activation, dropout, and a skip connection around them."""

    out_dim: Width = Field(description="Width of the nodes that come out.")
    in_dim: Width | None = Field(
        default=None, description="Width of the nodes that come in; what the block before puts out, if left out."
    )
    layer: Name = Field(
        default="sage",
        description="Layer: sage, gcn, gat, gatv2, gin, gine, graph, transformer, tag, cheb, resgated, or the "
        "full path of any PyG layer.",
    )
    layer_kwargs: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the layer.")
    norm: Name = Field(
        default="layer",
        description="Normaliser: none, layer, batch, graph, instance, pair, or a full path. `batch` makes the result "
        "depend on how a batch is shared among ranks.",
    )
    activation: Name = Field(
        default="relu", description="none, relu, leaky_relu, elu, gelu, silu, tanh, or a full path."
    )
    dropout: Probability = Field(default=0.0, description="Probability to drop a feature in training.")
    skip: bool = Field(
        default=True, description="Add the block's input to its output, through a linear map if the widths differ."
    )
    edge_dim: Width | None = Field(
        default=None,
        description="Width of `edge_attr`, for layers that use edge features; none are passed if left out.",
    )
    repeat: Annotated[int, Field(ge=1)] = Field(default=1, description="How many such blocks follow each other.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class HeadConfig:
    """A perceptron on the pooled graph: class scores (logits) for a classification, values for a regression."""

    out_dim: Width = Field(description="Number of classes, or of values.")
    hidden: tuple[Width, ...] = Field(default=(), description="Widths of the layers in between.")
    activation: Name = Field(default="relu", description="Activation between the layers.")
    dropout: Probability = Field(default=0.0, description="Dropout between the layers.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GNNConfig:
    """A graph network: blocks on the nodes, pooling, and one or more heads on each graph."""

    in_dim: Width = Field(description="Width of the node features.")
    blocks: Annotated[tuple[BlockConfig, ...], Field(min_length=1)] = Field(
        description="Message-passing blocks, in order."
    )
    heads: Annotated[dict[str, HeadConfig], Field(min_length=1)] = Field(
        description="Heads by name. With one head the model returns its tensor, with several a dictionary."
    )
    pooling: Annotated[tuple[Pooling, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(
        default=("mean",),
        description="How a graph's nodes become one vector: mean, max, sum, or a list of them, side by side.",
    )
    graph_dim: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Width of `graph_features` that are put beside the pooled vector; 0 for none."
    )

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, strings and numbers."""
        return TypeAdapter(GNNConfig).dump_python(self, mode="json")


def read_config(config: Mapping[str, Any] | GNNConfig, *, path: str = "model") -> GNNConfig:
    """Check a mapping against :class:`GNNConfig`.

    Args:
        config: Nested mappings and sequences, as read from YAML, JSON or OmegaConf.
        path: Where they stand in the whole configuration, for the message.

    Raises:
        ConfigError: With all mistakes at once: the key, what was found, what is allowed, the nearest valid name.
    """
    if isinstance(config, GNNConfig):
        return config
    try:
        return TypeAdapter(GNNConfig).validate_python(_plain(config))
    except ValidationError as error:
        # A list whose items are all wrong counts as empty for pydantic: that would be said twice.
        problems = [
            _describe(item, path) for item in error.errors() if item["type"] != "too_short" or not item["input"]
        ]
    raise ConfigError("The GNNModel cannot be built as configured.", problems)


def _plain(value: Any) -> Any:
    """Return mappings and sequences of any kind (OmegaConf's too) as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _describe(problem: Any, path: str) -> str:
    """Say one mistake: its path, what was found, what is allowed."""
    where = path + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        names = [field.name for field in dataclasses.fields(_owner(problem["loc"]))]
        near = did_you_mean(problem["loc"][-1], names)
        return f"{where}: there is no such key.{near} Allowed: {', '.join(names)}."
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: this key is required and was not set."
    near = did_you_mean(problem["input"], ("mean", "max", "sum")) if problem["type"] == "literal_error" else ""
    return f"{where}: found {problem['input']!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}.{near}"


def _owner(location: tuple[Any, ...]) -> type:
    """Return the class whose key a location names."""
    if location[0] == "blocks" and len(location) > 2:
        return BlockConfig
    if location[0] == "heads" and len(location) > 2:
        return HeadConfig
    return GNNConfig
