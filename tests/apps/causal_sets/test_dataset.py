"""The data set: samples and batches agree with PyG's own, and labels and features are what they claim."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data

from everyrank.apps.causal_sets.dataset import IGNORED, CausalSetDataset
from everyrank.apps.causal_sets.samples import KINDS, SPACETIMES, draw_sample
from everyrank.data.loader import make_loader
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import ConfigError

SETTINGS = {"num_samples": 60, "min_size": 12, "max_size": 30, "dimensions": [2, 4], "others_fraction": 0.4, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def dataset(folder: Path) -> CausalSetDataset:
    return CausalSetDataset(folder, **SETTINGS)


def assert_equal(found: Data, expected: Data) -> None:
    assert sorted(found.keys()) == sorted(expected.keys())
    for name in expected.keys():  # noqa: SIM118 (a Data is no mapping)
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_a_batch_is_what_pyg_would_collate(dataset: CausalSetDataset) -> None:
    indices = [5, 59, 0, 5, 31]
    found, expected = dataset.get_batch(indices), Batch.from_data_list([dataset[index] for index in indices])
    assert found.num_graphs == 5
    assert_equal(found, expected)
    for position, index in enumerate(indices):
        assert_equal(found[position], dataset[index])
    assert_equal(Batch.from_data_list(found.to_data_list()), expected)


def test_loaders_get_whole_batches(dataset: CausalSetDataset) -> None:
    sampler = GlobalBatchSampler(len(dataset), global_batch_size=16, rank=1, world_size=3, seed=1)
    expected = [dataset.get_batch(indices) for indices in sampler]
    for loaded in (
        make_loader(dataset, sampler),
        DataLoader(dataset, batch_sampler=sampler, collate_fn=Batch.from_data_list),
    ):
        for found, wanted in zip(loaded, expected, strict=True):
            assert_equal(found, wanted)


def test_labels_and_features(dataset: CausalSetDataset) -> None:
    recipe = dataset.settings
    for index in range(len(dataset)):
        sample, data = draw_sample(recipe, index), dataset[index]
        size = len(sample.counts)
        kind = KINDS[sample.kind]
        assert data.manifold.item() == (sample.dimension != 0) == (kind in SPACETIMES)
        assert data.curvature.item() == SPACETIMES.get(kind, -2) + 1
        assert (data.kind.item(), data.num_elements.item()) == (sample.kind, size)
        assert data.half_size.item() == max(min(past, future) for past, future in sample.counts[:, :2].tolist())
        assert data.dimension.item() == {2: 0, 4: 1, 0: IGNORED}[sample.dimension]
        assert data.ordering_fraction.item() == 2 * sample.num_relations / (size * (size - 1))
        assert data.x.shape == (size, 6)
        torch.testing.assert_close(data.x[:, :2].sum(), torch.tensor(2 * sample.num_relations / (size - 1)))
        np.testing.assert_allclose(data.x[:, 2:].numpy() * np.sqrt(size), sample.counts[:, 2:], rtol=1e-6)
        np.testing.assert_array_equal(data.edge_index, np.concatenate([sample.links, sample.links[::-1]], axis=1))
        assert data.graph_features.item() == pytest.approx(np.log(size / np.sqrt(12 * 30)), abs=1e-6)


def test_float64_is_the_same_data_more_precisely(dataset: CausalSetDataset, folder: Path) -> None:
    precise = CausalSetDataset(folder, **SETTINGS, dtype="float64")
    assert precise[0].x.dtype == precise[0].graph_features.dtype == torch.float64
    assert dataset[0].x.dtype == torch.float32
    torch.testing.assert_close(precise.get_batch(range(60)).x.float(), dataset.get_batch(range(60)).x, rtol=0, atol=0)


def test_indices_are_those_of_a_sequence(dataset: CausalSetDataset) -> None:
    assert len(dataset) == 60
    assert_equal(dataset[-1], dataset[59])
    with pytest.raises(IndexError):
        dataset[60]


def test_samples_are_copies(dataset: CausalSetDataset) -> None:
    before = dataset[4].x.clone()
    dataset[4].x.zero_()
    dataset[4].edge_index.zero_()
    dataset.get_batch([4]).x.zero_()
    torch.testing.assert_close(dataset[4].x, before)


def test_can_be_sent_to_a_loader_process(dataset: CausalSetDataset) -> None:
    assert_equal(pickle.loads(pickle.dumps(dataset)).get_batch([3, 1]), dataset.get_batch([3, 1]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_sample": 5}, r"num_sample: .*Did you mean 'num_samples'"),
        ({"num_samples": 0}, "num_samples: found 0"),
        ({"max_size": "many"}, "max_size: found 'many'"),
        ({"max_size": 15}, "max_size: found 15, but min_size is 16"),
        ({"duration": 3.2}, r"duration: found 3\.2"),
        ({"spacetimes": ["minkowsky"]}, "spacetimes.*minkowsky"),
        ({"others": ["layered", "layered"]}, "others: .*each may be named once"),
        ({"dimensions": [1, 2]}, "dimensions: found 1"),
        ({"dimensions": [2, 2]}, "each may be named once"),
        ({"dimensions": []}, r"dimensions: found \[\]"),
        ({"others_fraction": 1.5}, r"others_fraction: found 1\.5"),
        ({"dtype": "float16"}, "dtype: found 'float16'"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_wrong_settings_are_said(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CausalSetDataset(tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists(), "nothing is made for a configuration that is wrong"
