"""Start a program in ranks that mp.spawn made: ``as_rank.py PROGRAM ARGUMENT...``."""

import os
import runpy
import socket
import sys

import torch.multiprocessing as mp


def _rank(rank: int, port: int, arguments: list[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    mp.spawn(_rank, args=(free_port, sys.argv[1:]), nprocs=2)
