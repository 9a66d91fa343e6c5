"""Time and memory of VRT beside a straightforward implementation, and where the time goes.

::

    python benchmarks/vrt.py                                  # the two small configurations, forward and backward
    python benchmarks/vrt.py --configs deblurring --modes forward --profile
    python benchmarks/vrt.py --configs published --device cuda --precision bf16 --compile --only everyrank

The reference (``vrt_reference.py``) has explicit attention matrices and goes frame by frame. Each measurement runs in a
process of its own: peak memory is the highest resident set over that before the first call (the allocator's peak on
CUDA), time is the median of the calls after it (CPU time with one thread, so that what else runs does not count). The
contenders take turns, and the medians of their turns are compared. Both have the same weights and give the same output.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMALL = {"img_size": [6, 64, 64], "window_size": [6, 8, 8], "pa_frames": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "super_resolution": {
        **SMALL,
        "upscale": 4,
        "depths": [4] * 7 + [2] * 3,
        "indep_reconsts": [9],
        "embed_dims": [12] * 7 + [18] * 3,
        "num_heads": [3] * 10,
        "deformable_groups": 4,
    },
    "deblurring": {
        **SMALL,
        "upscale": 1,
        "depths": [4] * 7 + [2] * 2,
        "indep_reconsts": [8],
        "embed_dims": [12] * 9,
        "num_heads": [2] * 9,
        "deformable_groups": 6,
    },
    "published": {**SMALL, "upscale": 4, "deformable_groups": 12},
}
MODES = ("forward", "backward")
WHO = ("everyrank", "reference")


def contender(who: str, net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function that restores a clip."""
    if who == "everyrank":
        return net
    import vrt_reference

    return lambda clip: vrt_reference.forward(net, clip)


def measure(name: str, who: str, mode: str, args: argparse.Namespace) -> dict[str, float]:
    """Return median seconds, peak MiB and the output's mean of one contender, in this process."""
    from everyrank.apps.video_restoration import VRT

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    net = VRT(**CONFIGS[name], drop_path_rate=0.0).to(device)
    nn.init.normal_(net.conv_last.weight, std=0.01)  # zero at the start of training: no gradient would pass
    run = contender(who, net)
    if args.compile:
        run = torch.compile(run)
    clip = torch.rand(1, *CONFIGS[name]["img_size"][:1], 3, *CONFIGS[name]["img_size"][1:], device=device)

    def call() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            if mode == "forward":
                with torch.no_grad():
                    return float(run(clip).float().mean())
            out = run(clip)
        out.float().square().mean().backward()
        net.zero_grad(set_to_none=True)
        return float(out.detach().float().mean())

    with torch.no_grad():
        run(clip[:, :2])  # kernels and libraries are loaded; their memory is nobody's
    if args.compile:
        call()
    before = reset_peak(device)
    mean = call()
    peak = peak_mib(device) - before
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    seconds = []
    for _ in range(args.repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    result = {"seconds": statistics.median(seconds), "mib": peak, "mean": mean}
    if args.profile and who == "everyrank":
        result |= {f"part: {part}": share for part, share in profile(net, run, clip).items()}
    return result


def reset_peak(device: torch.device) -> float:
    """Forget the highest memory so far and return what is in use now, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_mib(device: torch.device) -> float:
    """Return the highest memory since :func:`reset_peak`, in MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def profile(net: nn.Module, run: Callable[[Tensor], Tensor], clip: Tensor) -> dict[str, float]:
    """Return the seconds of one forward pass by part; what is in no part is "rest"."""
    from everyrank.apps.video_restoration.network import vrt

    parts = {
        "flow": lambda n: n == "spynet",
        "mutual attention": lambda n: n.endswith("residual_group1"),
        "self attention": lambda n: n.endswith(("residual_group2", "residual_group")),
        "deformable convolution": lambda n: n.endswith("pa_deform"),
        "fusion": lambda n: n.endswith("pa_fuse"),
        "reshaping": lambda n: n.endswith("reshape"),
    }
    spent: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}
    hooks = []
    for name, module in net.named_modules():
        for part, belongs in parts.items():
            if belongs(name):

                def begin(*_: Any, key: str = name) -> None:
                    started[key] = time.perf_counter()

                def end(*_: Any, key: str = name, part: str = part) -> None:
                    spent[part] += time.perf_counter() - started[key]

                hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    enlarge = vrt.enlarge  # the head is no module of its own

    def timed(*tensors: Any) -> Tensor:
        began = time.perf_counter()
        out = enlarge(*tensors)
        spent["head"] += time.perf_counter() - began
        return out

    vrt.enlarge = timed
    start = time.perf_counter()
    with torch.no_grad():
        run(clip)
    total = time.perf_counter() - start
    vrt.enlarge = enlarge
    for hook in hooks:
        hook.remove()
    return {**spent, "rest": total - sum(spent.values())}


def in_own_process(name: str, who: str, mode: str) -> dict[str, float]:
    """Return :func:`measure` of one contender, made by a new process with the same command line."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, who, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what the command line asks for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=["super_resolution", "deblurring"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", choices=WHO, default=list(WHO))
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender has its turn")
    parser.add_argument("--repeats", type=int, default=3, help="calls timed in one turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also seconds by part of the forward pass")
    parser.add_argument("--output", type=Path, help="file for the numbers as JSON")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # config, contender, mode: measured in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args)))
        return
    results: dict[str, dict[str, float]] = {}
    for name in args.configs:
        for mode in args.modes:
            turns: dict[str, list[dict[str, float]]] = {who: [] for who in args.only}
            for _ in range(args.rounds):
                for who in args.only:
                    turns[who].append(in_own_process(name, who, mode))
            for who, found_each in turns.items():
                found = {key: statistics.median(each[key] for each in found_each) for key in found_each[0]}
                results[f"{name} {mode} {who}"] = found
                print(f"{name:<17} {mode:<9} {who:<10} {found['seconds']:8.3f} s  {found['mib']:8.1f} MiB", flush=True)
                for part in sorted((k for k in found if k.startswith("part")), key=lambda k: -found[k]):
                    print(f"    {part.removeprefix('part: '):<24} {found[part]:8.3f} s")
            ours, theirs = (results.get(f"{name} {mode} {who}") for who in WHO)
            if ours and theirs:
                assert abs(ours["mean"] - theirs["mean"]) < 1e-4, "the contenders disagree"
                time_ratio, memory_ratio = ours["seconds"] / theirs["seconds"], ours["mib"] / theirs["mib"]
                print(f"{name:<17} {mode:<9} ratio      {time_ratio:8.2f}    {memory_ratio:8.2f}", flush=True)
    if args.output:
        about = {
            "torch": torch.__version__,
            "threads": args.threads,
            "device": args.device,
            "precision": args.precision,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
