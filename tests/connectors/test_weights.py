"""Which weights a checkpoint holds, told from its content."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from kvpool.errors import InvalidArgumentError
from kvpool_vllm.weights import TENSORS_MAX, weights_digest


def write_checkpoint(directory: Path, *tensors: bytes, names: str = "layers.{}.w") -> Path:
    directory.mkdir(exist_ok=True)
    header, begin = {}, 0
    for number, data in enumerate(tensors):
        place = [begin, begin := begin + len(data)]
        header[names.format(number)] = {"dtype": "U8", "shape": [len(data)], "data_offsets": place}
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(tensors))
    return directory


def test_digest_names_content_not_place(tmp_path: Path) -> None:
    """The same weights in two places are one model; other weights of the same shape are not."""
    data = bytes(range(256)) * 1000
    one = weights_digest(write_checkpoint(tmp_path / "one", data))
    assert one == weights_digest(write_checkpoint(tmp_path / "two", data))
    for offset in (0, len(data) // 2, len(data) - 1):
        other = bytearray(data)
        other[offset] ^= 1
        assert weights_digest(write_checkpoint(tmp_path / "other", bytes(other))) != one
    assert weights_digest(write_checkpoint(tmp_path / "renamed", data, names="v")) != one


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097])
def test_small_tensors_have_a_digest(tmp_path: Path, size: int) -> None:
    """Tensors smaller than a sample are read whole."""
    one = weights_digest(write_checkpoint(tmp_path, b"a" * size))
    assert one
    if size:
        assert one != weights_digest(write_checkpoint(tmp_path, b"a" * (size - 1) + b"b"))


@pytest.mark.parametrize("changed", [0, 7, 99])
def test_every_tensor_counts(tmp_path: Path, changed: int) -> None:
    """A checkpoint of which one layer was trained further is another one."""
    tensors = [b"a" * 64] * 100
    one = weights_digest(write_checkpoint(tmp_path / "one", *tensors))
    tensors[changed] = b"b" * 64
    assert one != weights_digest(write_checkpoint(tmp_path / "two", *tensors))


def test_of_very_many_tensors_some_of_each_kind_count(tmp_path: Path) -> None:
    """Training or merging changes all tensors of a kind, be they few among many."""

    def digest_of(folder: str, experts: bytes, attention: bytes) -> str:
        directory = write_checkpoint(tmp_path / folder, *[experts] * TENSORS_MAX, attention, names="layers.{}.expert")
        file, last = directory / "model.safetensors", f"layers.{TENSORS_MAX}."
        file.write_bytes(file.read_bytes().replace(f"{last}expert".encode(), f"{last}attend".encode()))
        return weights_digest(directory)

    one = digest_of("one", b"a" * 8, b"x" * 8)
    assert one == digest_of("same", b"a" * 8, b"x" * 8)
    assert one != digest_of("attention", b"a" * 8, b"y" * 8)
    assert one != digest_of("experts", b"b" * 8, b"x" * 8)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_other_formats_are_told_apart(tmp_path: Path, name: str) -> None:
    """By places all over the file, be it named itself or its directory."""
    digests = set()
    for offset in (None, 0, 500_000, 999_999):
        data = bytearray(1_000_000)
        if offset is not None:
            data[offset] = 1
        (tmp_path / name).write_bytes(data)
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 4
    assert weights_digest(tmp_path / name) in digests


def test_directory_without_known_weights_has_no_digest(tmp_path: Path) -> None:
    """The caller then falls back to the model's name and revision, and says so."""
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == ""


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 60), struct.pack("<Q", 4) + b"abcd"])
def test_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    """An error of the checkpoint, not of this program."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"model: model.safetensors .*not a safetensors file"):
        weights_digest(tmp_path)
