"""The parts of a GNNModel: message-passing blocks and heads."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from everyrank.errors import ConfigError
from everyrank.models.gnn_config import BlockConfig, HeadConfig
from everyrank.models.layers import make_activation, make_layer, make_norm


class GNNBlock(nn.Module):
    """``x + dropout(activation(norm(layer(x))))``, or without the sum if ``skip`` is false."""

    def __init__(self, config: BlockConfig, in_dim: int, arriving: int, *, path: str) -> None:
        super().__init__()
        if in_dim != arriving:
            raise ConfigError(
                f"{path}.in_dim: found {in_dim}, but nodes of width {arriving} arrive there. "
                "Leave in_dim out, or make it equal."
            )
        self.layer = make_layer(config, in_dim, path)
        self.norm = make_norm(config.norm, config.out_dim, f"{path}.norm")
        self.activation = make_activation(config.activation, f"{path}.activation")
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.uses_edge_attr = config.edge_dim is not None
        # Whether the normaliser wants to know which node belongs to which graph.
        parameters = inspect.signature(self.norm.forward).parameters if self.norm is not None else {}
        self.norm_takes_graphs = "batch_size" in parameters
        self.skip: nn.Module | None = None
        if config.skip:
            same = in_dim == config.out_dim
            self.skip = nn.Identity() if same else nn.Linear(in_dim, config.out_dim, bias=False)

    def forward(
        self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor | None, num_graphs: int
    ) -> Tensor:
        """Map nodes [num_nodes, in_dim] to [num_nodes, out_dim]."""
        extra = {"edge_attr": edge_attr} if self.uses_edge_attr else {}
        out = self.layer(x, edge_index, **extra)
        if self.norm is not None:
            out = self.norm(out, batch, batch_size=num_graphs) if self.norm_takes_graphs else self.norm(out)
        out = self.dropout(self.activation(out))
        return out if self.skip is None else out + self.skip(x)


def make_head(config: HeadConfig, in_dim: int, *, path: str) -> nn.Sequential:
    """Make a head that maps graphs [num_graphs, in_dim] to [num_graphs, out_dim]."""
    modules: list[nn.Module] = []
    for width in config.hidden:
        modules += [nn.Linear(in_dim, width), make_activation(config.activation, f"{path}.activation")]
        if config.dropout:
            modules.append(nn.Dropout(config.dropout))
        in_dim = width
    return nn.Sequential(*modules, nn.Linear(in_dim, config.out_dim))
