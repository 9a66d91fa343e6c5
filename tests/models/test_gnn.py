"""GNNModel: every layer trains, the result is a function of the graph alone, and the configuration is strict."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch_geometric.data import Batch, Data
from torch_geometric.nn import LEConv, SAGEConv

import everyrank
from everyrank.errors import ConfigError, DataError
from everyrank.models.gnn import GNNModel
from everyrank.models.layers import ACTIVATIONS, LAYERS, NORMS

HEADS = {"kind": {"out_dim": 3, "hidden": [8]}, "value": {"out_dim": 1}}


def make_config(**changes: Any) -> dict[str, Any]:
    return {"in_dim": 4, "blocks": [{"out_dim": 8, "repeat": 2}], "heads": HEADS, **changes}


def make_graph(num_nodes: int, num_edges: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return Data(
        x=torch.randn(num_nodes, 4, dtype=torch.float64, generator=generator),
        edge_index=torch.randint(num_nodes, (2, num_edges), generator=generator),
        edge_attr=torch.randn(num_edges, 8, dtype=torch.float64, generator=generator),
        graph_features=torch.randn(1, 2, dtype=torch.float64, generator=generator),
    )


@pytest.fixture
def graphs() -> list[Data]:
    return [make_graph(5, 12, 0), make_graph(9, 30, 1), make_graph(3, 0, 2), make_graph(1, 0, 3)]


def make_model(**changes: Any) -> GNNModel:
    torch.manual_seed(0)
    return everyrank.GNNModel.from_config(make_config(**changes)).double()


@pytest.mark.parametrize("layer", [*LAYERS, "torch_geometric.nn.LEConv"])
def test_every_layer_trains(layer: str, graphs: list[Data]) -> None:
    edge_dim = 8 if layer == "gine" else None
    block = {"layer": layer, "out_dim": 8, "repeat": 2, "edge_dim": edge_dim}
    model = make_model(blocks=[block], pooling=["mean", "max", "sum"])
    outputs = model(Batch.from_data_list(graphs))
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {"kind": (4, 3), "value": (4, 1)}
    sum(output.square().sum() for output in outputs.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.blocks[0].layer.parameters())


@pytest.mark.parametrize("norm", [*NORMS])
@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_every_norm_and_activation(norm: str, activation: str, graphs: list[Data]) -> None:
    model = make_model(blocks=[{"out_dim": 8, "norm": norm, "activation": activation, "dropout": 0.1}])
    assert model(Batch.from_data_list(graphs))["kind"].isfinite().all()


@pytest.mark.parametrize("norm", ["none", "layer", "graph", "instance", "pair"])
def test_a_graph_is_judged_alone(norm: str, graphs: list[Data]) -> None:
    """Neither the other graphs of its batch nor the order of nodes and edges change what is said of a graph."""
    model = make_model(blocks=[{"out_dim": 8, "norm": norm, "repeat": 2}], pooling=["mean", "max"], graph_dim=2).eval()
    together = model(Batch.from_data_list(graphs))
    for index, graph in enumerate(graphs):
        order = torch.randperm(graph.num_nodes)
        renamed = torch.empty_like(order)
        renamed[order] = torch.arange(len(order))
        edges = renamed[graph.edge_index][:, torch.randperm(graph.num_edges)]
        alone = model(graph.x[order], edges, graph_features=graph.graph_features)
        for name, output in alone.items():
            torch.testing.assert_close(output[0], together[name][index], rtol=0, atol=1e-12)
        torch.testing.assert_close(model(graph), alone, rtol=0, atol=1e-12)


def test_edges_matter(graphs: list[Data]) -> None:
    model, graph = make_model().eval(), graphs[1]
    other = model(graph.x, graph.edge_index[:, ::2])
    assert not torch.allclose(model(graph)["value"], other["value"])


def test_one_block_is_what_it_says(graphs: list[Data]) -> None:
    """x W + relu(norm(sage(x))), then the mean over nodes, beside the graph's own features."""
    block = {"in_dim": 4, "out_dim": 8}
    model = make_model(blocks=[block], graph_dim=2, heads={"value": {"out_dim": 1}}).eval()
    graph, parts = graphs[1], model.blocks[0]
    nodes = parts.skip(graph.x) + torch.relu(parts.norm(parts.layer(graph.x, graph.edge_index)))
    expected = model.heads["value"](torch.cat([nodes.mean(0, keepdim=True), graph.graph_features], dim=1))
    found = model(graph)
    assert isinstance(found, torch.Tensor), "one head gives its tensor"
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        model(graph.x, graph.edge_index, torch.zeros(9, dtype=torch.int64), None, graph.graph_features), expected
    )


def test_skip_connection_can_be_left_out(graphs: list[Data]) -> None:
    assert make_model(blocks=[{"out_dim": 8, "skip": False}]).blocks[0].skip is None


def test_saves_and_reloads_from_its_config(tmp_path: Path, graphs: list[Data]) -> None:
    block = {"layer": LEConv, "out_dim": 8, "norm": "graph", "dropout": 0.5}
    model = make_model(blocks=[block], pooling="sum", graph_dim=2).eval()
    assert json.loads(json.dumps(model.config)) == model.config
    assert model.config["blocks"][0]["layer"].endswith("LEConv"), "a class is kept as its path"
    model.save(tmp_path / "model.safetensors")
    again = GNNModel.load(tmp_path / "model.safetensors").eval()
    assert again.config == model.config
    batch = Batch.from_data_list(graphs)
    torch.testing.assert_close(again(batch), model(batch), rtol=0, atol=0)
    rebuilt = GNNModel.from_config(model.config)
    rebuilt.double().load_state_dict(model.state_dict())
    torch.testing.assert_close(rebuilt.eval()(batch), model(batch), rtol=0, atol=0)


