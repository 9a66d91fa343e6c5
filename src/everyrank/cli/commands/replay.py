"""run one step of one rank of a trainer's run again, in one process, with the same batch and random state"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from everyrank.errors import EXIT_OK, DataError

if TYPE_CHECKING:
    from everyrank.checkpoint.folder import CheckpointInfo


def main(argv: Sequence[str]) -> int:
    """Go back to the nearest checkpoint before the step, go on to the step, and do it as that rank did."""
    parser = argparse.ArgumentParser(prog="everyrank replay", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, with its run.yaml and checkpoints")
    parser.add_argument("--rank", type=int, required=True, help="the rank")
    parser.add_argument("--step", type=int, required=True, help="the optimizer step, from 1")
    parser.add_argument("--pdb", action="store_true", help="stop in Python's debugger before the step")
    arguments = parser.parse_args(argv)
    run, step = arguments.run, arguments.step
    if not (run / "run.yaml").is_file():
        raise DataError(f"{run} was given, but it has no run.yaml. Fix: give the folder that everyrank run printed.")

    from everyrank.checkpoint.folder import list_checkpoints
    from everyrank.cli.commands.checkpoints import checkpoint_folder

    found = [info for info in list_checkpoints(checkpoint_folder(run), verify=True) if info.verified]
    before = [info for info in found if info.step < step]
    if not before:
        steps = ", ".join(str(info.step) for info in found) or "none"
        raise DataError(f"--step={step} was given, but no checkpoint is from before it (there are: {steps}).")
    start = before[-1]
    if not 0 <= arguments.rank < start.world_size:
        raise DataError(
            f"--rank={arguments.rank} was given, but the run had ranks 0 to {start.world_size - 1} at step "
            f"{start.step}."
        )
    with tempfile.TemporaryDirectory(prefix="everyrank-replay-", ignore_cleanup_errors=True) as folder:
        return _replay(run, start, Path(folder), arguments.rank, step, arguments.pdb)


def _replay(run: Path, start: CheckpointInfo, folder: Path, rank: int, step: int, debug: bool) -> int:
    from omegaconf import DictConfig, OmegaConf

    from everyrank.cli.launching import launch_config
    from everyrank.program.command import Program
    from everyrank.training.saving.replay import Replay
    from everyrank.worker import run_app, run_program

    shutil.copytree(start.path, folder / "checkpoints" / start.path.name)
    for name in ("config.yaml", "history.jsonl"):
        if (run / name).is_file():
            shutil.copy(run / name, folder / name)
    asked = Replay(folder=str(folder), step=step, rank=None, world_size=start.world_size, debug=debug)
    cfg = OmegaConf.create((run / "run.yaml").read_text(encoding="utf-8"))
    assert isinstance(cfg, DictConfig)
    program = None if cfg.run.program is None else Program.from_mapping(cfg.run.program)
    cfg.run.dir, cfg.run.name, cfg.run.program = str(folder / "run"), "replay", None
    print(f"replay: from the checkpoint of step {start.step}", flush=True)
    if start.step < step - 1:
        print(f"replay: {start.world_size} ranks go on to step {step - 1}", flush=True)
        cfg.driver = {"_target_": "everyrank.drivers.torchrun.TorchrunDriver", "nproc_per_node": start.world_size}
        cfg.env.variables = {**(cfg.env.variables or {}), **asked.variable()}
        code, _ = launch_config(cfg, None if program is None else program.words)
        if code != EXIT_OK:
            return code
    os.environ.update(Replay(**{**vars(asked), "rank": rank}).variable())
    if program is not None:
        return run_program({**cfg.run, "program": program.as_mapping()})
    return run_app(cfg)[0]
