"""VRT, a video restoration transformer (Liang et al., arXiv 2201.12288)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everyrank.apps.video_restoration.network.checks import NUM_STAGES, check_clip, complete_architecture
from everyrank.apps.video_restoration.network.heads import NUM_FEATURES, FrameConv, Upsample, enlarge, fuse
from everyrank.apps.video_restoration.network.spynet import SpyNet
from everyrank.apps.video_restoration.network.stages import ReconstructionGroup, Stage
from everyrank.apps.video_restoration.network.warping import align_images, chain_flows
from everyrank.apps.video_restoration.network.windows import Triple

SCALES = (1, 2, 4, 8, 4, 2, 1)  # each stage's frames are smaller by this
RESHAPES = ("none", "down", "down", "down", "up", "up", "up")
DIFFERENCE_GAIN = 5.0  # of the first convolution at the start of training
MAX_RESIDUE = 10  # pixels of the full frame that an offset may leave the flow by


class VRT(nn.Module):
    """Restore all frames of a clip together; names and shapes of the parameters are those of published weights.

    Args:
        architecture: The keys of a ``netG`` section, with the defaults of ``NetworkOptions``; ``upscale`` is 4 if it is
            left out: 4 (also 2, 3, 8) for super-resolution, 1 for deblurring, denoising and frame interpolation.

    Raises:
        ConfigError: The keys contradict each other; all contradictions are listed.
    """

    stage1: Stage
    stage2: Stage
    stage3: Stage
    stage4: Stage
    stage5: Stage
    stage6: Stage
    stage7: Stage

    def __init__(self, **architecture: Any) -> None:
        super().__init__()
        keys = complete_architecture(architecture)
        dims, frames, upscale = keys["embed_dims"], keys["img_size"][0], keys["upscale"]
        self.upscale, self.in_chans, self.pa_frames = upscale, keys["in_chans"], keys["pa_frames"]
        self.nonblind_denoising = keys["nonblind_denoising"]
        self.window: Triple = tuple(keys["window_size"])
        self.num_in_frames = frames
        # A frame and 2 x 4 aligned neighbours.
        first = self.in_chans * (9 if self.pa_frames else 1) + int(self.nonblind_denoising)
        self.conv_first = FrameConv(first, dims[0])
        if self.pa_frames:
            self.spynet = SpyNet()
        self._add_stages(keys)
        self.norm = nn.LayerNorm(dims[-1])
        self.conv_after_body = nn.Linear(dims[-1], dims[0])
        if not self.pa_frames:
            self.linear_fuse = nn.Conv2d(dims[0] * frames, NUM_FEATURES, 1)
            self.conv_last: Any = nn.Conv2d(NUM_FEATURES, keys["out_chans"], 7)
        elif upscale == 1:
            self.conv_last = FrameConv(dims[0], keys["out_chans"])
        else:
            self.conv_before_upsample = nn.Sequential(FrameConv(dims[0], NUM_FEATURES), nn.LeakyReLU())
            self.upsample = Upsample(upscale, NUM_FEATURES)
            self.conv_last = FrameConv(NUM_FEATURES, keys["out_chans"])
        self._initialise()
        if keys["spynet_path"] and self.pa_frames:
            from everyrank.apps.video_restoration.weights import load_weights

            load_weights(self.spynet, keys["spynet_path"], strict=False)

    def _add_stages(self, keys: dict[str, Any]) -> None:
        depths, dims, heads = keys["depths"], keys["embed_dims"], keys["num_heads"]
        ends = list(itertools.accumulate(depths))
        rates = [keys["drop_path_rate"] * block / max(ends[-1] - 1, 1) for block in range(ends[-1])]

        def common(i: int) -> dict[str, Any]:
            return {
                "mlp_ratio": keys["mlp_ratio"],
                "qkv_bias": keys["qkv_bias"],
                "qk_scale": keys["qk_scale"],
                "drop_path": rates[ends[i] - depths[i] : ends[i]],
                "checkpoint_attn": keys["use_checkpoint_attn"] and i not in keys["no_checkpoint_attn_blocks"],
                "checkpoint_ffn": keys["use_checkpoint_ffn"] and i not in keys["no_checkpoint_ffn_blocks"],
            }

        for i in range(NUM_STAGES):
            stage = Stage(
                dims[max(i - 1, 0)],
                dims[i],
                depths[i],
                self.window,
                heads[i],
                reshape=RESHAPES[i],
                mul_attn_ratio=keys["mul_attn_ratio"],
                pa_frames=self.pa_frames,
                deformable_groups=keys["deformable_groups"],
                max_residue=MAX_RESIDUE / SCALES[i],
                **common(i),
            )
            self.add_module(f"stage{i + 1}", stage)
        widen = nn.Sequential(
            nn.Identity(), nn.LayerNorm(dims[NUM_STAGES - 1]), nn.Linear(dims[NUM_STAGES - 1], dims[NUM_STAGES])
        )
        self.stage8 = nn.ModuleList([widen])
        for i in range(NUM_STAGES, len(depths)):
            window = (1, *self.window[1:]) if i in keys["indep_reconsts"] else self.window
            self.stage8.append(ReconstructionGroup(dims[i], depths[i], window, heads[i], **common(i)))

    def _initialise(self) -> None:
        """Draw weights so that the first steps already reach the pixels.

        Linear layers are as in the paper. The convolutions from frames and back to them keep the size of what passes
        (He et al., arXiv 1502.01852); PyTorch's default shrinks it in each of the head's layers, and a short training
        would end before the head has woken up.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, FrameConv):
                nn.init.kaiming_normal_(module.weight, a=0.1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            # Brightness passes by the network anyway. What it must learn from are differences, a tenth as large.
            first = self.conv_first.weight
            first.sub_(first.mean(dim=(-2, -1), keepdim=True)).mul_(DIFFERENCE_GAIN)
            if isinstance(self.conv_last, FrameConv):
                self.conv_last.weight.zero_()  # the run starts at the enlarged input, not at noise that hides it

    def forward(self, x: Tensor) -> Tensor:
        """Restore a clip.

        Args:
            x: (B, D, C, H, W) in [0, 1]; H and W multiples of 8.

        Returns:
            (B, D, out_chans, upscale * H, upscale * W), or (B, 1, out_chans, H, W) for frame interpolation.

        Raises:
            DataError: The clip is too small, or has the wrong number of frames or channels.
        """
        check_clip(
            x,
            channels=self.in_chans + int(self.nonblind_denoising),
            window=self.window,
            pa_frames=self.pa_frames,
            num_in_frames=self.num_in_frames,
        )
        return self._restore(x) if self.pa_frames else self._interpolate(x)

    def _restore(self, x: Tensor) -> Tensor:
        frames = x[:, :, : self.in_chans]
        batch, num_frames = frames.shape[:2]
        backward, forward = self._flows(frames)
        following, preceding = align_images(frames, backward[0][0], forward[0][0])
        stacked = torch.cat((frames, following, preceding, x[:, :, self.in_chans :]), dim=2)
        features = self._body(self.conv_first(stacked.flatten(0, 1)), num_frames, backward, forward)
        if self.upscale == 1:
            return self.conv_last(features).unflatten(0, (batch, num_frames)) + frames
        large = enlarge(features, self.conv_before_upsample, self.upsample, self.conv_last)
        flat = frames.flatten(0, 1)
        base = F.interpolate(flat, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        return (large + base).unflatten(0, (batch, num_frames))

    def _interpolate(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 3, 4), keepdim=True)
        features = self._body(self.conv_first((x - mean).flatten(0, 1)), x.shape[1])
        frame = fuse(features.unflatten(0, x.shape[:2]), self.linear_fuse, self.conv_last)
        return frame.unsqueeze(1) + mean

    def _flows(self, frames: Tensor) -> tuple[list[list[Tensor]], ...]:
        """Flows at four scales, backward (t to t+k) and forward (t+k to t), for k = 1 .. pa_frames / 2."""
        batch, num_frames = frames.shape[:2]
        number = torch.arange(batch * num_frames, device=frames.device).view(batch, num_frames)
        here, there = number[:, :-1].flatten(), number[:, 1:].flatten()
        flat = frames.flatten(0, 1)
        pairs = torch.stack((torch.cat((here, there)), torch.cat((there, here))))
        flows = [flow.unflatten(0, (2, batch, num_frames - 1)) for flow in self.spynet(flat, pairs)]
        return chain_flows([flow[0] for flow in flows], [flow[1] for flow in flows], self.pa_frames // 2)

    def _body(
        self,
        x: Tensor,
        num_frames: int,
        backward: Sequence[Sequence[Tensor]] = ((), (), (), ()),
        forward: Sequence[Sequence[Tensor]] = ((), (), (), ()),
    ) -> Tensor:
        """Seven scales and the reconstruction stages, added to the input: frames (B * D, C, H, W) to the same."""
        first = x
        x = x.unflatten(0, (-1, num_frames)).permute(0, 1, 3, 4, 2)
        x1 = self.stage1(x, backward[0], forward[0])
        x2 = self.stage2(x1, backward[1], forward[1])
        x3 = self.stage3(x2, backward[2], forward[2])
        x4 = self.stage4(x3, backward[3], forward[3])
        x = self.stage5(x4, backward[2], forward[2])
        x = self.stage6(x + x3, backward[1], forward[1])
        x = self.stage7(x + x2, backward[0], forward[0]) + x1
        for stage in self.stage8:
            x = stage(x)
        x = self.conv_after_body(self.norm(x))
        return first + x.permute(0, 1, 4, 2, 3).flatten(0, 1)
