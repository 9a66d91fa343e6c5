"""``training.compile``: by regions, and with a word when other shapes make it compile again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import everyrank
from everyrank.errors import ConfigError
from everyrank.training.hardware.compiling import CompileConfig, compile_model

_GRAPHS: list[torch.fx.GraphModule] = []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x).relu()


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), *(Block() for _ in range(4)), nn.Linear(8, 1))


@pytest.fixture(autouse=True)
def counting() -> Iterator[None]:
    """A compiler that keeps what it is given, and runs it as it is."""

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        _GRAPHS.append(graph)
        return graph.forward

    if "counting" not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(counting)
    _GRAPHS.clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _num_products() -> int:
    """Multiplications by matrices in all that was compiled."""
    return sum(node.target is nn.functional.linear for graph in _GRAPHS for node in graph.graph.nodes)


@pytest.mark.parametrize(("regions", "num_products"), [([], 6), (["[1-4]"], 1)])
def test_blocks_of_one_class_are_compiled_once(regions: list[str], num_products: int) -> None:
    """And a model that is one of torch's own containers is compiled as any other."""
    plain, compiled = Deep(), Deep()
    compiled.load_state_dict(plain.state_dict())
    compile_model(compiled, CompileConfig(backend="counting", regions=regions))
    x = torch.randn(6, 8)  # needs a gradient, as what comes to a block from the one before
    x.requires_grad_()
    torch.testing.assert_close(compiled(x), plain(x))
    assert _num_products() == num_products
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_region_that_fits_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"training.compile.regions: no module's name fits '1.layr'.*'1.layer'"):
        compile_model(Deep(), CompileConfig(backend="counting", regions=["2", "1.layr"]))


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_shapes_are_told_with_their_cure(tmp_path: Path, dynamic: bool | None) -> None:
    """The last batch is smaller: 21 samples in batches of 6."""
    config = tiny.make_config(
        tmp_path, global_batch_size=6, num_epochs=2, compile={"backend": "counting", "dynamic": dynamic}
    )
    trainer = everyrank.TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(21), val_dataset=tiny.make_data(12, seed=1))
    trainer.run_training()
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    told = [line for line in log.splitlines() if "torch.compile: recompiling" in line]
    shapes = [line for line in told if "Fix: training.compile.dynamic=true" in line]
    assert bool(shapes) == (dynamic is None), told
    assert any("size mismatch at index 0. expected 6, actual 3" in line for line in shapes) == (dynamic is None)
    assert _num_products() >= 2, "nothing was compiled"
