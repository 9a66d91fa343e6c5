"""Files of tensors in the safetensors format, written straight from host memory.

The library ``safetensors`` reads them, and may write them too; but its writer copies every tensor into a Python object
first and holds the interpreter's lock while it does, which would stall the training that goes on meanwhile. The format
is a length, a JSON header and the bytes (https://github.com/huggingface/safetensors#format), so they are laid out here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from everyrank.errors import CheckpointError

SUFFIX = ".safetensors"

_TYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, name): code
    for name, code in {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint64": "U64",
        "uint32": "U32",
        "uint16": "U16",
        "uint8": "U8",
        "bool": "BOOL",
        "complex64": "C64",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "float8_e4m3fnuz": "F8_E4M3FNUZ",
        "float8_e5m2fnuz": "F8_E5M2FNUZ",
    }.items()
    if hasattr(torch, name)
}


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


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of tensors to the CPU. Nothing in it is executed.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"The tensors of {path} cannot be read: {error}") from error
