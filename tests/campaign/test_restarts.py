"""A group with ``max_restarts`` goes on by itself when a rank is killed: one command, and the uninterrupted result."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import hurt_run
import pytest
from hurt_run import NUM_EPOCHS, NUM_SAMPLES, Harm

import everyrank
from campaign.starting import Start, start_command
from everyrank.certification.evidence import Evidence


@pytest.mark.slow
def test_a_killed_rank_is_named_and_all_go_on_from_the_last_checkpoint(start_cli: Start, tmp_path: Path) -> None:
    harms = {"training": Harm("training", 16, rank=1), "renaming": Harm("rename", 4, after=True)}
    processes = {
        place: start_command(start_cli, harm, tmp_path / place, extra=("driver.max_restarts=2",))
        for place, harm in harms.items()
    }
    everyrank.launch(hurt_run.train, tmp_path / "uninterrupted", preload=("everyrank.apps.train",))
    uninterrupted = Evidence.of(tmp_path / "uninterrupted")
    for place, process in processes.items():
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        named = rf"notice: rank {harms[place].rank} .*SIGKILL.*; all ranks start again \(restart 1\)"
        assert len(re.findall(named, output)) == 1, output
        assert output.count("Resuming from") == 1
        evidence = Evidence.of(tmp_path / place)
        assert evidence.uses == {epoch: Counter(range(NUM_SAMPLES)) for epoch in range(NUM_EPOCHS)}
        assert evidence.difference(uninterrupted) == 0