def test_loading_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.safetensors"):
        GNNModel.load(tmp_path / "missing.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(DataError, match=r"damaged\.safetensors"):
        GNNModel.load(tmp_path / "damaged.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(DataError, match="without a model configuration"):
        GNNModel.load(tmp_path / "plain.safetensors")


def test_reads_omegaconf() -> None:
    assert GNNModel(OmegaConf.create(make_config())).config == GNNModel(make_config()).config


def test_attention_heads_share_the_width(graphs: list[Data]) -> None:
    for concat in (True, False):
        block = {"layer": "gat", "out_dim": 8, "layer_kwargs": {"heads": 2, "concat": concat}}
        assert make_model(blocks=[block])(graphs[0])["kind"].shape == (1, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"poolng": "mean"}, [r"model\.poolng", "Did you mean 'pooling'"]),
        ({"pooling": "men"}, [r"model\.pooling", "'men'", "Did you mean 'mean'"]),
        ({"in_dim": 0}, [r"model\.in_dim", "found 0"]),
        ({"blocks": []}, [r"model\.blocks", r"found \[\]"]),
        ({"heads": {}}, [r"model\.heads"]),
        ({"heads": {"kind": {"hidden": [3]}}}, [r"model\.heads\.kind\.out_dim", "required"]),
        ({"heads": {"kind": {"out_dim": 3, "hiden": 1}}}, [r"heads\.kind\.hiden", "Did you mean 'hidden'"]),
        ({"blocks": [{"out_dim": 8, "layr": "gcn"}]}, [r"model\.blocks\.0\.layr", "Did you mean 'layer'"]),
        ({"blocks": [{"out_dim": 8, "layer": "sagee"}]}, [r"blocks\.0\.layer", "'sagee'", "Did you mean 'sage'"]),
        ({"blocks": [{"out_dim": 8, "layer": "torch_geometric.nn.SAGEConvv"}]}, ["Did you mean 'SAGEConv'"]),
        ({"blocks": [{"out_dim": 8, "layer": "no_such_package.Layer"}]}, ["no module 'no_such_package'"]),
        ({"blocks": [{"out_dim": 8, "layer": "torch_geometric.nn.global_mean_pool"}]}, ["no torch module"]),
        ({"blocks": [{"out_dim": 8, "layer_kwargs": {"agr": "max"}}]}, [r"layer_kwargs", "'agr'"]),
        ({"blocks": [{"out_dim": 8, "norm": "lyer"}]}, [r"blocks\.0\.norm", "Did you mean 'layer'"]),
        ({"blocks": [{"out_dim": 8, "activation": "rellu"}]}, ["Did you mean 'relu'|Did you mean 'elu'"]),
        ({"blocks": [{"out_dim": 8, "dropout": 1.5}]}, [r"blocks\.0\.dropout", r"found 1\.5"]),
        ({"blocks": [{"out_dim": 8}, {"in_dim": 4, "out_dim": 8}]}, [r"blocks\.1\.in_dim: found 4", "width 8"]),
        (
            {"blocks": [{"out_dim": 9, "layer": "gat", "layer_kwargs": {"heads": 2}}]},
            ["out_dim: found 9", "2 att"],
        ),
    ],
)
def test_mistakes_are_said_with_their_cure(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        GNNModel.from_config(make_config(**changes))
    for pattern in said:
        assert caught.match(pattern)


def test_all_mistakes_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        GNNModel.from_config({"blocks": [{"out_dim": 0}], "heads": HEADS, "pooling": "median"}, path="app.model")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "app.model.in_dim",
        "app.model.blocks.0.out_dim",
        "app.model.pooling.0",
    ]


def test_missing_graph_features_are_said(graphs: list[Data]) -> None:
    model = make_model(graph_dim=3)
    with pytest.raises(DataError, match="graph_dim is 3, but the data has 2"):
        model(graphs[0])
    with pytest.raises(DataError, match="has none"):
        model(graphs[0].x, graphs[0].edge_index)


def test_a_missing_pytorch_geometric_is_one_message() -> None:
    program = (
        "import sys; sys.modules['torch_geometric'] = None\n"
        "from everyrank import GNNModel\n"
        "GNNModel({'in_dim': 1, 'blocks': [{'out_dim': 1}], 'heads': {'y': {'out_dim': 1}}})"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "UserError" in ended.stderr
    assert "pip install 'everyrank[gnn]'" in ended.stderr


def test_a_layer_may_be_named_by_its_class() -> None:
    assert isinstance(make_model(blocks=[{"layer": SAGEConv, "out_dim": 8}]).blocks[0].layer, SAGEConv)


def test_generated_code_leaves_no_file_and_keeps_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyG writes Python files to the temporary folder when a layer class is first used."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = make_model(blocks=[{"layer": "torch_geometric.nn.FiLMConv", "out_dim": 8}])
    generated = type(model.blocks[0].layer).propagate
    assert Path(generated.__code__.co_filename).parent == tmp_path, "this layer's code was generated by this test"
    assert list(tmp_path.iterdir()) == []
    assert "def propagate(" in inspect.getsource(generated)
