"""Saving, finding, loading, keeping: damage is found wherever it is, and nothing in a checkpoint is ever executed."""

from __future__ import annotations

import json
import logging
import math
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from everyrank import current_world
from everyrank.checkpoint.checkpointer import Checkpointer
from everyrank.checkpoint.encoding import flatten_state, unflatten_state
from everyrank.checkpoint.export import export
from everyrank.checkpoint.folder import list_checkpoints
from everyrank.checkpoint.manifest import FileRecord, Manifest, checksum_of_file
from everyrank.errors import CheckpointError, ConfigError, UserError


def make(folder: Path, **options) -> Checkpointer:
    return Checkpointer(folder, world=current_world(), **options)


def save(checkpointer: Checkpointer, step: int, metric: float | None = None) -> None:
    tensors = {"model": {"weight": torch.full((200,), float(step)), "bias": torch.zeros(())}}
    checkpointer.save(step, tensors=tensors, state={"step": step}, rank_state={"rank": 0}, metric=metric)


def record_of(path: Path) -> FileRecord:
    return FileRecord(size=path.stat().st_size, sha256=checksum_of_file(path))


def steps(folder: Path) -> list[int]:
    return [info.step for info in list_checkpoints(folder, verify=False)]


def test_a_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def build() -> tuple:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)

    def train(parts: tuple, num_steps: int) -> None:
        model, optimizer, scheduler = parts
        for _ in range(num_steps):
            optimizer.zero_grad()
            model(torch.linspace(0, 1, 24).view(6, 4)).square().mean().backward()
            optimizer.step()
            scheduler.step()

    straight = build()
    train(straight, 10)
    saved = build()
    train(saved, 4)
    with make(tmp_path) as checkpointer:
        tensors, rest = flatten_state(saved[1].state_dict())
        checkpointer.save(
            4,
            tensors={"model": saved[0].state_dict(), "optimizer": tensors},
            state={"optimizer": rest, "scheduler": saved[2].state_dict(), "best": math.inf},
            rank_state={"rank": 0},
        )
        train(saved, 2)  # while it is being written
    resumed = build()
    checkpointer = make(tmp_path)
    info = checkpointer.latest()
    assert info is not None
    loaded = checkpointer.load(info)
    resumed[0].load_state_dict(loaded.tensors["model"])
    resumed[1].load_state_dict(unflatten_state(loaded.tensors["optimizer"], loaded.state["optimizer"]))
    resumed[2].load_state_dict(loaded.state["scheduler"])
    train(resumed, 6)
    for name, tensor in straight[0].state_dict().items():
        assert torch.equal(resumed[0].state_dict()[name], tensor), name
    assert (loaded.step, loaded.world_size, loaded.rank_states, loaded.state["best"]) == (4, 1, [{"rank": 0}], math.inf)


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints; returns their folder and that of the newer one, to be damaged."""
    with make(tmp_path) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
    return tmp_path, tmp_path / "step-00000002"


def expect_skipped(folder: Path, caplog: pytest.LogCaptureFixture, file: str) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="everyrank"):
        info = make(folder).latest()
    assert info is not None
    assert info.step == 1
    assert "step-00000002" in caplog.text
    assert file in caplog.text
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        make(folder).load(folder / "step-00000002")


FILES = ["model.safetensors", "state.json", "manifest.json"]


def test_every_truncation_is_found(damaged: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    folder, newest = damaged
    rng = random.Random(0)
    for number in range(50):
        file = newest / FILES[number % 3]
        whole = file.read_bytes()
        file.write_bytes(whole[: rng.randrange(len(whole)) if number > 3 else 0])
        expect_skipped(folder, caplog, file.name)
        file.write_bytes(whole)
    latest = make(folder).latest()
    assert latest is not None
    assert latest.step == 2


def test_every_flipped_bit_is_found(damaged: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    folder, newest = damaged
    rng = random.Random(1)
    for number in range(50):
        file = newest / FILES[number % 3]
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(broken)
        expect_skipped(folder, caplog, file.name)
        file.write_bytes(whole)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found(damaged: tuple[Path, Path], caplog: pytest.LogCaptureFixture, file: str) -> None:
    (damaged[1] / file).unlink()
    expect_skipped(damaged[0], caplog, file)


def test_a_file_of_another_checkpoint_is_found(damaged: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(damaged[0] / "step-00000001/model.safetensors", damaged[1])
    expect_skipped(damaged[0], caplog, "model.safetensors")


def test_without_a_whole_checkpoint_there_is_none(damaged: tuple[Path, Path]) -> None:
    for path in damaged[0].iterdir():
        (path / "manifest.json").write_text("{}")
    assert make(damaged[0]).latest() is None
    assert make(damaged[0] / "other").latest() is None
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        export(damaged[0], damaged[0] / "out.pth")


def test_listing_says_what_is_wrong(damaged: tuple[Path, Path]) -> None:
    (damaged[1] / "state.json").write_text("{}")
    first, second = list_checkpoints(damaged[0])
    assert (first.step, first.verified, first.reason, first.world_size) == (1, True, "", 1)
    assert first.num_bytes == sum(file.stat().st_size for file in first.path.iterdir() if file.name != "manifest.json")
    assert (second.step, second.verified) == (2, False)
    assert "state.json has 2 bytes" in second.reason
    assert [info.verified for info in list_checkpoints(damaged[0], verify=False)] == [None, None]


class Evil:
    def __reduce__(self):
        return (open, (str(TRAP), "w"))


TRAP = Path()


def test_a_pickle_in_the_folder_is_never_executed(damaged: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as an extra file, nor in place of one, nor with a manifest that vouches for it."""
    folder, newest = damaged
    monkeypatch.setattr(f"{__name__}.TRAP", folder / "executed")
    bomb = pickle.dumps(Evil())
    pickle.loads(bomb).close()
    assert TRAP.exists(), "the bomb must be a real one"
    TRAP.unlink()
    for name in ("model.pth", "data.pkl", ".metadata", "__init__.py"):
        (newest / name).write_bytes(bomb)
    info = make(folder).latest()
    assert info is not None
    assert make(folder).load(info).step == 2
    for name in ("model.safetensors", "state.json"):
        (newest / name).write_bytes(bomb)
        files = {file: record_of(newest / file) for file in FILES[:2]}
        (newest / "manifest.json").write_text(Manifest(step=2, metric=None, world_size=1, files=files).to_text())
        with pytest.raises(CheckpointError):
            make(folder).load(newest)
    assert not TRAP.exists()


