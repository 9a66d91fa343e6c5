"""GNNModel: a graph network from a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from everyrank.config.schema import as_mapping
from everyrank.errors import DataError
from everyrank.models.blocks import GNNBlock, make_head
from everyrank.models.gnn_config import GNNConfig, read_config
from everyrank.models.layers import pyg_nn

_METADATA_KEY = "everyrank.gnn_config"
_POOLS = {"mean": "global_mean_pool", "max": "global_max_pool", "sum": "global_add_pool"}


class GNNModel(nn.Module):
    """Message-passing blocks, pooling, and one or more heads, as a configuration says.

    ::

        model = GNNModel.from_config({
            "in_dim": 6,
            "blocks": [{"layer": "sage", "out_dim": 32, "repeat": 3}],
            "pooling": ["mean", "max"],
            "heads": {"dimension": {"out_dim": 3, "hidden": [32]}, "manifold": {"out_dim": 1}},
        })
        output = model(batch)      # {"dimension": [num_graphs, 3], "manifold": [num_graphs, 1]}

    The result does not depend on the order of a graph's nodes or edges, nor on which graphs share its batch (unless a
    ``batch`` normaliser is chosen).

    Args:
        config: A :class:`~everyrank.models.gnn_config.GNNConfig` or the mapping it is read from.
        path: Where the mapping stands in the whole configuration, for error messages.

    Attributes:
        config: The whole configuration as JSON-able containers, defaults included.

    Raises:
        ConfigError: A key or value is wrong.
        UserError: PyTorch Geometric is not installed.
    """

    def __init__(self, config: Mapping[str, Any] | GNNConfig, *, path: str = "model") -> None:
        super().__init__()
        checked = read_config(config, path=path)
        self.config = as_mapping(checked)
        self.graph_dim = checked.graph_dim
        self._pools = [getattr(pyg_nn(), _POOLS[name]) for name in checked.pooling]
        self.blocks = nn.ModuleList()
        width = checked.in_dim
        for index, block in enumerate(checked.blocks):
            for copy in range(block.repeat):
                # Only the first of a row of equal blocks may change the width.
                in_dim = width if copy else block.in_dim or width
                self.blocks.append(GNNBlock(block, in_dim, width, path=f"{path}.blocks.{index}"))
                width = block.out_dim
        width = width * len(self._pools) + self.graph_dim
        self.heads = nn.ModuleDict(
            {name: make_head(head, width, path=f"{path}.heads.{name}") for name, head in checked.heads.items()}
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | GNNConfig, *, path: str = "model") -> GNNModel:
        """Make a model from its configuration; see :class:`~everyrank.models.gnn_config.GNNConfig` for the keys."""
        return cls(config, path=path)

    def forward(
        self,
        x: Any,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
        edge_attr: Tensor | None = None,
        graph_features: Tensor | None = None,
        num_graphs: int | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Evaluate all heads.

        Args:
            x: A PyG ``Data`` or ``Batch`` that has the rest as attributes, or node features [num_nodes, in_dim].
            edge_index: Edges [2, num_edges].
            batch: The graph [num_nodes] that each node belongs to; one graph if left out.
            edge_attr: Edge features [num_edges, edge_dim], for blocks that have an ``edge_dim``.
            graph_features: Features of the graphs [num_graphs, graph_dim].
            num_graphs: Number of graphs; found from ``batch`` if left out.

        Returns:
            The head's output [num_graphs, out_dim]; with several heads a dictionary of them by name.
        """
        if not isinstance(x, Tensor):
            data = x
            x, edge_index, batch = data.x, data.edge_index, data.batch
            edge_attr, graph_features = data.get("edge_attr"), data.get("graph_features")
            num_graphs = data.num_graphs if batch is not None else 1
        assert edge_index is not None, "edge_index is needed unless the first argument is a PyG batch"
        if batch is None:
            batch, num_graphs = x.new_zeros(len(x), dtype=torch.int64), 1
        elif num_graphs is None:
            num_graphs = int(batch.max()) + 1
        for block in self.blocks:
            x = block(x, edge_index, batch, edge_attr, num_graphs)
        graphs = self.pool(x, batch, num_graphs, graph_features)
        outputs = {name: head(graphs) for name, head in self.heads.items()}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def pool(self, x: Tensor, batch: Tensor, num_graphs: int, graph_features: Tensor | None = None) -> Tensor:
        """Turn nodes [num_nodes, width] into graphs [num_graphs, len(pooling) · width + graph_dim]."""
        parts = [pool(x, batch, num_graphs) for pool in self._pools]
        if self.graph_dim:
            if graph_features is None or graph_features.shape[-1] != self.graph_dim:
                found = "none" if graph_features is None else f"{graph_features.shape[-1]}"
                raise DataError(
                    f"model.graph_dim is {self.graph_dim}, but the data has {found} graph_features. "
                    "Give each sample graph_features [1, graph_dim], or set graph_dim to what they have (0 for none)."
                )
            parts.append(graph_features.to(x.dtype))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def save(self, path: str | Path) -> None:
        """Write weights and configuration to one safetensors file, which nothing needs to unpickle."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, Path(path), metadata={_METADATA_KEY: json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> GNNModel:
        """Make the model that :meth:`save` wrote, with its weights and their floating-point type.

        Raises:
            DataError: The file is missing, damaged, or was not written by :meth:`save`.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, OSError) as error:
            raise DataError(f"A GNNModel was to be loaded from {path}, but it cannot be read: {error}") from error
        if _METADATA_KEY not in metadata:
            raise DataError(
                f"A GNNModel was to be loaded from {path}, which holds weights without a model configuration. "
                "Load a file written by GNNModel.save, or build the model with from_config and load_state_dict."
            )
        model = cls.from_config(json.loads(metadata[_METADATA_KEY])).to(device)
        # assign=True keeps the floating-point type of the file.
        model.load_state_dict(tensors, assign=True)
        return model
