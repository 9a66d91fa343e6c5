"""The causal sets as a map-style data set of PyG graphs, in memory, whose batches can be cut out whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from everyrank import World, current_world
from everyrank.apps.causal_sets.cache import Arrays, load_or_make
from everyrank.apps.causal_sets.samples import COUNTS, KINDS, NO_DIMENSION, SPACETIMES
from everyrank.apps.causal_sets.settings import DataSettings, read_settings

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data

NUM_NODE_FEATURES = len(COUNTS)
NUM_GRAPH_FEATURES = 1
IGNORED = -1
"""The class, of dimension and of curvature, of an order that has neither; the loss leaves it out."""
_CURVATURE = np.array([SPACETIMES.get(kind, IGNORED - 1) + 1 for kind in KINDS])


class CausalSetDataset(Dataset):
    """Sprinklings of spacetimes and orders that are like none, with what can be counted in them.

    A sample is a PyG ``Data`` with

    - ``x`` [n, 6]: for each element the sizes of its past and future over n - 1, its links from below and above over
      sqrt(n), and the longest chains that end and begin in it over sqrt(n). No coordinates.
    - ``edge_index`` [2, 2 · links]: every link, both ways.
    - ``graph_features`` [1, 1]: log of n over the middle size.
    - ``dimension`` [1]: index into ``dimensions``, or -1 for an order that is no sprinkling.
    - ``curvature`` [1]: 0, 1, 2 for negative, none, positive, or -1 for an order that is no sprinkling.
    - ``manifold`` [1]: 1 for a sprinkling, 0 otherwise.
    - ``kind`` [1]: index into ``KINDS``. Not for the network, as are the next three.
    - ``num_elements`` [1]: the number of elements n.
    - ``ordering_fraction`` [1], in float64: what the Myrheim-Meyer estimator works on.
    - ``half_size`` [1]: what the midpoint-scaling estimator works on.

    Constructing it is collective: inside a joined process group, the ranks make missing samples together.

    Args:
        folder: Cache folder; samples are made once and kept there.
        world: The ranks that construct this together; the joined world if left out.
        **settings: Fields of :class:`~everyrank.apps.causal_sets.settings.DataSettings`.

    Raises:
        ConfigError: A setting is unknown or has a wrong value.
        DataError: The cache folder cannot be written.
    """

    def __init__(self, folder: str | Path, *, world: World | None = None, **settings: Any) -> None:
        self.settings: DataSettings = read_settings(settings)
        self.dimensions = tuple(self.settings.dimensions)
        shards = load_or_make(Path(folder), self.settings, self.settings.num_samples, world or current_world())
        self._store(_join(shards, self.settings.num_samples))

    def _store(self, arrays: Arrays) -> None:
        """Keep everything as flat arrays; sample i owns the nodes and links between offsets i and i + 1."""
        self._node_ptr, self._link_ptr = _offsets(arrays["num_nodes"]), _offsets(arrays["num_links"])
        self._x = _scale(arrays["counts"], arrays["num_nodes"]).astype(self.settings.dtype)
        self._links = arrays["links"]
        size = arrays["num_nodes"].astype(np.float64)
        middle = math.sqrt(self.settings.min_size * self.settings.max_size)
        label, curvature = arrays["dimension"], _CURVATURE[arrays["kind"]]
        dimension = np.full(len(label), IGNORED, dtype=np.int64)
        for index, value in enumerate(self.dimensions):
            dimension[label == value] = index
        smaller_part = arrays["counts"][:, :2].min(axis=1)
        per_graph = {
            "graph_features": np.log(size / middle).astype(self.settings.dtype)[:, None],
            "dimension": dimension,
            "curvature": curvature,
            "manifold": (label != NO_DIMENSION).astype(np.int64),
            "kind": arrays["kind"].astype(np.int64),
            "num_elements": arrays["num_nodes"].astype(np.int64),
            "ordering_fraction": 2 * arrays["num_relations"] / (size * (size - 1)),
            "half_size": np.maximum.reduceat(smaller_part, self._node_ptr[:-1]).astype(np.int64),
        }
        self._per_graph = {name: torch.from_numpy(values) for name, values in per_graph.items()}

    def __len__(self) -> int:
        return self.settings.num_samples

    def __getitem__(self, index: int) -> Data:
        from torch_geometric.data import Data

        index = range(len(self))[index]
        start, stop = self._node_ptr[index], self._node_ptr[index + 1]
        links = torch.from_numpy(self._links[:, self._link_ptr[index] : self._link_ptr[index + 1]].astype(np.int64))
        return Data(
            x=torch.from_numpy(self._x[start:stop].copy()),
            edge_index=torch.cat([links, links.flip(0)], dim=1),
            **{name: values[index : index + 1].clone() for name, values in self._per_graph.items()},
        )

    def get_batch(self, indices: Sequence[int]) -> Batch:
        """Cut a PyG batch out of the flat arrays; loaders that fetch batches whole call this.

        Equal to ``Batch.from_data_list([self[i] for i in indices])``, without making the samples one by one.

        Args:
            indices: Samples, in the order wanted; repetitions are allowed.
        """
        node_ranges = [(self._node_ptr[i], self._node_ptr[i + 1]) for i in indices]
        link_ranges = [(self._link_ptr[i], self._link_ptr[i + 1]) for i in indices]
        ptr = np.cumsum([0, *(stop - start for start, stop in node_ranges)])
        edge_ptr = np.cumsum([0, *(2 * (stop - start) for start, stop in link_ranges)])
        edges = np.empty((2, edge_ptr[-1]), dtype=np.int64)
        for (start, stop), first_node, first in zip(link_ranges, ptr.tolist(), edge_ptr.tolist(), strict=False):
            middle, last = first + stop - start, first + 2 * (stop - start)
            upwards = np.add(self._links[:, start:stop], first_node, out=edges[:, first:middle])
            edges[:, middle:last] = upwards[::-1]
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        tensors = {
            "x": torch.from_numpy(np.concatenate([self._x[start:stop] for start, stop in node_ranges])),
            "edge_index": torch.from_numpy(edges),
            **{name: values[chosen] for name, values in self._per_graph.items()},
        }
        return _as_batch(tensors, torch.from_numpy(ptr), torch.from_numpy(edge_ptr))


def _as_batch(tensors: dict[str, torch.Tensor], ptr: torch.Tensor, edge_ptr: torch.Tensor) -> Batch:
    """Make the PyG batch, with the tables by which PyG takes it apart again."""
    from torch_geometric.data import Batch

    num_graphs = len(ptr) - 1
    batch = Batch(batch=torch.repeat_interleave(ptr.diff()), ptr=ptr, **tensors)
    one_each, nothing = torch.arange(num_graphs + 1), torch.zeros(num_graphs, dtype=torch.int64)
    slices = {"x": ptr, "edge_index": edge_ptr}
    batch._num_graphs = num_graphs
    batch._slice_dict = {name: slices.get(name, one_each) for name in tensors}
    batch._inc_dict = {name: ptr[:-1] if name == "edge_index" else nothing for name in tensors}
    return batch


def _offsets(lengths: NDArray) -> list[int]:
    return [0, *np.cumsum(lengths, dtype=np.int64).tolist()]


def _scale(counts: NDArray[np.int16], num_nodes: NDArray) -> NDArray[np.float64]:
    """Turn the counts [nodes, 6] into features of order one, whatever n."""
    size = np.repeat(num_nodes.astype(np.float64), num_nodes)[:, None]
    return np.concatenate([counts[:, :2] / (size - 1), counts[:, 2:] / np.sqrt(size)], axis=1)


def _join(shards: Sequence[Arrays], num_samples: int) -> Arrays:
    """Lay the shards end to end and drop what is behind the last sample wanted."""
    # Samples lie along the last axis of the links, and along the first of everything else.
    axis = {"links": -1}
    joined = {name: np.concatenate([shard[name] for shard in shards], axis=axis.get(name, 0)) for name in shards[0]}
    num_nodes, num_links = joined["num_nodes"][:num_samples], joined["num_links"][:num_samples]
    return {
        "counts": joined["counts"][: int(num_nodes.sum())],
        "links": joined["links"][:, : int(num_links.sum())],
        "num_nodes": num_nodes,
        "num_links": num_links,
        **{name: joined[name][:num_samples] for name in ("kind", "dimension", "num_relations")},
    }
