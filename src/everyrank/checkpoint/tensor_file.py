"""Files of tensors in the safetensors format, written straight from host memory.

The library ``safetensors`` reads them, and may write them too; but its writer copies every tensor into a Python object
first and holds the interpreter's lock while it does, which would stall the training that goes on meanwhile. The format
is a length, a JSON header and the bytes (https://github.com/huggingface/safetensors#format), so they are laid out here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors
import torch

from everyrank.errors import CheckpointError

SUFFIX = ".safetensors"

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
_TYPES = {code: dtype for dtype, code in _TYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each tensor lies in a file.

    Attributes:
        header: The file's first bytes: the length and the JSON header.
        offsets: For each tensor's name, the offset of its first byte after the header.
        num_bytes: Number of bytes after the header.
    """

    header: bytes
    offsets: dict[str, int]
    num_bytes: int


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Plan the file of these tensors; widest types first, so that each tensor is aligned.

    Raises:
        CheckpointError: If a tensor's type or layout has no place in the format.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPE_NAMES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"The tensor {name!r} is {tensor.layout} with type {tensor.dtype}, which the safetensors format cannot "
                "hold. Save it converted, for example with .to_dense() or torch.view_as_real()."
            )
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        offsets[name] = begin
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Layout(header=struct.pack("<Q", len(text)) + text, offsets=offsets, num_bytes=end)


def write_one_by_one(path: Path, tensors: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write a file of tensors of which one is in memory at a time.

    Args:
        path: Where.
        tensors: What each looks like, on the meta device.
        read: Called with each name, in the order of the file; returns the tensor.

    Raises:
        CheckpointError: If a tensor's type has no place in the format.
    """
    layout = lay_out(tensors)
    with path.open("wb") as file:
        file.write(layout.header)
        for name in sorted(layout.offsets, key=lambda name: (layout.offsets[name], tensors[name].numel())):
            file.write(read(name).contiguous().view(-1).view(torch.uint8).numpy().data)


class TensorFile:
    """A file of tensors, each read when it is asked for.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._readable():
            self._file = safetensors.safe_open(path, framework="pt")

    def looks(self) -> dict[str, torch.Tensor]:
        """Return what each tensor looks like, on the meta device."""
        found = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - it is no mapping
        return {
            name: torch.empty(tensor.get_shape(), dtype=_TYPES[tensor.get_dtype()], device="meta")
            for name, tensor in found.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU.

        Raises:
            CheckpointError: If it is not there, or the file is damaged.
        """
        with self._readable():
            return cast(torch.Tensor, self._file.get_tensor(name))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"The tensors of {self._path} cannot be read: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of tensors to the CPU. Nothing in it is executed.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    file = TensorFile(path)
    return {name: file.read(name) for name in file.looks()}
