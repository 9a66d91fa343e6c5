"""Where frames come from: folders of images, lmdb, and video files. All give RGB, uint8 (H, W, 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from everyrank import DataError, did_you_mean
from everyrank.apps.video_restoration.data.images import decode_image
from everyrank.apps.video_restoration.extras import video_package

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".y4m", ".m4v")


class FrameSource(Protocol):
    """Clips of frames."""

    def clips(self) -> dict[str, int]:
        """Return the number of frames of each clip, by name, sorted."""
        ...

    def read(self, clip: str, frame: int) -> np.ndarray:
        """Return one frame by its place in the clip, RGB, uint8 (H, W, 3)."""
        ...


def open_source(root: str | Path, backend: str | None = None, only: Sequence[str] | None = None) -> FrameSource:
    """Return the source at ``root``.

    Args:
        root: A folder of clips (one folder of images each; a folder of images is one clip), an lmdb folder, a video
            file or a folder of video files.
        backend: "disk", "lmdb", "video", or None to find out by looking.
        only: Names of the clips that are wanted; spares the search for others in large folders.

    Raises:
        DataError: ``root`` is missing or holds nothing of the kind.
    """
    root = Path(root)
    if not root.exists():
        near = did_you_mean(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
        raise DataError(
            f"the data folder {root} does not exist.{near} Set dataroot_gt and dataroot_lq to what is there"
        )
    if backend is None:
        if root.suffix == ".lmdb" or (root / "data.mdb").exists():
            backend = "lmdb"
        elif root.is_file() or any(p.suffix.lower() in VIDEOS for p in root.iterdir()):
            backend = "video"
        else:
            backend = "disk"
    if backend == "lmdb":
        return LmdbSource(root)
    return VideoSource(root) if backend == "video" else FolderSource(root, only)


class FolderSource:
    """A folder for each clip (folders of folders have clips named ``a/b``), an image for each frame."""

    def __init__(self, root: Path, only: Sequence[str] | None = None) -> None:
        self.root = root
        self._frames: dict[str, list[str]] = {}
        wanted = [root / name for name in only] if only else [root, *sorted(p for p in root.rglob("*") if p.is_dir())]
        for folder in wanted:
            if not folder.is_dir():
                raise DataError(f"the data folder {root} has no clip {folder.relative_to(root)}, which a list names")
            names = sorted((p.name for p in folder.iterdir() if p.suffix.lower() in IMAGES), key=_natural)
            if names:
                name = folder.relative_to(root).as_posix()
                self._frames[folder.name if name == "." else name] = names
                if folder == root:
                    break
        if not self._frames:
            raise DataError(
                f"the data folder {root} has no images ({', '.join(IMAGES)}), also not in folders inside it"
            )

    def clips(self) -> dict[str, int]:
        """Return the number of images in each folder."""
        return {clip: len(names) for clip, names in self._frames.items()}

    def read(self, clip: str, frame: int) -> np.ndarray:
        """Read one image."""
        path = self.root / clip / self._frames[clip][frame]
        if not path.exists():
            path = self.root / self._frames[clip][frame]
        return decode_image(path.read_bytes(), str(path))


class LmdbSource:
    """An lmdb of encoded images under keys ``clip/00000012``, with the ``meta_info.txt`` that lists them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._environment: Any = None
        listing = root / "meta_info.txt"
        if not listing.exists():
            raise DataError(f"the lmdb {root} has no meta_info.txt: make it as BasicSR does, one line for each key")
        self._keys: dict[str, list[str]] = {}
        for line in listing.read_text().splitlines():
            if line.strip():
                key = line.split()[0].rsplit(".", 1)[0]
                self._keys.setdefault(key.rsplit("/", 1)[0], []).append(key)
        for keys in self._keys.values():
            keys.sort(key=_natural)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_environment": None}  # an open lmdb must not cross into a loader process

    def clips(self) -> dict[str, int]:
        """Return the number of keys of each clip."""
        return {clip: len(keys) for clip, keys in sorted(self._keys.items())}

    def read(self, clip: str, frame: int) -> np.ndarray:
        """Read and decode one value."""
        if self._environment is None:
            lmdb = video_package("lmdb")
            self._environment = lmdb.open(str(self.root), readonly=True, lock=False, readahead=False, meminit=False)
        key = self._keys[clip][frame]
        with self._environment.begin() as transaction:
            content = transaction.get(key.encode())
        if content is None:
            raise DataError(f"the lmdb {self.root} has no key {key!r}, which its meta_info.txt lists")
        return decode_image(content, f"{self.root}:{key}")


class VideoSource:
    """Video files, one clip each, decoded with PyAV; a frame is reached from the key frame before it."""

    def __init__(self, root: Path) -> None:
        paths = [root] if root.is_file() else sorted(p for p in root.iterdir() if p.suffix.lower() in VIDEOS)
        if not paths:
            raise DataError(f"the data folder {root} has no video files ({', '.join(VIDEOS)})")
        self._paths = {path.stem: path for path in paths}
        self._times: dict[str, list[int]] = {}
        self._open: tuple[str, Any, Any, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def _index(self, clip: str) -> list[int]:
        """Return the presentation times of a clip's frames, in order, without decoding."""
        if clip not in self._times:
            av = video_package("av")
            path = self._paths[clip]
            try:
                with av.open(str(path)) as container:
                    packets = container.demux(container.streams.video[0])
                    self._times[clip] = sorted(p.pts for p in packets if p.pts is not None)
            except (av.FFmpegError, IndexError) as error:
                raise DataError(f"the video {path} cannot be read ({error}): replace it or take it out") from error
        return self._times[clip]

    def clips(self) -> dict[str, int]:
        """Return the number of frames of each file."""
        return {clip: len(self._index(clip)) for clip in self._paths}

    def read(self, clip: str, frame: int) -> np.ndarray:
        """Decode up to one frame; going forward costs one frame each."""
        wanted = self._index(clip)[frame]
        if self._open is None or self._open[0] != clip or not self._open[3] < frame <= self._open[3] + 16:
            self._seek(clip, wanted)
        assert self._open is not None
        for decoded in self._open[2]:
            if decoded.pts is not None and decoded.pts >= wanted:
                self._open = (*self._open[:3], frame)
                return decoded.to_ndarray(format="rgb24")
        raise DataError(f"the video {self._paths[clip]} ends before frame {frame}, which its index has: it is damaged")

    def _seek(self, clip: str, time: int) -> None:
        if self._open is not None:
            self._open[1].close()
        container = video_package("av").open(str(self._paths[clip]))
        stream = container.streams.video[0]
        container.seek(time, stream=stream, backward=True)
        self._open = (clip, container, container.decode(stream), -1)


class CachedSource:
    """Keeps the frames that were read, as long as they take no more than ``max_bytes``."""

    def __init__(self, source: FrameSource, max_bytes: int = 2 << 30) -> None:
        self.source = source
        self.max_bytes = max_bytes
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._bytes = 0

    def clips(self) -> dict[str, int]:
        """Return the number of frames of each clip."""
        return self.source.clips()

    def read(self, clip: str, frame: int) -> np.ndarray:
        """Return a frame, from memory if it is there."""
        found = self._kept.get((clip, frame))
        if found is None:
            found = self.source.read(clip, frame)
            if self._bytes + found.nbytes <= self.max_bytes:
                self._kept[clip, frame] = found
                self._bytes += found.nbytes
        return found


@lru_cache(maxsize=65536)
def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key by which im2 comes before im10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
