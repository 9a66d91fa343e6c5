"""All mistakes at once, each with its path, what was found, what is allowed, and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from everyrank.config.yaml_loader import get_loader
from everyrank.errors import ConfigError
from everyrank.training.config import TrainerConfig, plain_config, read_config

ROOT = Path(__file__).parent.parent.parent


def config(**training: Any) -> dict[str, Any]:
    return {
        "criterion": torch.nn.functional.mse_loss,
        "model": {"type": torch.nn.Linear, "in_features": 4, "out_features": 2},
        "training": {"path": "x", "num_epochs": 1, "batch_size": 2, **training},
    }


def problems(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as found:
        read_config(values)
    return found.value.problems


def test_everything_at_once() -> None:
    values = config(
        num_epochs="ten",
        batchsize=3,
        drop_last=1,
        compile={"mod": "x"},
        keep_last=0,
        optimizer_type="torch.optim.AdamWW",
    )
    values.update(
        trainning={}, parallel={"strategy": "fdsp2", "master_port": 1.5}, validation={"validator": {"devise": "cpu"}}
    )
    del values["criterion"]
    found = "\n".join(problems(values))
    for line in (
        "criterion: missing; this key is required.",
        "training.num_epochs: found 'ten' (str), but it must be a whole number.",
        "training.batchsize: unknown key. Did you mean 'batch_size'? Allowed here: accumulation_steps, ",
        "training.drop_last: found 1 (int), but it must be true or false.",
        "training.compile.mod: unknown key. Did you mean 'mode'?",
        "training.keep_last: found 0 (int), but it must be greater than or equal to 1.",
        "training.optimizer_type: 'torch.optim.AdamWW' was given, but module 'torch.optim' has no attribute 'AdamWW'. "
        "Did you mean 'AdamW'?",
        "trainning: unknown key. Did you mean 'training'?",
        "parallel.strategy: found 'fdsp2' (str), but it must be one of 'ddp' or 'fsdp2'. Did you mean 'fsdp2'?",
        "parallel.master_port: found 1.5 (float), but it must be text or a whole number.",
        "validation.validator.devise: unknown key. Did you mean 'device'?",
    ):
        assert line in found
    assert len(problems(values)) == 11


@pytest.mark.parametrize(
    ("training", "others", "message"),
    [
        ({"global_batch_size": 4}, {}, "both was found"),
        ({"batch_size": None}, {}, "neither was found"),
        ({"prefetch_factor": 2}, {}, "training.num_workers 0 nothing reads ahead"),
        (
            {"scheduler": {"type": torch.optim.lr_scheduler.ReduceLROnPlateau, "interval": "step"}},
            {},
            "ReduceLROnPlateau needs a validation result",
        ),
        ({"mixed_precision": "fp16"}, {"parallel": {"strategy": "fsdp2"}}, "use 'bf16'"),
        ({}, {"parallel": {"strategy": "fsdp2"}, "validation": {"on": "rank0"}}, "no rank holds the whole model"),
        ({}, {"parallel": {"strategy": "fsdp2", "comm_hook": "bf16"}}, "compresses DDP's gradients"),
        ({}, {"validation": {"metrics": {"a": "MulticlasAccuracy"}}}, "validation.metrics.a.type: .*MulticlasAccuracy"),
        ({}, {"criterion": "torch.nn.functional.mse_los"}, "criterion: .*Did you mean 'mse_loss'"),
        ({}, {"criterion": 3}, r"criterion: found 3 \(int\), but it must be a class or function"),
    ],
)
def test_contradictions(training: dict[str, Any], others: dict[str, Any], message: str) -> None:
    import re

    assert re.search(message, "\n".join(problems({**config(**training), **others})))


def test_keys_beside_the_models_type() -> None:
    assert read_config(config()).model.build().in_features == 4
    wrong = config()
    wrong["model"]["out_feature"] = 3
    assert "model.out_feature: unknown key. Did you mean 'out_features'?" in problems(wrong)[0]


@pytest.mark.parametrize("loader", [yaml.SafeLoader, get_loader()])
def test_words_that_yaml_takes_for_true_and_false(loader: type[yaml.SafeLoader]) -> None:
    text = "{validation: {on: rank0}, testing: {on: all}, training: {progress: off, shuffle: off, ledger: on}}"
    values = yaml.load(text, Loader=loader)
    values["training"] |= config()["training"]
    found = read_config({**config(), **values})
    assert (found.validation.on, found.testing.on, found.training.progress) == ("rank0", "all", "off")
    assert (found.training.shuffle, found.training.ledger) == (False, True)
    values["training"]["progress"] = True
    assert "training.progress: found True (bool)" in problems({**config(), **values})[0]


def test_it_is_frozen_and_no_mapping_is_an_error() -> None:
    read = read_config(config())
    with pytest.raises(AttributeError):
        read.training.seed = 1  # type: ignore[misc]
    assert read_config(read) is read
    assert read_config(plain_config(read)) == read
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_config("training: {}")


def test_the_reference_page_is_whole() -> None:
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")

    def keys(section: Any) -> set[str]:
        names = set()
        for name, info in section.__pydantic_fields__.items():
            assert info.description, f"{section.__name__}.{name} has no documentation"
            names.add(name)
        return names

    for name in keys(TrainerConfig):
        assert f"| `{name}` |" in page
