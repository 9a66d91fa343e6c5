"""write a checkpoint's weights as a single .safetensors or .pth file"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everyrank.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Export the weights of a checkpoint, or of a run's newest whole one."""
    parser = argparse.ArgumentParser(prog="everyrank export", description=__doc__)
    parser.add_argument("source", help="a checkpoint's folder, or a run's (its newest whole checkpoint)")
    parser.add_argument("out", help="the file to write: NAME.safetensors or NAME.pth")
    parser.add_argument("--group", default="model", help="which tensors: model (default), ema, ...")
    parser.add_argument(
        "--allow-non-finite", action="store_true", help="also write tensors that hold NaN or infinity, such as masks"
    )
    arguments = parser.parse_args(argv)

    from everyrank.checkpoint.export import export

    allowed = arguments.allow_non_finite
    print(f"wrote {export(arguments.source, arguments.out, group=arguments.group, allow_non_finite=allowed)}")
    return EXIT_OK