def test_a_manifest_cannot_point_outside_its_folder(damaged: tuple[Path, Path]) -> None:
    stolen = "../step-00000001/state.json"
    manifest = Manifest(step=2, metric=None, world_size=1, files={stolen: record_of(damaged[1] / stolen)})
    (damaged[1] / "manifest.json").write_text(manifest.to_text())
    with pytest.raises(CheckpointError, match="outside"):
        make(damaged[0]).load(damaged[1])


def test_retention_keeps_the_last_the_best_and_every_nth(tmp_path: Path) -> None:
    metrics = {1: 5.0, 2: 1.0, 3: math.nan, 4: 4.0, 5: 3.0, 6: None, 7: 9.0, 8: 8.0, 9: 7.0, 10: 6.0}
    for options, expected in [
        ({"keep_last": 2, "keep_best": 0}, [9, 10]),
        ({"keep_last": 1, "keep_best": 2}, [2, 5, 10]),
        ({"keep_last": 1, "keep_best": 2, "metric_mode": "max"}, [7, 8, 10]),
        ({"keep_last": 1, "keep_best": 0, "keep_every": 4}, [4, 8, 10]),
        ({"keep_last": None}, list(range(1, 11))),
    ]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with make(folder, **options) as checkpointer:
            for step, metric in metrics.items():
                save(checkpointer, step, metric)
        assert steps(folder) == expected
        if "metric_mode" in options:
            best = checkpointer.best()
            assert best is not None
            assert best.step == 7


def test_the_best_is_remembered_by_the_next_run(tmp_path: Path) -> None:
    for start in (1, 5, 9):
        with make(tmp_path, keep_last=1, keep_best=1) as checkpointer:
            for step in range(start, start + 4):
                save(checkpointer, step, metric=abs(step - 3))
    assert steps(tmp_path) == [3, 12]


def test_a_damaged_checkpoint_takes_nobodys_place(damaged: tuple[Path, Path]) -> None:
    (damaged[1] / "manifest.json").unlink()
    with make(damaged[0], keep_last=2, keep_best=0) as checkpointer:
        save(checkpointer, 3)
    assert steps(damaged[0]) == [1, 2, 3]


def test_the_same_step_again_takes_the_first_ones_place(tmp_path: Path) -> None:
    with make(tmp_path) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 1, metric=2.5)
    assert [(info.step, info.metric, info.verified) for info in list_checkpoints(tmp_path)] == [(1, 2.5, True)]


def test_export_makes_one_file_that_others_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with make(folder) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
    from safetensors.torch import load_file

    pth = torch.load(export(folder, tmp_path / "new" / "model.pth"), weights_only=True)
    assert torch.load(export(tmp_path, tmp_path / "of_run.pt"), weights_only=True)["weight"][0] == 2
    tensors = load_file(export(folder / "step-00000001", tmp_path / "model.safetensors"))
    assert (pth["weight"][0], tensors["weight"][0]) == (2, 1)
    assert set(tensors) == set(pth) == {"weight", "bias"}
    with pytest.raises(UserError, match="suffix"):
        export(folder, tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"'modle' was asked for.*Did you mean 'model'"):
        export(folder, tmp_path / "x.pth", group="modle")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"keep_last": 0}, "keep_last=0"), ({"keep_best": -1}, "keep_best=-1"), ({"metric_mode": "mni"}, "'min'")],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make(tmp_path, **options)


def test_what_cannot_be_saved_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    checkpointer = make(tmp_path)
    for tensors, state, rank_state, named in [
        ({}, {"a": object()}, {}, "'a'"),
        ({}, {}, {"b": torch.ones(1)}, "'b'"),
        ({"a/b": {}}, {}, {}, "'a/b'"),
        ({"model": {"c": torch.eye(2).to_sparse()}}, {}, {}, "'c'"),
    ]:
        with pytest.raises(CheckpointError, match=named):
            checkpointer.save(1, tensors=tensors, state=state, rank_state=rank_state)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_plain_json_that_names_its_versions(tmp_path: Path) -> None:
    with make(tmp_path) as checkpointer:
        save(checkpointer, 3, metric=math.inf)
    text = (tmp_path / "step-00000003" / "manifest.json").read_text()
    manifest = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {"model.safetensors", "state.json"}
