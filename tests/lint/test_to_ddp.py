"""--to-ddp: the changed program has the curve that the single-device one had, at every world size."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm_start

from conftest import nightly
from everyrank.cli.main import main
from everyrank.lint.engine import find
from everyrank.lint.rules import RULES
from everyrank.lint.source import read
from everyrank.lint.to_ddp.rewrite import to_ddp

PROGRAM = Path(__file__).parent / "programs" / "single_device.py"
_TWO_RANKS = {
    "run": ("everyrank", "run", "-n2", "--"),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--log-dir=logs"),
}


def _run(*command: str, folder: Path) -> None:
    done = warm_start.run([sys.executable, *command], cwd=folder, timeout_s=200)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["run", nightly("torchrun")])
def test_the_curve_at_two_ranks_is_that_of_the_single_device_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    program = tmp_path / "train.py"
    shutil.copy(PROGRAM, program)
    _run("train.py", "--out", "before", folder=tmp_path)
    assert main(["check", "--to-ddp", "--fix", str(program)]) == 0
    assert capsys.readouterr() == ("", "")
    _run("train.py", "--out", "ranks_1", folder=tmp_path)
    # 1501 samples in batches of 50: the last batch holds one, and rank 1 none of it.
    _run("-m", *_TWO_RANKS[launcher], "train.py", "--out", "ranks_2", folder=tmp_path)
    before = json.loads((tmp_path / "before").read_text())
    weights = torch.load(tmp_path / "before.pt", weights_only=True)
    assert len(before["curve"]) == 2 * 31
    for ranks in (1, 2):
        after = json.loads((tmp_path / f"ranks_{ranks}").read_text())
        assert after["curve"] == pytest.approx(before["curve"], abs=1e-12)
        assert after["accuracy"] == before["accuracy"]
        torch.testing.assert_close(
            torch.load(tmp_path / f"ranks_{ranks}.pt", weights_only=True), weights, rtol=0, atol=1e-12
        )
    findings = find(read(str(program)), frozenset(rule.code for rule in RULES if rule.default))
    assert findings == []


def test_it_shows_a_diff_and_writes_nothing_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "train.py"
    shutil.copy(PROGRAM, program)
    assert main(["check", "--to-ddp", str(program)]) == 0
    shown = capsys.readouterr().out
    assert main(["check", "--to-ddp", "--diff", str(program)]) == 0
    assert capsys.readouterr().out == shown
    assert "+    model = DistributedDataParallel(model)" in shown
    assert "-    train_loader = DataLoader(train_set, batch_size=50, shuffle=True)" in shown
    assert program.read_text() == PROGRAM.read_text()


UNSURE = """\
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler
from torch.utils.tensorboard import SummaryWriter

net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
data = torch.utils.data.TensorDataset(torch.randn(10, 4))
loader = DataLoader(data, batch_size=2, sampler=WeightedRandomSampler([1.0] * 10, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
writer = SummaryWriter("runs")
seen = 0
for (batch,) in loader:  # the only epoch
    loss = net(batch).mean()
    loss.backward()
    optimizer.step()
    seen += len(batch)
    writer.add_scalar("loss", loss.item(), seen)
"""


def test_where_it_is_not_sure_it_leaves_a_comment_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "train.py"
    program.write_text(UNSURE)
    assert main(["check", "--to-ddp", "--fix", str(program)]) == 1
    told = capsys.readouterr().err.splitlines()
    changed = program.read_text()
    compile(changed, "train.py", "exec")
    comments = [line.strip() for line in changed.splitlines() if line.strip().startswith("# everyrank: not sure")]
    assert sorted(line.split(": ", 1)[1] for line in told) == sorted(c.removeprefix("# everyrank: ") for c in comments)
    assert any("sampler" in comment for comment in comments)
    assert any("BatchNorm" in comment for comment in comments)
    assert sum("nothing seeds this" in comment for comment in comments) == 1
    assert "for (batch,) in loader:  # the only epoch" in changed
    assert 'SummaryWriter("runs") if RANK == 0 else None' in changed


def test_a_mean_that_only_rank_0_writes_is_computed_on_every_rank() -> None:
    text = UNSURE.replace(", sampler=WeightedRandomSampler([1.0] * 10, 10)", "")
    changed, _ = to_ddp(text, "train.py")
    _, _, after = changed.partition("    mean_loss = global_mean(loss, loader.loss_weight)\n")
    assert after.startswith('    if RANK == 0:\n        writer.add_scalar("loss", mean_loss, seen)\n')
    assert "global_mean" not in after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\nprint(torch.ones(1))\n", "has no loop with a backward()"),
        ("import torch.distributed as dist\ndist.init_process_group('gloo')\n", "takes part in distributed training"),
        (UNSURE.replace("seen", "RANK"), "uses the name RANK already"),
        ("import torch\nfor x in:\n", "does not parse"),
    ],
)
def test_what_it_cannot_change_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    program = tmp_path / "train.py"
    program.write_text(text)
    assert main(["check", "--to-ddp", str(program)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Fix:" in error
