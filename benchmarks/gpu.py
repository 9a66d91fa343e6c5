"""What training costs on a GPU: VRT, GPT-2, a checkpoint, joining. Run it where there is one.

    python benchmarks/gpu.py                         # all of it; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --parts vrt gpt2
    python -m everyrank.rehearsal -- python benchmarks/gpu.py --tiny --json /tmp/gpu.json   # does it run at all?

- ``vrt``: VRT of 30.68 M parameters on REDS shapes (a clip of 6 frames of 64 x 64, four times enlarged), forward and
  backward, in float32 and bfloat16, compiled too: frames per second and peak memory, beside ``vrt_reference.py``.
- ``gpt2``: GPT-2 of 124 M parameters by TrainerDDP beside a loop written by hand (``gpt2.py``), turns alternating, and
  the model FLOPs utilisation of both.
- ``checkpoint``: how long a GPU's training stands still for the checkpoint of a 2 GB state, beside ``torch.save``.
- ``join``: joining a group of a rank for each GPU, with its first all_reduce.

With ``--tiny`` the sizes are those of a rehearsal, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt2
import torch
import vrt

import checkpoint
import everyrank
from everyrank.training.hardware.flops import peak_flops

RESULT = Path(__file__).parent / "results" / "gpu.json"
DEVICE = torch.device("cuda", 0)
VRT_WAYS = (
    ("everyrank", "fp32", False),
    ("everyrank", "fp32", True),
    ("everyrank", "bf16", False),
    ("everyrank", "bf16", True),
    ("reference", "fp32", False),
    ("reference", "bf16", False),
)


def measure_vrt(tiny: bool, rounds: int) -> dict[str, Any]:
    """Return frames per second and peak MiB of each way, and everyrank's as ratios to the reference's."""
    name = "published"
    if tiny:
        name = "tiny"
        depths = {"depths": [1] * 9, "indep_reconsts": [8]}
        vrt.CONFIGS[name] = {**vrt.CONFIGS["deblurring"], **depths, "img_size": [4, 40, 40], "window_size": [2, 2, 2]}
    found: dict[str, Any] = {}
    # In bfloat16 a CPU's convolutions take minutes.
    for who, precision, compiled in (way for way in VRT_WAYS if not tiny or way[1] == "fp32"):
        given = {
            "precision": precision,
            "compile": compiled,
            "threads": 1 if tiny else torch.get_num_threads(),
            "profile": False,
        }
        args = argparse.Namespace(**given, device=str(DEVICE), repeats=1 if tiny else 3 * rounds)
        one = vrt.measure(name, who, "backward", args)
        num_frames = vrt.CONFIGS[name]["img_size"][0]
        key = " ".join([who, precision, *(["compiled"] if compiled else [])])
        found[key] = {"frames_per_s": num_frames / one["seconds"], "peak_mib": one["mib"]}
        torch.cuda.empty_cache()
    for precision in ("fp32",) if tiny else ("fp32", "bf16"):
        ours, theirs = found[f"everyrank {precision}"], found[f"reference {precision}"]
        ours["speed_ratio"] = ours["frames_per_s"] / theirs["frames_per_s"]
        ours["memory_ratio"] = ours["peak_mib"] / max(theirs["peak_mib"], 1e-9)
    return found


def measure_gpt2(tiny: bool, rounds: int) -> dict[str, Any]:
    """Return tokens per second of both loops, not compiled and compiled, and MFU where the device is known."""
    size = gpt2.TINY if tiny else gpt2.Size()
    peak = peak_flops(torch.cuda.get_device_name(DEVICE), "half")
    found = {}
    for compiled in (False, True):
        folder = Path(tempfile.mkdtemp(prefix="everyrank-benchmark-"))
        try:
            one = gpt2.measure(size, DEVICE, rounds, compiled, folder)
        finally:
            shutil.rmtree(folder)
        for name in ("by_hand", "TrainerDDP"):
            if peak is not None:
                flops = gpt2.flops_per_token(size, int(one["parameters"]))
                one[f"{name}_mfu"] = one[f"{name}_tokens_per_s"] * flops / peak
        found["compiled" if compiled else "eager"] = one
    return found


def measure_checkpoint(tiny: bool, rounds: int) -> dict[str, Any]:
    """Return for each way to save the seconds that the GPU's work stood still: medians, and the first save."""
    with DEVICE:
        model, optimizer = checkpoint.build(20 if tiny else 2000)
    found: dict[str, Any] = {}
    for name in ("torch.save", "everyrank"):
        folder = Path(tempfile.mkdtemp(prefix="everyrank-benchmark-"))
        try:
            save, finish = checkpoint.CONTENDERS[name](model, optimizer, folder)
            seconds = []
            for step in range(1, rounds + 2):
                torch.cuda.synchronize()
                began = time.perf_counter()
                save(step)
                torch.cuda.synchronize()  # what the next optimizer step would wait for
                seconds.append(time.perf_counter() - began)
                finish(step)
        finally:
            shutil.rmtree(folder)
        found[name] = {"median_s": statistics.median(seconds[1:]), "first_s": seconds[0]}
    found["ratio"] = found["everyrank"]["median_s"] / found["torch.save"]["median_s"]
    return found


def join_and_reduce() -> tuple[float, float]:
    """Join, and add up one number: seconds of both."""
    began = time.perf_counter()
    with everyrank.join() as world:
        joined = time.perf_counter()
        total = everyrank.reduce_sum(torch.ones(1, device=world.device))
        assert int(total) == world.world_size
        return joined - began, time.perf_counter() - joined


def measure_join(tiny: bool, rounds: int) -> dict[str, Any]:
    """Return the slowest rank's seconds, medians over the rounds."""
    num_ranks = torch.cuda.device_count()
    turns = [everyrank.launch(join_and_reduce, nproc_per_node=num_ranks) for _ in range(rounds)]
    slowest = [[max(rank[part] for rank in turn) for turn in turns] for part in (0, 1)]
    return {
        "ranks": num_ranks,
        "join_s": statistics.median(slowest[0]),
        "first_all_reduce_s": statistics.median(slowest[1]),
    }


PARTS: dict[str, Callable[[bool, int], dict[str, Any]]] = {
    "join": measure_join,
    "checkpoint": measure_checkpoint,
    "gpt2": measure_gpt2,
    "vrt": measure_vrt,
}


def main() -> None:
    """Measure what the command line asks for, print it and write it down after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--json", type=Path, help=f"where to write the figures (default: {RESULT.name} in results/)")
    args = parser.parse_args()
    if args.json is None and args.tiny:
        parser.error("--tiny gives no figures to keep. Fix: name a file with --json.")
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here. Fix: run it on one, or rehearse: python -m everyrank.rehearsal -- python ...")
    where = {"device": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__, "cuda": torch.version.cuda}
    found: dict[str, Any] = {**where, "everyrank": everyrank.__version__, "tiny": args.tiny}
    for name in args.parts:
        found[name] = PARTS[name](args.tiny, 1 if args.tiny else args.rounds)
        print(name, json.dumps(found[name], indent=1), flush=True)
        (args.json or RESULT).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
