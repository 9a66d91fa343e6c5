"""Messages between the launching process, the engine and the forkserver.

A message is one picklable object and a few file descriptors, over a connected Unix stream socket. Both ends are
processes of one user on one machine that inherited the socket: nothing listens, and nothing else can connect.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

_HEADER = struct.Struct("!I")
_MAX_FDS = 8


def send(channel: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """Send one message; the descriptors in ``fds`` are duplicated into the receiving process."""
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    header = _HEADER.pack(len(payload))
    if fds:
        socket.send_fds(channel, [header], list(fds))
    else:
        channel.sendall(header)
    channel.sendall(payload)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Receive one message and its descriptors.

    Raises:
        EOFError: The other end is gone.
    """
    header, fds, _, _ = socket.recv_fds(channel, _HEADER.size, _MAX_FDS)
    header += _read_exactly(channel, _HEADER.size - len(header), started=bool(header))
    payload = _read_exactly(channel, _HEADER.unpack(header)[0], started=True)
    return pickle.loads(payload), fds


def _read_exactly(channel: socket.socket, num_bytes: int, started: bool) -> bytes:
    chunks: list[bytes] = []
    if not started:
        raise EOFError("the other end closed the connection")
    while num_bytes:
        chunk = channel.recv(num_bytes)
        if not chunk:
            raise EOFError("the other end closed the connection in the middle of a message")
        chunks.append(chunk)
        num_bytes -= len(chunk)
    return b"".join(chunks)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that were received."""
    for fd in fds:
        os.close(fd)
