"""The VRT network against published outputs and against a straightforward implementation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from everyrank.apps.video_restoration import VRT
from everyrank.apps.video_restoration.network.deform import sampled_deform_conv2d
from everyrank.errors import ConfigError, DataError

HERE = Path(__file__).parent
DATA = HERE / "data"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = _module(HERE / "fill.py")
reference = _module(HERE.parents[2] / "benchmarks" / "vrt_reference.py")

SMALL: dict[str, Any] = {
    "window_size": [2, 4, 4],
    "depths": [4] * 7 + [2, 2],
    "indep_reconsts": [8],
    "embed_dims": [12] * 7 + [18] * 2,
    "num_heads": [3] * 9,
}
CONFIGS = {
    "two neighbours": ({"upscale": 4, "pa_frames": 2, "deformable_groups": 4}, (2, 3, 3, 40, 48)),
    "four neighbours": ({"upscale": 1, "pa_frames": 4, "deformable_groups": 4}, (1, 4, 3, 40, 48)),
    "six neighbours": ({"upscale": 2, "pa_frames": 6, "deformable_groups": 6}, (1, 5, 3, 48, 40)),
    "denoising": (
        {"upscale": 1, "pa_frames": 2, "deformable_groups": 3, "nonblind_denoising": True, "window_size": [3, 4, 4]},
        (1, 4, 4, 72, 40),
    ),
    "frame interpolation": (
        {"upscale": 1, "pa_frames": 0, "img_size": [4, 64, 64], "window_size": [4, 4, 4]},
        (2, 4, 3, 40, 48),
    ),
}


def _filled(name: str) -> tuple[VRT, torch.Tensor]:
    config, shape = CONFIGS[name]
    net = VRT(**{**SMALL, **config}).eval()
    fill.fill(net)
    return net, fill.clip(name, shape)


@pytest.mark.parametrize("name", ["super_resolution", "deblurring"])
def test_output_and_state_are_those_of_the_published_network(name: str) -> None:
    with safe_open(DATA / f"{name}.safetensors", "pt") as facts:
        about = facts.metadata()
        expected = facts.get_tensor("output_every_4th_pixel")
    net = VRT(**json.loads(about["config"])).eval()
    names = json.loads((DATA / f"{name}.state_dict.json").read_text())
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == names
    assert list(net.state_dict()) == list(names)  # legacy optimizer states number parameters in this order
    fill.fill(net)
    with torch.no_grad():
        out = net(fill.clip(name, json.loads(about["input_shape"])))
    assert list(out.shape) == json.loads(about["output_shape"])
    torch.testing.assert_close(out[..., ::4, ::4], expected, atol=1e-5, rtol=0)
    assert out.mean().item() == pytest.approx(float(about["mean"]), abs=1e-5)
    assert out.std().item() == pytest.approx(float(about["std"]), abs=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_that_of_explicit_matrices_and_loops_over_frames(name: str) -> None:
    net, clip = _filled(name)
    with torch.no_grad():
        torch.testing.assert_close(net(clip), reference.forward(net, clip), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [pytest.param("four neighbours", marks=pytest.mark.slow), "frame interpolation"])
def test_gradients_are_those_of_explicit_matrices_and_loops_over_frames(name: str) -> None:
    net, clip = _filled(name)
    net.double()
    parameters = dict(net.named_parameters())
    ours = torch.autograd.grad(net(clip.double()).square().mean(), parameters.values(), allow_unused=True)
    theirs = torch.autograd.grad(
        reference.forward(net, clip.double()).square().mean(), parameters.values(), allow_unused=True
    )
    for key, a, b in zip(parameters, ours, theirs, strict=True):
        assert (a is None) == (b is None), key
        if a is not None and b is not None:
            scale = b.abs().max().clamp_min(1e-12)
            assert ((a - b).abs().max() / scale).item() < 1e-9, key


def test_activation_checkpointing_changes_no_gradient() -> None:
    config = {**SMALL, **CONFIGS["two neighbours"][0], "drop_path_rate": 0.0}
    plain = VRT(**config)
    saving = VRT(**config, use_checkpoint_attn=True, use_checkpoint_ffn=True, no_checkpoint_ffn_blocks=[1, 2])
    clip = fill.clip("checkpointing", (1, 2, 3, 40, 40))
    for net in (plain, saving):
        fill.fill(net)
        net(clip).mean().backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, msg=key)


def test_masks_made_under_inference_mode_serve_training() -> None:
    net, clip = _filled("two neighbours")
    with torch.inference_mode():
        net(clip[:1, :2])
    net(clip[:1, :2]).mean().backward()
    assert net.conv_first.weight.grad is not None


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 3, 16, 16), "at least"),
        ((1, 3, 3, 44, 48), "multiples of 8"),
        ((1, 1, 3, 48, 48), "at least 2"),
        ((1, 3, 4, 48, 48), "4 channels"),
        ((3, 3, 48, 48), "frames, channels"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused_before_any_work(shape: tuple[int, ...], words: str) -> None:
    net = VRT(**{**SMALL, **CONFIGS["two neighbours"][0]})
    with pytest.raises(DataError, match=words):
        net(torch.zeros(shape))


def test_frame_interpolation_names_the_frame_count_it_needs() -> None:
    net = VRT(**{**SMALL, **CONFIGS["frame interpolation"][0]})
    with pytest.raises(DataError, match=r"img_size\[0\] = 4"):
        net(torch.zeros(1, 3, 3, 40, 40))


def test_every_contradiction_in_the_architecture_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        VRT(**{**SMALL, "embed_dims": [12] * 6 + [16] + [18] * 2, "pa_frames": 3, "recal_all_flows": True})
    text = str(caught.value)
    for words in ("embed_dims[6] is 16", "pa_frames is 3", "recal_all_flows"):
        assert words in text


@pytest.mark.parametrize("stacked", [1, 2, 3])
def test_deformable_convolution_samples_as_defined(stacked: int) -> None:
    torch.manual_seed(0)
    n, dim, groups, h, w = 2, 6, 3 * stacked, 5, 7
    x = torch.randn(n, dim * stacked, h, w, dtype=torch.float64, requires_grad=True)
    offset = (3 * torch.randn(n, 18 * groups, h, w, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(n, 9 * groups, h, w, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(dim, dim, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(dim, dtype=torch.float64)
    out = sampled_deform_conv2d(x, offset, weight, bias, mask)

    def pixel(b: int, c: int, y: int, z: int) -> float:
        return x[b, c, y, z].item() if 0 <= y < h and 0 <= z < w else 0.0

    for b, o, i, j in [(0, 0, 0, 0), (1, dim - 1, 2, 3), (0, 3, 4, 6), (1, 2, 1, 0)]:
        conv_group, total = o // (dim // stacked), bias[o].item()
        for c in range(dim):
            channel = conv_group * dim + c
            group = channel // (dim * stacked // groups)
            for tap in range(9):
                at = group * 9 + tap
                y = i + tap // 3 - 1 + offset[b, 2 * at, i, j].item()
                z = j + tap % 3 - 1 + offset[b, 2 * at + 1, i, j].item()
                y0, z0 = int(y // 1), int(z // 1)
                fy, fz = y - y0, z - z0
                value = (
                    (1 - fy) * (1 - fz) * pixel(b, channel, y0, z0)
                    + (1 - fy) * fz * pixel(b, channel, y0, z0 + 1)
                    + fy * (1 - fz) * pixel(b, channel, y0 + 1, z0)
                    + fy * fz * pixel(b, channel, y0 + 1, z0 + 1)
                )
                total += weight[o, c, tap // 3, tap % 3].item() * mask[b, at, i, j].item() * value
        assert out[b, o, i, j].item() == pytest.approx(total, abs=1e-10)
    assert torch.autograd.gradcheck(
        lambda *args: sampled_deform_conv2d(args[0], args[1], args[2], bias, args[3])[:1, :, ::2, ::3],
        (x, offset, weight, mask),
        fast_mode=True,
    )
