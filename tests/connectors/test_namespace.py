"""What makes two engines' bytes interchangeable."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.errors import InvalidArgumentError
from kvpool_vllm.metadata import RankFacts
from kvpool_vllm.namespace import check_supported, head_groups, model_label, shard_of, weights_digest, whole_layers


def write_checkpoint(directory: Path, data: bytes, name: str = "w") -> Path:
    directory.mkdir(exist_ok=True)
    header = json.dumps({name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
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
    assert weights_digest(write_checkpoint(tmp_path / "renamed", data, "v")) != one


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097])
def test_small_tensors_have_a_digest(tmp_path: Path, size: int) -> None:
    """Tensors smaller than a sample are read whole."""
    one = weights_digest(write_checkpoint(tmp_path, b"a" * size))
    assert one
    if size:
        assert one != weights_digest(write_checkpoint(tmp_path, b"a" * (size - 1) + b"b"))


def test_directory_without_known_weights_has_no_digest(tmp_path: Path) -> None:
    """The caller then falls back to the model's name and revision, and says so."""
    assert weights_digest(tmp_path) == ""


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("/models/Qwen2.5-0.5B/", "Qwen2.5-0.5B"),
        ("/cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0123abcd", "Qwen2.5-0.5B"),
        ("gpt2", "gpt2"),
    ],
)
def test_label_is_the_same_wherever_the_model_lies(model: str, label: str) -> None:
    """A path, a cache and a hub name of one model share one label."""
    assert model_label(model) == label


def test_ranks_and_their_shards() -> None:
    """Every shard has one rank that stores it; ranks with the same heads share one."""
    assert [shard_of(8, 4, rank, 0) for rank in range(4)] == [(0, True), (1, True), (2, True), (3, True)]
    assert [shard_of(2, 4, rank, 0) for rank in range(4)] == [(0, True), (0, False), (1, True), (1, False)]
    assert [shard_of(1, 2, rank, 1) for rank in range(2)] == [(1, True), (1, False)]
    with pytest.raises(InvalidArgumentError, match="6 does not divide 8"):
        head_groups(8, 6)


def test_ranks_that_differ_are_refused() -> None:
    """One engine on two kinds of CPU would store two kinds of bytes under one name."""
    amx, vec = RankFacts(2, 64, "x", "amx"), RankFacts(2, 64, "x", "vec")
    assert whole_layers([amx, amx]) == amx
    with pytest.raises(InvalidArgumentError, match="must hold KV alike"):
        whole_layers([amx, vec])


class FullAttentionSpec:
    pass


class MambaSpec:
    pass


def configuration(specs: list[Any], algorithm: str = "sha256", **parallel: int) -> tuple[Any, Any]:
    sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1} | parallel
    cache = SimpleNamespace(prefix_caching_hash_algo=algorithm, calculate_kv_scales=False)
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(**sizes), cache_config=cache)
    return vllm_config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def test_supported_model_passes() -> None:
    """One group of full attention."""
    check_supported(*configuration([FullAttentionSpec()]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (configuration([FullAttentionSpec(), MambaSpec()]), "model: has 2 KV cache groups"),
        (configuration([MambaSpec()]), "model: has KV of kind MambaSpec"),
        (configuration([FullAttentionSpec()], algorithm="xxhash"), "'xxhash' is not cryptographic"),
        (
            configuration([FullAttentionSpec()], decode_context_parallel_size=2),
            "decode_context_parallel_size: must be 1",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_in_a_sentence(given: tuple[Any, Any], said: str) -> None:
    """At start, with the name of the setting, not at run time."""
    with pytest.raises(InvalidArgumentError, match=said):
        check_supported(*given)
