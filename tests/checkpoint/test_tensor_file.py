"""Our files are safetensors files: the library reads back from them, bit for bit, whatever the tensors look like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from everyrank.checkpoint.manifest import checksum_of_file, write_file
from everyrank.checkpoint.snapshot import Snapshot
from everyrank.checkpoint.tensor_file import read_tensors
from everyrank.errors import CheckpointError

TYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)


def write(path: Path, tensors: dict[str, torch.Tensor], snapshot: Snapshot | None = None) -> None:
    group = (snapshot or Snapshot()).take({"model": tensors})["model"]
    record = write_file(path, [memoryview(group.header), group.data.numpy().data])
    assert record.size == path.stat().st_size
    assert record.sha256 == checksum_of_file(path)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        "strided": torch.arange(12).view(3, 4).t(),
        "expanded": torch.ones(1).expand(5),
        "tied.a": shared,
        "tied.b": shared,
        "view": shared[1:, 1:],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "ünïcode": torch.ones(1, dtype=torch.bool),
    }
    for name in TYPES:
        tensors[name] = torch.randint(0, 2, (3, 5)).to(getattr(torch, name))
    write(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_no_tensors_make_a_file_too(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {})
    assert read_tensors(tmp_path / "x.safetensors") == {}


def test_the_copy_is_the_state_of_that_moment_and_its_memory_is_used_again() -> None:
    snapshot = Snapshot()
    weight = torch.nn.Parameter(torch.zeros(1000))
    first = snapshot.take({"model": {"w": weight}})["model"]
    with torch.no_grad():
        weight.fill_(1.0)
    assert first.data.view(torch.float32).sum() == 0
    second = snapshot.take({"model": {"w": weight}})["model"]
    assert second.data.data_ptr() == first.data.data_ptr()
    assert second.data.view(torch.float32).sum() == 1000
    grown = snapshot.take({"model": {"w": torch.ones(2000)}})["model"]
    assert grown.data.numel() == 8000


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex128), torch.eye(3).to_sparse()])
def test_what_the_format_cannot_hold_is_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="'odd one'"):
        Snapshot().take({"model": {"odd one": tensor}})


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}"])
def test_a_file_of_nonsense_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")
