"""Which weights a checkpoint holds, told from what lies in its files and not from where they lie."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kvpool.errors import InvalidArgumentError

SAMPLE_BYTES = 4096
HEADER_BYTES_MAX = 1 << 28

TENSORS_MAX = 4096
"""A checkpoint of more tensors than these is sampled: the read-ahead of a network disk makes each one dear."""

TENSORS_PER_KIND = 16
"""Of a file of such a checkpoint; a kind is what all layers and experts call alike."""

PIECES = 256
"""Of a file whose format is not known here."""

OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")


def weights_digest(path: Path) -> str:
    """Return a digest of the weights in a checkpoint's directory or file, or "" if there are none of a known kind.

    Names, shapes and types of all tensors, and three samples of 4 KiB from each: another training step changes
    nearly every tensor everywhere, and reading all weights would take minutes. Of more than 4096 tensors, 16 of
    each kind and file are sampled; other formats than safetensors at 256 places a file. So two checkpoints share
    a digest only if they differ in nothing but bytes between the samples: not by training, merging or quantising.
    """
    files = _files(path, ("*.safetensors",))
    digest = hashlib.blake2b(digest_size=16)
    if files:
        headers = [_header(file) for file in files]
        everything = sum(len(header) for _, header in headers) <= TENSORS_MAX
        for file, (raw, header) in zip(files, headers, strict=True):
            digest.update(f"{file.name}:{file.stat().st_size};".encode() + raw)
            begin = 8 + len(raw)
            chosen = header if everything else _some_of_each_kind(header)
            _update(digest, file, (place for name in chosen for place in _three(begin, *header[name])))
        return digest.hexdigest()
    files = _files(path, OTHER_FORMATS)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        last = max(0, size - SAMPLE_BYTES)
        _update(digest, file, ((last * i // (PIECES - 1), SAMPLE_BYTES) for i in range(PIECES)))
    return digest.hexdigest() if files else ""


def _files(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    if path.is_dir():
        return sorted(file for pattern in patterns for file in path.glob(pattern))
    return [path] if any(path.match(pattern) for pattern in patterns) else []


def _update(digest: hashlib.blake2b, file: Path, places: Iterator[tuple[int, int]]) -> None:
    with file.open("rb") as stream:
        for offset, length in places:
            stream.seek(offset)
            digest.update(stream.read(length))


def _header(file: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a safetensors file's raw header, and where each tensor begins and ends behind it."""
    with file.open("rb") as stream:
        raw = stream.read(_header_length(file, stream))
    try:
        tensors = {name: entry["data_offsets"] for name, entry in json.loads(raw).items() if name != "__metadata__"}
        return raw, {name: (int(begin), int(end)) for name, (begin, end) in sorted(tensors.items())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError("model", f"{file.name} is not a safetensors file: {error!r}") from error


def _header_length(file: Path, stream: IO[bytes]) -> int:
    start = stream.read(8)
    length: int = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_BYTES_MAX + 1
    if length > HEADER_BYTES_MAX:
        raise InvalidArgumentError("model", f"{file.name} has a header of {length} bytes, not a safetensors file")
    return length


def _three(base: int, begin: int, end: int) -> list[tuple[int, int]]:
    """Return begin, middle and end of a tensor as (offset, length)."""
    offsets = {begin, max(begin, (begin + end - SAMPLE_BYTES) // 2), max(begin, end - SAMPLE_BYTES)}
    return [(base + offset, min(SAMPLE_BYTES, end - offset)) for offset in sorted(offsets)]


def _some_of_each_kind(header: dict[str, tuple[int, int]]) -> list[str]:
    """Return, evenly spread, a few tensors of each name that differs in more than its numbers."""
    kinds = {name: re.sub(r"\d+", "#", name) for name in header}
    total, seen, chosen = Counter(kinds.values()), Counter[str](), []
    for name, kind in kinds.items():
        step = max(1, total[kind] // TENSORS_PER_KIND)
        if seen[kind] % step == 0:
            chosen.append(name)
        seen[kind] += 1
    return chosen
