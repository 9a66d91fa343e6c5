"""Cutting a clip into (shifted) 3-D windows, and which tokens of a window may see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]
BLOCKED = -100.0  # what the published network adds to a forbidden score; not -inf, so a row is never empty


def fit_window(size: Triple, window: Triple, shift: Triple) -> tuple[Triple, Triple]:
    """Shrink the window to the clip where the clip is smaller; there is nothing to shift along such an axis."""
    fitted = tuple(min(s, w) for s, w in zip(size, window, strict=True))
    moved = tuple(0 if s <= w else m for s, w, m in zip(size, window, shift, strict=True))
    return fitted, moved  # type: ignore[return-value]


@dataclass(frozen=True)
class WindowGrid:
    """How a clip of ``size`` (D, H, W) is padded, rolled and cut into windows.

    Attributes:
        size: Frames, height and width of the clip.
        window: The window after it was fitted to the clip.
        shift: The cyclic shift before cutting; zeros for an unshifted block.
    """

    size: Triple
    window: Triple
    shift: Triple

    @classmethod
    def of(cls, size: Triple, window: Triple, shift: Triple) -> WindowGrid:
        """Return the grid of a clip of ``size`` for the configured ``window`` and ``shift``."""
        return cls(size, *fit_window(size, window, shift))

    @property
    def counts(self) -> Triple:
        """Number of windows along D, H and W."""
        d, h, w = (-(-s // w) for s, w in zip(self.size, self.window, strict=True))
        return d, h, w

    @property
    def volume(self) -> int:
        """Tokens in one window."""
        return self.window[0] * self.window[1] * self.window[2]

    def partition(self, x: Tensor) -> Tensor:
        """Cut ``x`` (B, D, H, W, C) into windows (B, nD, nH, nW, tokens, C), zero-padded at the far ends."""
        pads = [n * w - s for n, w, s in zip(self.counts, self.window, self.size, strict=True)]
        if any(pads):
            x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
        if any(self.shift):
            x = torch.roll(x, tuple(-s for s in self.shift), dims=(1, 2, 3))
        (nd, nh, nw), (wd, wh, ww) = self.counts, self.window
        x = x.view(x.shape[0], nd, wd, nh, wh, nw, ww, x.shape[-1])
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(x.shape[0], nd, nh, nw, self.volume, x.shape[-1])

    def merge(self, windows: Tensor) -> Tensor:
        """Undo :meth:`partition`: windows (B, nD, nH, nW, tokens, C) back to (B, D, H, W, C)."""
        (nd, nh, nw), (wd, wh, ww) = self.counts, self.window
        batch, channels = windows.shape[0], windows.shape[-1]
        x = windows.view(batch, nd, nh, nw, wd, wh, ww, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(batch, nd * wd, nh * wh, nw * ww, channels)
        if any(self.shift):
            x = torch.roll(x, self.shift, dims=(1, 2, 3))
        d, h, w = self.size
        return x[:, :d, :h, :w]

    def regions(
        self, *, spatial: bool, device: torch.device
    ) -> Iterator[tuple[tuple[slice, slice, slice], Tensor | None]]:
        """Yield groups of windows that share one mask: a slice along each axis of windows, and the mask or None.

        After the cyclic shift only the last window along a shifted axis holds tokens from both ends of the clip, so
        a clip of any size has at most eight different masks. Computing attention group by group keeps the mask a
        single (tokens, tokens) table instead of one per window.

        Args:
            spatial: Mutual attention looks from one frame into another; as published it uses the mask of the window's
                first frame with itself, so that the shift in time masks nothing.
            device: Where the masks are wanted.
        """
        tokens = self.volume // 2 if spatial else self.volume
        axes: list[tuple[tuple[slice, bool], ...]] = []
        for axis, (count, shift) in enumerate(zip(self.counts, self.shift, strict=True)):
            if shift == 0 or (spatial and axis == 0):
                axes.append(((slice(None), False),))
            elif count == 1:
                axes.append(((slice(0, 1), True),))
            else:
                axes.append(((slice(0, count - 1), False), (slice(count - 1, count), True)))
        for (d, last_d), (h, last_h), (w, last_w) in product(*axes):
            torn = (last_d, last_h, last_w)
            mask = _mask(self.window, self.shift, torn, device)[:tokens, :tokens] if any(torn) else None
            yield (d, h, w), mask


@lru_cache(maxsize=256)
def _mask(window: Triple, shift: Triple, torn: tuple[bool, bool, bool], device: torch.device) -> Tensor:
    """Additive (tokens, tokens) mask of a window that the cyclic shift tore apart along the axes in ``torn``."""
    with torch.inference_mode(False):  # a mask that is kept must serve training too
        label = torch.zeros(window, dtype=torch.long)
        for axis in range(3):
            if torn[axis]:
                far = torch.arange(window[axis]) >= window[axis] - shift[axis]
                label = label * 2 + far.long().view([-1 if a == axis else 1 for a in range(3)])
        flat = label.flatten()
        return torch.where(flat[:, None] == flat[None, :], 0.0, BLOCKED).to(device)
