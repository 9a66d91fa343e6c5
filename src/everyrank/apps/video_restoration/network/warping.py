"""Moving frames and features along optical flow, and composing flows over several frames.

A flow (N, 2, H, W) holds, in pixels, (dx, dy): where the value of each target pixel is found in the source.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _positions(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Return the x and y coordinates (N, H, W), in pixels, that ``flow`` points at."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype)
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).unsqueeze(1)
    return flow[:, 0] + x, flow[:, 1] + y


def normalise(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Stack pixel coordinates into the (..., 2) grid in [-1, 1] that ``grid_sample(align_corners=True)`` takes."""
    return torch.stack((2.0 * x / max(width - 1, 1) - 1.0, 2.0 * y / max(height - 1, 1) - 1.0), dim=-1)


def flow_warp(x: Tensor, flow: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Sample ``x`` (N, C, H, W) bilinearly at the positions that ``flow`` (N, 2, H, W) points at."""
    return sample(x, normalise(*_positions(precise(flow)), *x.shape[-2:]), padding_mode)


def precise(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least: half precision cannot count the pixels of a frame."""
    return x if x.dtype == torch.float64 else x.float()


def sample(x: Tensor, grid: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Sample ``x`` (N, C, H, W) bilinearly at ``grid`` (N, h, w, 2), the positions in their own precision."""
    sampled = F.grid_sample(x.to(grid.dtype), grid, mode="bilinear", padding_mode=padding_mode, align_corners=True)
    return sampled.to(x.dtype)


def nearest_four(x: Tensor, flow: Tensor) -> Tensor:
    """Return the four pixels around each position ``flow`` points at: (N, 4 C, H, W), zero outside the frame.

    The order is (floor x, floor y), (floor x, ceil y), (ceil x, floor y), (ceil x, ceil y). Keeping the four whole
    pixels instead of their mean leaves the choice, and the detail, to the network. No gradient reaches the flow.
    """
    n, c, height, width = x.shape
    px, py = _positions(precise(flow.detach()))
    flat = x.flatten(2)
    corners = ((px.floor(), py.floor()), (px.floor(), py.ceil()), (px.ceil(), py.floor()), (px.ceil(), py.ceil()))
    parts = []
    for cx, cy in corners:
        inside = (cx >= 0) & (cx <= width - 1) & (cy >= 0) & (cy <= height - 1)
        index = (cy.clamp(0, height - 1) * width + cx.clamp(0, width - 1)).long()
        picked = flat.gather(2, index.view(n, 1, -1).expand(-1, c, -1))
        parts.append(picked * inside.view(n, 1, -1).to(x.dtype))
    return torch.cat(parts, 1).view(n, 4 * c, height, width)


def align_images(x: Tensor, backward: Tensor, forward: Tensor) -> tuple[Tensor, Tensor]:
    """Bring each frame's neighbours onto it, as four nearest pixels.

    Args:
        x: Frames (B, D, C, H, W).
        backward: Flows (B, D-1, 2, H, W) from frame t to t+1.
        forward: Flows (B, D-1, 2, H, W) from frame t+1 to t.

    Returns:
        The next frame brought onto each frame (zeros for the last) and the previous one (zeros for the first), each
        (B, D, 4 C, H, W).
    """
    b, d, c, h, w = x.shape
    sources = torch.cat((x[:, 1:], x[:, :-1])).reshape(-1, c, h, w)
    warped = nearest_four(sources, torch.cat((backward, forward)).reshape(-1, 2, h, w))
    following, preceding = warped.view(2, b, d - 1, 4 * c, h, w)
    edge = x.new_zeros(b, 1, 4 * c, h, w)
    return torch.cat((following, edge), 1), torch.cat((edge, preceding), 1)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Chain flows (B, T, 2, H, W): ``first`` leads from a to b, ``second`` from b to c; the result from a to c."""
    moved = flow_warp(second.flatten(0, 1), first.flatten(0, 1)).view_as(second)
    return first + moved


def chain_flows(backward: list[Tensor], forward: list[Tensor], reach: int) -> tuple[list[list[Tensor]], ...]:
    """Extend adjacent flows to frames up to ``reach`` away.

    Args:
        backward: Per scale, flows (B, D-1, 2, h, w) from frame t to t+1.
        forward: Per scale, flows (B, D-1, 2, h, w) from frame t+1 to t.
        reach: 1, 2 or 3 frames.

    Returns:
        For backward and forward: per scale, a list of ``reach`` flows; the k-th is (B, D-k, 2, h, w).
    """
    far_backward, far_forward = [], []
    for scale_backward, scale_forward in zip(backward, forward, strict=True):
        chain_b, chain_f = [scale_backward], [scale_forward]
        for step in range(1, reach):
            # t -> t+step, then t+step -> t+step+1
            chain_b.append(compose(chain_b[-1][:, :-1], scale_backward[:, step:]))
            # t+step+1 -> t+1, then t+1 -> t
            chain_f.append(compose(chain_f[-1][:, 1:], scale_forward[:, : scale_forward.shape[1] - step]))
        far_backward.append(chain_b)
        far_forward.append(chain_f)
    return far_backward, far_forward
