"""The whole app: the same weights at every world size, what it leaves in the run's folder, and mistakes in its keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file

import everyrank
from conftest import ROOT, RunCli
from everyrank.apps.causal_sets.app import CausalSetsApp
from everyrank.errors import ConfigError
from everyrank.training.config import read_config

CONF = Path(everyrank.__file__).parent / "conf"
# 85 training samples in global batches of 16: the last is short, and neither divides by 2 or 3.
TINY = [
    "app.data.kwargs.num_samples=121",
    "app.data.kwargs.min_size=8",
    "app.data.kwargs.max_size=24",
    "app.training.global_batch_size=16",
    "app.training.num_epochs=2",
    "app.model.blocks=[{layer: sage, out_dim: 8}]",
]


def make_config(*overrides: str, app: str = "causal_sets") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"app={app}", *overrides])


def test_the_same_weights_at_every_world_size(tmp_path: Path) -> None:
    """In float64 to 1e-10, uneven shares and a short last batch included; ranks of a run agree bit by bit."""

    def on_rank(cfg: DictConfig) -> dict[str, object]:
        import torch

        from everyrank.apps.causal_sets.app import CausalSetsApp

        torch.use_deterministic_algorithms(True)
        return CausalSetsApp().run(cfg)

    weights, numbers = [], []
    for size in (1, 2, 3):
        cfg = make_config(
            *(*TINY, "app.training.dtype=float64", "+app.training.plots=false"),
            *(f"env.data_dir={tmp_path}", f"run.dir={tmp_path / str(size)}"),
        )
        preload = (*cfg.app.preload, "matplotlib.figure")  # which each run's figure would import
        results = everyrank.launch(on_rank, cfg, nproc_per_node=size, preload=preload)
        assert results == [results[0]] * size
        weights.append(load_file(tmp_path / str(size) / "model.safetensors"))
        numbers.append({name: value for name, value in results[0].items() if name != "weights"})
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        for name, tensor in weights[0].items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-10)
    for other in numbers[1:]:
        assert other == pytest.approx(numbers[0], rel=0, abs=1e-10)
    assert numbers[0]["num_test_samples"] == 24


def test_from_the_command_line(run_cli: RunCli, tmp_path: Path) -> None:
    ended = run_cli("driver=torchrun", "app=causal_sets", *TINY)
    assert ended.returncode == 0, ended.stderr
    for words in ("on 24 orders of", "midpoint", "Kleitman-Rothschild", "causal_sets.png"):
        assert words in ended.stdout
    (run,) = (tmp_path / "outputs").iterdir()
    assert (run / "causal_sets.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "causal_sets.txt").read_text().splitlines()[0].strip() in ended.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["num_test_samples"] == 24
    assert 0 <= result["curvature_calibration_error"] <= 1
    model = everyrank.GNNModel.load(run / "model.safetensors")
    assert model.config["heads"]["dimension"]["out_dim"] == 4
    assert list((tmp_path / "data" / "causal_sets").iterdir()), "the cache is where env.data_dir says"


def test_a_mistake_is_one_message(run_cli: RunCli, tmp_path: Path) -> None:
    ended = run_cli("app=causal_sets", "+app.data.kwargs.num_sample=5", "app.data.kwargs.others_fraction=2")
    assert ended.returncode == 2
    assert "num_sample: unknown key. Did you mean 'num_samples'?" in ended.stderr
    assert "others_fraction: found 2" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("app", ["causal_sets", "causal_sets_full"])
def test_shipped_configurations_are_whole(app: str) -> None:
    config = read_config(CausalSetsApp().trainer_config(make_config("run.dir=somewhere", app=app)))
    assert config.training.path == "somewhere"
    assert config.data is not None
    assert config.data.kwargs["dtype"] == config.training.dtype
    assert config.training.num_epochs == config.training.scheduler.kwargs["T_max"]
    assert everyrank.GNNModel(config.model.settings).config["in_dim"] == 6
    assert (config.data.kwargs["num_samples"] > 10_000) == (app == "causal_sets_full")


def test_widths_follow_from_the_data() -> None:
    cfg = make_config("run.dir=x", "app.data.kwargs.dimensions=[2,3,4]")
    assert CausalSetsApp().trainer_config(cfg)["model"]["heads"]["dimension"]["out_dim"] == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+app.model.in_dim=5", r"model\.in_dim: found 5, but the data ask for 6"),
        ("+app.model.heads.dimension.out_dim=2", r"model\.heads\.dimension\.out_dim: found 2"),
        ("+app.model.heads.curvature.out_dim=2", r"model\.heads\.curvature\.out_dim: found 2"),
        ("~app.model.heads.manifold", r"model\.heads\.manifold: missing"),
        ("app.data.kwargs.dimensions=[0]", "dimensions: found 0"),
    ],
)
def test_what_does_not_fit_is_said(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CausalSetsApp().trainer_config(make_config("run.dir=x", override))


@pytest.mark.parametrize("app", ["causal_sets", "causal_sets_full"])
def test_the_results_that_the_pages_show_are_of_the_shipped_settings(app: str) -> None:
    data = make_config("run.dir=x", app=app).app.data
    kept = json.loads((ROOT / "docs" / "results" / f"{app}.json").read_text())
    assert kept["num_test_samples"] == round(data.kwargs.num_samples * data.split[2])


@pytest.mark.nightly
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("app", ["causal_sets", "causal_sets_full"])
def test_a_run_gives_what_the_pages_show(app: str, tmp_path: Path, run_cli: RunCli) -> None:
    """Within five standard errors at 1,600 orders: other processors round differently, and training is chaotic."""
    ended = run_cli("driver=torchrun", "env=local", f"app={app}", "driver.nproc_per_node=2", timeout_s=1900)
    assert ended.returncode == 0, ended.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    result = json.loads((run / "result.json").read_text())
    kept = json.loads((ROOT / "docs" / "results" / f"{app}.json").read_text())
    for name in ("dimension_accuracy", "dimension_accuracy_myrheim_meyer", "curvature_accuracy", "manifold_accuracy"):
        assert result[name] == pytest.approx(kept[name], abs=0.06)
    assert result["dimension_accuracy"] > result["dimension_accuracy_myrheim_meyer"] + 0.1
    assert result["manifold_accuracy"] > 0.75
