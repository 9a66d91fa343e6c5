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

from conftest import nightly
from everyrank.apps.video_restoration import VRT
from everyrank.apps.video_restoration.network import chunked_attention, chunked_deform, deform
from everyrank.apps.video_restoration.network.attention import WindowAttention, chunked, fused
from everyrank.apps.video_restoration.network.deform import FlowGuidedDeformConv, sampled_deform_conv2d
from everyrank.apps.video_restoration.network.heads import NUM_FEATURES, FrameConv, Upsample, enlarge
from everyrank.apps.video_restoration.network.windows import Triple, WindowGrid
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


@pytest.mark.parametrize("name", [nightly("four neighbours"), "frame interpolation"])
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


def _gradients_agree(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """In float64: equal values, and equal gradients of one random weighting of them."""
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    weighting = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, leaves, weighting) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("windows_at_a_time", [1, 3, 1000])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 2)])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("size", [pytest.param(1, id="small scores"), pytest.param(8, id="large scores")])
def test_attention_in_chunks_is_that_of_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, size: float, frames: int, shift: Triple, windows_at_a_time: int
) -> None:
    torch.manual_seed(0)
    grid = WindowGrid.of((4, 12, 16), (2, 4, 4), shift)
    heads, tokens = 3, grid.volume // frames
    monkeypatch.setattr(chunked_attention, "CHUNK_NUMBERS", windows_at_a_time * frames * heads * tokens**2)
    qkv = (size * torch.randn(2, *grid.counts, grid.volume, 3, heads, 5, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(heads, tokens, tokens, dtype=torch.float64, requires_grad=True) if frames == 1 else None
    regions = list(grid.regions(spatial=bias is None, device=torch.device("cpu")))
    ours, theirs = (attend(qkv, bias, regions, 0.4, frames=frames) for attend in (chunked, fused))
    _gradients_agree(ours, theirs, [qkv] if bias is None else [qkv, bias])


def test_attention_of_half_precision_is_computed_in_full() -> None:
    torch.manual_seed(0)
    grid = WindowGrid.of((2, 8, 8), (2, 4, 4), (0, 2, 2))
    qkv = torch.randn(1, *grid.counts, grid.volume, 3, 2, 6).bfloat16()
    bias = torch.randn(2, grid.volume, grid.volume)
    regions = list(grid.regions(spatial=False, device=torch.device("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = chunked(qkv, bias, regions, 0.4, frames=1)
    assert half.dtype == torch.bfloat16
    full = chunked(qkv.float(), bias, regions, 0.4, frames=1)
    torch.testing.assert_close(half, full.bfloat16(), atol=0, rtol=0)


def test_the_network_trains_under_autocast_also_where_the_backward_pass_is_inside() -> None:
    # bfloat16 is slow where the processor has no instructions for it: two frames, and not enlarged.
    net = VRT(**{**SMALL, "upscale": 1, "pa_frames": 2, "deformable_groups": 4}).eval()
    fill.fill(net)
    clip = fill.clip("two neighbours", (1, 2, 3, 40, 48))
    weight = net.stage1.linear1.weight
    exact = torch.autograd.grad(net(clip).square().mean(), weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.autograd.grad(net(clip).float().square().mean(), weight)[0]
    assert ((half - exact).norm() / exact.norm()).item() < 0.1


def test_attention_compiles_around_what_goes_in_chunks() -> None:
    grid = WindowGrid.of((2, 4, 4), (2, 4, 4), (0, 0, 0))
    attention = WindowAttention(6, (2, 4, 4), 2, mutual=False)
    x = torch.randn(1, *grid.counts, grid.volume, 6, requires_grad=True)
    whole = torch.compile(lambda x: attention(x, grid), backend="eager")
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (whole, lambda x: attention(x, grid)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("neighbours", [1, 2, 3])
@pytest.mark.parametrize("frames_at_a_time", [1, 2, 100])
def test_alignment_in_chunks_is_that_of_whole_layers(
    monkeypatch: pytest.MonkeyPatch, neighbours: int, frames_at_a_time: int
) -> None:
    torch.manual_seed(0)
    n, dim, h, w = 5, 6, 7, 9
    monkeypatch.setattr(chunked_deform, "CHUNK_NUMBERS", frames_at_a_time * neighbours * dim * 9 * h * w)
    monkeypatch.setattr(deform, "has_torchvision", lambda: False)
    layer = FlowGuidedDeformConv(dim, num_neighbours=neighbours, deformable_groups=6, max_residue=2.5).double()
    for parameter in layer.conv_offset[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sources, warped = (torch.randn(n, neighbours * dim, h, w, dtype=torch.float64, requires_grad=True) for _ in "ab")
    current = torch.randn(n, dim, h, w, dtype=torch.float64, requires_grad=True)
    flows = [(2 * torch.randn(n, 2, h, w, dtype=torch.float64)).requires_grad_() for _ in range(neighbours)]
    ours = layer(sources, warped, current, flows)
    monkeypatch.setattr(deform, "has_torchvision", lambda: True)  # whose layer is replaced by ours
    monkeypatch.setattr(deform, "deform_conv2d", sampled_deform_conv2d)
    theirs = layer(sources, warped, current, flows)
    _gradients_agree(ours, theirs, [sources, warped, current, *flows, *layer.parameters()])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_enlarging_head_is_its_layers_one_after_the_other(scale: int) -> None:
    torch.manual_seed(0)
    before, last = torch.nn.Sequential(FrameConv(5, NUM_FEATURES), torch.nn.LeakyReLU()), FrameConv(NUM_FEATURES, 3)
    upsample = Upsample(scale, NUM_FEATURES)
    for module in (before, upsample, last):
        module.double()
    x = torch.randn(2, 5, 8, 9, dtype=torch.float64, requires_grad=True)
    y = before(x)
    *convs, smooth = upsample.values()
    for conv, factor in zip(convs, upsample.factors, strict=True):
        y = torch.nn.functional.leaky_relu(torch.nn.functional.pixel_shuffle(conv(y), factor), 0.1)
    parameters = [*before.parameters(), *upsample.parameters(), *last.parameters()]
    _gradients_agree(enlarge(x, before, upsample, last), last(smooth(y)), [x, *parameters])
    with torch.no_grad():
        torch.testing.assert_close(enlarge(x, before, upsample, last), last(smooth(y)), atol=1e-12, rtol=1e-12)


def test_scores_too_large_for_plain_powers_of_two_are_shifted_first() -> None:
    """In float32, where 2 ** 128 is infinite: scores of several hundred."""
    torch.manual_seed(0)
    grid = WindowGrid.of((2, 8, 8), (2, 4, 4), (0, 0, 0))
    qkv = (20 * torch.randn(1, *grid.counts, grid.volume, 3, 2, 6)).requires_grad_()
    regions = list(grid.regions(spatial=False, device=torch.device("cpu")))
    bias = torch.zeros(2, grid.volume, grid.volume)
    ours = chunked(qkv, bias, regions, 0.4, frames=1)
    exact = fused(qkv.double(), bias.double(), regions, 0.4, frames=1)
    torch.testing.assert_close(ours.double(), exact, atol=1e-3, rtol=1e-3)
    assert torch.autograd.grad(ours.square().sum(), qkv)[0].isfinite().all()
