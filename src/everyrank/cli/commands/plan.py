"""what a run would do, before it runs: batches, steps, learning rate, traffic, checkpoints, commands"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from everyrank.errors import EXIT_BAD_INPUT, EXIT_OK, ConfigError
from everyrank.runtime import torch_cures
from everyrank.worker import load_app

_USAGE = """\
usage: everyrank plan app=APP [driver=DRIVER] [num_samples=N] key=value ...

The settings are those of everyrank run; the driver is torchrun unless another is given. num_samples=N says how many
samples the dataset has; otherwise app.data.kwargs.num_samples does, or the dataset is made and asked.

  everyrank plan app=causal_sets driver.nnodes=512 driver.nproc_per_node=8
"""


def main(argv: Sequence[str]) -> int:
    """Print the plan of a run; nothing is written and nothing started."""
    arguments = list(argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(_USAGE, end="")
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    given = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("num_samples=")]
    arguments = [argument for argument in arguments if not argument.startswith("num_samples=")]
    if not any(argument.startswith("driver=") for argument in arguments):
        arguments.insert(0, "driver=torchrun")
    if given and not given[0].isdigit():
        raise ConfigError(f"num_samples={given[0]} was given; it is a number of samples.")

    from everyrank.cli.compose import compose

    torch_cures.install()  # as in the ranks: a model is made quicker
    for cfg in compose(arguments):
        _show(cfg, int(given[0]) if given else None)
    return EXIT_OK


def _show(cfg: DictConfig, num_samples: int | None) -> None:
    from everyrank.cli.launching import plan_config

    notices = _name_nodes(cfg)
    plan, world_size = plan_config(cfg)
    num_nodes = plan.num_nodes
    print(f"world size: {world_size} ({num_nodes} nodes, {world_size // num_nodes} ranks each)")
    config = _trainer_config(cfg)
    if config is None:
        print(f"app {cfg.app.get('name') or cfg.app._target_}: no training in its configuration, so no numbers of one")
    else:
        from everyrank.cli.commands.plan_numbers import compute

        samples = num_samples if num_samples is not None else _num_samples(config)
        for line in describe(compute(config, samples, world_size)):
            print(line)
    for notice in notices:
        print(f"notice: {notice}")
    print(plan.render())
    if num_nodes > 1 and "node_rank" in cfg.driver and not cfg.driver.get("hosts"):
        print(f"nodes 1 to {num_nodes - 1}: the same command with driver.node_rank=1 to {num_nodes - 1}")


def _name_nodes(cfg: DictConfig) -> list[str]:
    """Stand-ins for what only the day of the run knows."""
    driver = cfg.driver
    elastic = driver.get("rdzv_endpoint") or driver.get("hosts")
    if driver.get("nnodes", 1) == 1 or elastic or "master_addr" not in driver or driver.master_addr:
        return []
    OmegaConf.update(cfg, "driver.master_addr", "NODE0")
    if not driver.master_port:
        OmegaConf.update(cfg, "driver.master_port", 29500)
    return ["driver.master_addr is not set: NODE0 stands for the first node's name"]


def _trainer_config(cfg: DictConfig) -> Any:
    """The trainer's configuration of an app that has one, else None."""
    OmegaConf.update(cfg, "run.dir", cfg.run.dir or "RUN", force_add=True)
    app = load_app(str(cfg.app._target_))
    if not hasattr(app, "trainer_config") and not ("training" in cfg.app and "model" in cfg.app):
        return None
    from everyrank.training.config import read_app_config, read_config

    return read_config(app.trainer_config(cfg) if hasattr(app, "trainer_config") else read_app_config(cfg))


def _num_samples(config: Any) -> int:
    data = config.data
    if data is None:
        raise ConfigError("the app configures no data. Say how many samples there are: num_samples=N.")
    known = data.kwargs.get("num_samples")
    return int(known) if isinstance(known, int) else len(data.type(*data.args, **data.kwargs))


def describe(numbers: Any) -> list[str]:
    """The numbers as lines of text."""
    n = numbers
    lines = [
        f"samples: {n.num_train:,} training, {n.num_validation:,} validation, {n.num_test:,} test",
        f"global batch: {n.global_batch_size:,} samples, {_range(n.samples_per_rank)} on a rank"
        + (f"; the last of an epoch: {n.last_batch_size:,}" if n.last_batch_size != n.global_batch_size else ""),
        f"samples on a rank and epoch: {_range(n.epoch_per_rank)}",
        f"optimizer steps: {n.steps_per_epoch:,} an epoch, {n.num_steps:,} in all",
        "learning rate: "
        + (
            "depends on results, or too long to walk through"
            if n.learning_rates is None
            else "from {:.4g} over at most {:.4g} to {:.4g}".format(*n.learning_rates)
        ),
        f"parameters: {n.num_parameters:,}",
        f"sent by each rank {'and step' if n.sent_every == 1 else f'every {n.sent_every} steps'}: "
        f"{_bytes(n.sent_per_step)} (ring all-reduce of {_bytes(n.gradient_bytes)})",
        f"checkpoints: {_range((len(n.checkpoint_steps), n.most_checkpoints))} of {_bytes(n.checkpoint_bytes)} each, "
        f"at most {n.num_kept} kept ({_bytes(n.num_kept * n.checkpoint_bytes)})",
    ]
    if n.samples_per_rank[0] == 0:
        lines.append(
            f"notice: the global batch of {n.global_batch_size} is smaller than the world size {n.world_size}: in each "
            "step some ranks have nothing to do"
        )
    return lines


def _range(values: tuple[int, int]) -> str:
    low, high = values
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
