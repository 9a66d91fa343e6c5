"""The YAML of the documentation works as written, and mistakes in it name file, line and tag."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from everyrank import get_loader
from everyrank.config.resolve import import_object
from everyrank.config.yaml_loader import read_yaml, to_yaml
from everyrank.errors import ConfigError
from everyrank.training.config import plain_config, read_config

DOCUMENTED = """
criterion: !pyobject torch.nn.functional.mse_loss
parallel:
  world_size: 3
  rank: null                     # set by the launcher
  master_addr: "localhost"
  master_port: "12355"
  output_device: null
  find_unused_parameters: false
training:
  seed: 42
  device: "cuda"                 # or "cpu"
  path: /path/to/output/directory
  num_epochs: 50
  batch_size: 64                 # per rank; total = batch_size x world_size
  optimizer_type: !pyobject torch.optim.AdamW
  optimizer_args: []
  optimizer_kwargs: {lr: 0.001, weight_decay: 0.00005}
  num_workers: 4
  pin_memory: true
  drop_last: true
  prefetch_factor: 2
  checkpoint_at: 10
model: {type: !pyobject torch.nn.Linear, args: [4, 2], kwargs: {bias: false}}
validation: {batch_size: 64, num_workers: 2, pin_memory: true, drop_last: false, validator: {device: "cuda"}}
testing:    {batch_size: 64, num_workers: 2, pin_memory: true, drop_last: false, tester: {device: "cuda"}}
early_stopping: {type: "DefaultEarlyStopping", args: [], kwargs: {patience: 5}}
"""


def test_the_documented_file_is_read_and_written_back() -> None:
    config = read_config(yaml.load(DOCUMENTED, Loader=get_loader()))
    assert config.training.optimizer_type is torch.optim.AdamW
    assert config.parallel is not None
    assert config.parallel.master_port == "12355"
    assert config.model.build().bias is None
    assert config.early_stopping is not None
    assert config.early_stopping.type.__name__ == "DefaultEarlyStopping"
    again = read_config(yaml.load(to_yaml(plain_config(config)), Loader=get_loader()))
    assert again == config


def test_each_loader_class_is_its_own_and_plain_loaders_stay_safe() -> None:
    assert get_loader() is not get_loader()
    assert issubclass(get_loader(), yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("a: !pyobject torch.optim.AdamW")
    with pytest.raises(yaml.YAMLError):
        yaml.load("a: !!python/object/apply:os.getpid []", Loader=get_loader())


def test_numbers_as_people_write_them() -> None:
    found = yaml.load("[1e-3, 1.5E+4, -2e5, 1.0, .5, 7, 1_000, '1e-3', e3]", Loader=get_loader())
    assert found == [0.001, 15000.0, -200000.0, 1.0, 0.5, 7, 1000, "1e-3", "e3"]


def test_only_what_a_tag_names_is_imported() -> None:
    program = (
        "import sys, yaml; from everyrank import get_loader;"
        "assert 'torch' not in sys.modules and 'colorsys' not in sys.modules;"
        "found = yaml.load('a: !pyobject colorsys.rgb_to_hsv', Loader=get_loader());"
        "print(found['a'].__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rgb_to_hsv", "False"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: !pyobject torch.optim.AdamV",
            r"line 2, !pyobject .*AdamV.* no attribute 'AdamV'. Did you mean 'Adam",
        ),
        ("b: !pyobject torhc.optim.Adam", r"line 1.*no module 'torhc'.*Did you mean 'torch'\?"),
        ("b: !pyobject torch.optim", "is a module"),
        ("b: !pyobject Adam", "is not the full name"),
        ("b: !pyobject [torch.optim.Adam]", "write one full name after the tag"),
        ("b: !pyobject __main__.compute_los", "no attribute 'compute_los'"),
        ("a: 1\na: 2", "'a' is written twice"),
        ("a: [1, 2", r"not valid YAML(.|\n)*line 1"),
        ("a:\n\tb: 1", r"not valid YAML(.|\n)*character '\\t' that cannot start any token(.|\n)*line 2"),
    ],
)
def test_mistakes_name_file_line_and_tag(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as found:
        read_yaml(path)
    assert "mine.yaml" in str(found.value)


def test_a_module_that_fails_at_import_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("import no_such_package_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"importing 'broken_module' failed with ModuleNotFoundError: .*no_such_package"
    ):
        import_object("broken_module.thing")


SCRIPT = """
import sys, torch.multiprocessing as mp, yaml
from everyrank import get_loader
class Loss:
    def mean(self): return "mine"
def compute_loss(): return "found in the script"
CONFIG = yaml.load("f: !pyobject __main__.compute_loss\\ng: !pyobject __main__.Loss.mean", Loader=get_loader())
def child(rank, config):
    inside = yaml.load("f: !pyobject __main__.compute_loss", Loader=get_loader())
    print(CONFIG["f"](), config["f"](), inside["f"](), config["g"](None), flush=True)
if __name__ == "__main__":
    mp.spawn(child, args=(CONFIG,), nprocs=1)
"""


def test_names_of_the_running_script_also_in_spawned_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == " ".join(["found in the script"] * 3 + ["mine"]), done.stderr
