"""Option files: what is read, refused, completed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everyrank import ConfigError, schema
from everyrank.apps.video_restoration import load_options
from everyrank.apps.video_restoration.options.keys import NetworkOptions, TrainOptions

ROOT = Path(__file__).resolve().parents[3]
LEAST = {
    "task": "t",
    "datasets": {"train": {"dataset_type": "VideoRecurrentTrainDataset", "dataroot_gt": "gt", "num_frame": 6}},
}

LEGACY = """{
  "task": "001_train_vrt_videosr_bi_reds_6frames"
  , "model": "vrt"
  , "gpu_ids": [0,1,2,3,4,5,6,7]
  , "dist": true
  , "find_unused_parameters": false
  , "use_static_graph": true
  ,"scale": 4
  , "n_channels": 3
  , "path": {
    "root": "experiments"            // "/home/user/experiments"
    , "pretrained_netG": null        // path of a model, e.g. https://example.org/model
    , "pretrained_netE": null
  }
  , "datasets": {
    "train": {
      // "name": "reds",
      , "name": "train_dataset"
      , "dataset_type": "VideoRecurrentTrainDataset"
      , "dataroot_gt": "trainsets/REDS//train_sharp_with_val.lmdb"
      , "dataroot_lq": "trainsets/REDS/train_sharp_bicubic_with_val.lmdb"
      , "meta_info_file": "data/meta_info/meta_info_REDS_GT.txt"
      , "filename_tmpl": "08d"
      , "filename_ext": "png"
      , "val_partition": "REDS4"
      , "test_mode": false
      , "io_backend": {"type": "lmdb"}
      , "num_frame": 6
      , "gt_size": 256
      , "interval_list": [1]
      , "random_reverse": false
      , "use_hflip": true
      , "use_rot": true
      , "dataloader_shuffle": true
      , "dataloader_num_workers": 32
      , "dataloader_batch_size": 8,
    }
    , "test": {
      "name": "test_dataset", "dataset_type": "VideoRecurrentTestDataset", "dataroot_gt": "testsets/REDS4/GT"
      , "dataroot_lq": "testsets/REDS4/sharp_bicubic", "cache_data": true, "io_backend": {"type": "disk"}
      , "num_frame": -1
    }
  }
  , "netG": {
    "net_type": "vrt", "upscale": 4, "img_size": [6,64,64], "window_size": [6,8,8]
    , "depths": [8,8,8,8,8,8,8, 4,4,4,4, 4,4], "indep_reconsts": [11,12]
    , "embed_dims": [120,120,120,120,120,120,120, 180,180,180,180, 180,180]
    , "num_heads": [6,6,6,6,6,6,6, 6,6,6,6, 6,6], "spynet_path": "model_zoo/vrt/spynet_sintel_final-3d2a1287.pth"
    , "pa_frames": 2, "deformable_groups": 12, "nonblind_denoising": false
    , "use_checkpoint_attn": false, "use_checkpoint_ffn": false
    , "no_checkpoint_attn_blocks": [], "no_checkpoint_ffn_blocks": [], "init_type": "default"
  }
  , "train": {
    "G_lossfn_type": "charbonnier", "G_lossfn_weight": 1.0, "G_charbonnier_eps": 1e-9
    , "E_decay": 0, "G_optimizer_type": "adam", "G_optimizer_lr": 4e-4, "G_optimizer_betas": [0.9,0.99]
    , "G_optimizer_wd": 0, "G_optimizer_clipgrad": null, "G_optimizer_reuse": true
    , "fix_iter": 20000, "fix_lr_mul": 0.125, "fix_keys": ["spynet", "deform"]
    , "total_iter": 300000
    , "G_scheduler_type": "CosineAnnealingWarmRestarts", "G_scheduler_periods": 300000, "G_scheduler_eta_min": 1e-7
    , "G_regularizer_orthstep": null, "G_regularizer_clipstep": null
    , "G_param_strict": true, "E_param_strict": true
    , "checkpoint_test": 5000, "checkpoint_save": 5000, "checkpoint_print": 200
  }
  , "val": {
    "save_img": false, "pad_seq": false, "flip_seq": false, "center_frame_only": false
    , "num_frame_testing": 40, "num_frame_overlapping": 2, "size_patch_testing": 128
  }
}
"""


def _load(tmp_path: Path, options: Any) -> dict[str, Any]:
    path = tmp_path / "options.json"
    path.write_text(options if isinstance(options, str) else json.dumps(options))
    return load_options(path)


def test_a_legacy_file_with_comments_and_stray_commas_is_read(tmp_path: Path) -> None:
    options = _load(tmp_path, LEGACY)
    train = options["datasets"]["train"]
    assert train["dataroot_gt"] == "trainsets/REDS//train_sharp_with_val.lmdb"  # // inside a text is no comment
    assert train["name"] == "train_dataset"
    assert (train["scale"], train["n_channels"], train["phase"]) == (4, 3, "train")
    assert options["gpu_ids"] == list(range(8))
    assert options["dist"] is True
    assert options["netG"]["deformable_groups"] == 12
    assert options["train"]["G_scheduler_periods"] == [300000]
    assert options["path"]["models"] == "experiments/001_train_vrt_videosr_bi_reds_6frames/models"


def test_missing_keys_get_the_documented_default(tmp_path: Path) -> None:
    options = _load(tmp_path, LEAST)
    assert options["dist"] is None
    assert options["gpu_ids"] == "auto"
    assert options["netG"]["upscale"] == options["scale"] == 1
    for name, default in schema.as_mapping(NetworkOptions()).items():
        if name != "scale":  # it follows from the other keys
            assert options["netG"][name] == default or name == "upscale"
    assert {k: v for k, v in options["train"].items() if "periods" not in k and "weights" not in k} == {
        k: v for k, v in schema.as_mapping(TrainOptions()).items() if "periods" not in k and "weights" not in k
    }
    assert options["train"]["G_scheduler_periods"] == [300000]
    options["netG"]["depths"].append(1)
    assert _load(tmp_path, LEAST)["netG"]["depths"] != options["netG"]["depths"]  # defaults are not shared


@pytest.mark.parametrize("gpu_ids", [[0, 1], [3], "auto", None, 0])
@pytest.mark.parametrize("dist", [{}, {"dist": True}, {"dist": False}])
def test_old_ways_to_name_gpus_and_ask_for_distribution_are_read(tmp_path: Path, gpu_ids: Any, dist: Any) -> None:
    options = _load(tmp_path, {**LEAST, "gpu_ids": gpu_ids, **dist})
    assert options["gpu_ids"] == gpu_ids
    assert options["dist"] is dist.get("dist")


def test_unknown_keys_are_refused_with_the_nearest_known_name(tmp_path: Path) -> None:
    wrong = {**LEAST, "tasks": 1, "train": {"G_optimiser_lr": 1e-4, "total_iters": 5}, "netG": {"depth": [1]}}
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, wrong)
    text = str(caught.value)
    for words in ("'task'", "'G_optimizer_lr'", "'total_iter'", "'depths'"):
        assert words in text
    assert len(caught.value.problems) == 4


# keys that older code read, or wrote into the resolved file beside a run's results, and that mean nothing here
UNUSED = {
    "": {"logger": {"print_freq": 100}, "merge_bn": True, "merge_bn_startpoint": 400000, "num_gpu": 8, "rank": 1}
    | {"world_size": 8, "is_train": True, "opt_path": "options/vrt/old.json"},
    "path": {"options": "experiments/t/options", "pretrained_optimizerG": "experiments/t/models/5_optimizerG.pth"},
    "datasets.train": {"H_size": 96, "test_mode": True, "use_flip": True},
    "datasets.test": {"H_size": 96, "test_mode": True},
    "netG": {"init_bn_type": "constant", "init_gain": 0.02},
    "train": {"F_feature_layer": 34, "F_weights": 1.0, "F_lossfn_type": "l1", "F_lossfn_weight": 1.0}
    | {"F_use_input_norm": True, "F_use_range_norm": True, "G_regularizer_orthstep": 9, "G_regularizer_clipstep": 9},
}
# keys that follow from others; where they say something else, that is told and does not count
OVERRULED = {
    "path": {
        "task": "elsewhere/t",
        "log": "elsewhere/t",
        "models": "elsewhere/t/models",
        "images": "elsewhere/t/images",
    },
    "datasets.train": {"phase": "val", "scale": 4, "n_channels": 1},
    "netG": {"scale": 4},
}
# keys that do what they did
USED = {
    "path": {"pretrained_netG": "w.pth", "pretrained_netE": None},
    "datasets.train": {"name": "x", "io_backend": {"type": "disk"}, "meta_info_file": "m.txt", "use_hflip": False}
    | {"use_rot": False, "dataloader_shuffle": False, "dataloader_num_workers": 8, "dataloader_batch_size": 8}
    | {"color_jitter": True, "temporal_scale": 1},
    "netG": {"net_type": "vrt", "init_type": "default"},
    "train": {
        "G_optimizer_type": "adam",
        "G_optimizer_wd": 0.5,
        "G_optimizer_clipgrad": 1.0,
        "G_optimizer_reuse": False,
    }
    | {"G_scheduler_type": "MultiStepLR", "G_scheduler_milestones": [5], "G_scheduler_gamma": 0.25}
    | {"G_param_strict": False, "E_param_strict": False, "checkpoint_save": 7},
    "val": {"save_img": True},
}


def _part(options: dict[str, Any], section: str) -> dict[str, Any]:
    for name in section.split("."):
        options = options.setdefault(name, {}) if name else options
    return options


def test_keys_of_older_code_are_used_or_ignored_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = copy.deepcopy(LEAST)
    given["datasets"]["test"] = {"dataset_type": "VideoRecurrentTestDataset", "dataroot_gt": "gt"}
    for keys in (UNUSED, OVERRULED, USED):
        for section, values in keys.items():
            _part(given, section).update(values)
    with caplog.at_level("INFO", logger="everyrank"):
        options = _load(tmp_path, given)
    for keys in (UNUSED, OVERRULED):
        for section, values in keys.items():
            for name in values:
                assert f"{section}.{name}".lstrip(".") + " " in caplog.text
    assert len(caplog.records) == sum(len(values) for keys in (UNUSED, OVERRULED) for values in keys.values())
    for section, values in USED.items():
        for name, value in values.items():
            assert _part(options, section)[name] == value
    assert options["path"]["models"] == "experiments/t/models"
    assert options["datasets"]["train"]["scale"] == 1


def test_the_resolved_file_of_a_run_is_an_option_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = _load(tmp_path, LEGACY)
    with caplog.at_level("INFO", logger="everyrank"):
        assert _load(tmp_path, options) == options
    assert not caplog.records


def test_frame_interpolation_files_say_the_temporal_scale_that_the_network_has(tmp_path: Path) -> None:
    file = {
        "task": "t",
        "datasets": {
            "train": {"dataset_type": "VideoRecurrentTrainVimeoVFIDataset", "dataroot_gt": "gt", "temporal_scale": 2},
            "test": {"dataset_type": "VideoTestVimeo90KDataset", "dataroot_gt": "gt", "temporal_scale": 2},
        },
        "netG": {"pa_frames": 0},
    }
    assert _load(tmp_path, file)["datasets"]["train"]["temporal_scale"] == 2
    with pytest.raises(ConfigError, match="pa_frames is 2, with which it is 1"):
        _load(tmp_path, {**file, "netG": {"pa_frames": 2}})


def test_sequences_padded_in_a_test_section_are_padded_in_validation(tmp_path: Path) -> None:
    test = {"dataset_type": "VideoTestVimeo90KDataset", "dataroot_gt": "gt"}
    found = [
        _load(tmp_path, {"task": "t", "datasets": {"test": {**test, **keys}}})["val"]
        for keys in ({}, {"pad_sequence": True}, {"mirror_sequence": True})
    ]
    assert [(val["pad_seq"], val["flip_seq"]) for val in found] == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"G_lossfn_type": "charbonier"}}, "Did you mean 'charbonnier'"),
        ({"train": {"total_iter": "many"}}, "train.total_iter: found 'many' (str), but it must be a whole number"),
        ({"scale": 4, "netG": {"upscale": 2}}, "make them equal"),
        ({"gpu_ids": "all"}, 'list of numbers or "auto"'),
        ({"datasets": {"train": {"dataset_type": "VideoRecurrentTrainDataset"}}}, "dataroot_gt is missing"),
        ({"datasets": {"train": {"dataset_type": "VideoRecurentTrain", "dataroot_gt": "x"}}}, "Did you mean"),
        ({"datasets": {}}, "neither train nor test"),
        ({"netG": [1]}, "netG: found [1] (list), but it must be a mapping of keys"),
        ({"scale": 3, "datasets": {"train": LEAST["datasets"]["train"] | {"gt_size": 64}}}, "must divide"),  # type: ignore[index]
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match="mistake") as caught:
        _load(tmp_path, {**LEAST, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{\n  "task": "t", // comment\n  "scale": four\n}', 3, 12),
        ('{\n  "task" "t"\n}', 2, 10),
        ('{"task": "t"', 1, 13),
        ("", 1, 1),
        ('{"task": "unfinished\n}', 1, 21),
    ],
)
def test_bad_json_is_answered_with_line_and_column(tmp_path: Path, text: str, line: int, column: int) -> None:
    with pytest.raises(ConfigError, match=rf"options\.json: line {line}, column {column}:"):
        _load(tmp_path, text)


def test_a_missing_file_is_answered_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train_vrt.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"Did you mean 'train_vrt\.json'"):
        load_options(tmp_path / "trian_vrt.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_options(tmp_path / "nowhere" / "x.json")


def test_options_are_read_without_torch() -> None:
    name = "everyrank.apps.video_restoration"
    code = f"import sys; from {name} import load_options; load_options; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", sorted((ROOT / "options" / "vrt").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_examples_load_and_describe_a_network(path: Path) -> None:
    torch = pytest.importorskip("torch")
    from everyrank.apps.video_restoration import VRT

    options = load_options(path)
    assert "//" in path.read_text()
    with torch.device("meta"):
        network = VRT(**{**options["netG"], "spynet_path": None})
    assert network.upscale == options["scale"]
