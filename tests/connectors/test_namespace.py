"""What makes two engines' bytes interchangeable."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvpool.config import ConnectorSettings
from kvpool.errors import InvalidArgumentError
from kvpool.model import Namespace
from kvpool_vllm.groups import FULL, SLIDING_WINDOW, Group, Groups
from kvpool_vllm.metadata import GroupFacts, RankFacts
from kvpool_vllm.namespace import (
    Place,
    _architecture,
    agreed_namespaces,
    check_supported,
    group_namespaces,
    head_groups,
    model_label,
    place_of,
    stored_head_groups,
    total_kv_heads,
    whole_layers,
)


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


def test_ranks_and_their_places() -> None:
    """Every rank holds one shard; ranks with the same heads hold the same one and count their turns."""
    assert [place_of(8, 4, rank, 0) for rank in range(4)] == [Place(rank) for rank in range(4)]
    halves = [Place(0, 0, 2), Place(0, 1, 2), Place(1, 0, 2), Place(1, 1, 2)]
    assert [place_of(2, 4, rank, 0) for rank in range(4)] == halves
    assert [place_of(1, 2, rank, 1) for rank in range(2)] == [Place(1, 0, 2), Place(1, 1, 2)]
    with pytest.raises(InvalidArgumentError, match="6 does not divide 8"):
        head_groups(8, 6)


@given(
    heads=st.integers(1, 16),
    tp=st.integers(1, 16),
    others=st.lists(st.integers(1, 16), max_size=2),
    stages=st.integers(1, 3),
)
def test_every_block_of_every_shard_has_one_rank_that_stores_it(
    heads: int, tp: int, others: list[int], stages: int
) -> None:
    """However TP and PP cut a model, together the ranks store each shard once, and each holds all of its heads."""
    assume(all(heads % size == 0 or size % heads == 0 for size in (tp, *others)))
    groups = head_groups(heads, tp, {f"engine {n}": size for n, size in enumerate(others)})
    assert heads % groups == 0
    shards = groups * stages
    for size in (tp, *others):  # each engine of those that share
        places = [place_of(heads, size, rank, stage, groups) for stage in range(stages) for rank in range(size)]
        for block in range(20):
            stored = [place for place in places if place.stores(block)]
            assert sorted(place.shard + n for place in stored for n in range(place.shards)) == list(range(shards))
        for number, place in enumerate(places):
            stage, rank = divmod(number, size)
            each = heads // groups
            held = [
                head
                for n in range(place.shards)
                for head in range(each * (place.shard + n), each * (place.shard + n + 1))
            ]
            own = max(1, heads // size)
            first = rank * heads // size
            assert held == [stage * heads + head for head in range(first, first + own)]


def test_parts_that_others_say() -> None:
    """What is asked for must fit; where it does not, the setting is named."""
    assert head_groups(8, 1) == 1
    assert head_groups(8, 1, {"decode_tp_size": 4, "prefill_tp_size": 2}) == 4
    assert head_groups(12, 4, {"decode_tp_size": 6}) == 12
    assert head_groups(2, 1, {"decode_tp_size": 8}) == 2
    assert head_groups(1, 2, {"decode_tp_size": 8}, 4) == 1
    assert head_groups(8, 2, {"decode_tp_size": 8}, 4) == 4
    for (heads, tp, others, asked), said in {
        (8, 1, 3, 0): "decode_tp_size: 3 does not divide 8 KV heads evenly",
        (8, 4, 0, 2): "head_groups: must divide 8 KV heads and be a multiple of 4, not 2",
        (8, 1, 0, 3): "head_groups: must divide 8 KV heads and be a multiple of 1, not 3",
    }.items():
        with pytest.raises(InvalidArgumentError, match=said):
            head_groups(heads, tp, {"decode_tp_size": others} if others else {}, asked)


def test_engines_that_are_told_the_same_store_alike() -> None:
    """Whatever their own TP is, as far as it divides what they are told."""

    def stored(tp: int, *, heads: int = 8, mla: bool = False, **settings: int) -> int:
        model = SimpleNamespace(use_mla=mla, get_total_num_kv_heads=lambda: heads)
        config = SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=tp))
        return stored_head_groups(config, ConnectorSettings(**settings))

    assert [stored(tp) for tp in (1, 2, 4)] == [1, 2, 4]
    assert {stored(tp, prefill_tp_size=4, decode_tp_size=2) for tp in (1, 2, 4)} == {4}
    assert {stored(tp, head_groups=4) for tp in (1, 2, 4)} == {4}
    assert {stored(tp, heads=2, prefill_tp_size=16) for tp in (1, 2, 4)} == {2}
    assert {stored(tp, mla=True, prefill_tp_size=3) for tp in (1, 2, 4)} == {1}
    with pytest.raises(InvalidArgumentError, match="prefill_tp_size: 3 does not divide 8 KV heads"):
        stored(1, prefill_tp_size=3)


def test_latent_attention_has_one_head() -> None:
    """Whatever the model's configuration calls its heads, all ranks hold the same latents."""
    model = SimpleNamespace(use_mla=True, get_total_num_kv_heads=lambda: 16)
    assert total_kv_heads(model) == 1
    assert {place_of(total_kv_heads(model), 4, rank, 0).shard for rank in range(4)} == {0}


def facts(layout: str = "x", isa: str = "amx", layers: int = 2) -> RankFacts:
    return RankFacts((GroupFacts(layers, 64, layout), GroupFacts(layers, 64, layout)), isa)


def test_ranks_that_differ_are_refused() -> None:
    """One engine on two kinds of CPU would store two kinds of bytes under one name."""
    assert whole_layers([facts(), facts()]) == facts()
    for other in (facts(isa="vec"), facts(layout="y"), facts(layers=3)):
        with pytest.raises(InvalidArgumentError, match="must hold KV alike"):
            whole_layers([facts(), other])


FULL_SPEC = type("FullAttentionSpec", (), {"block_size": 16, "num_kv_heads": 4})()
WIDE_SPEC = type("FullAttentionSpec", (), {"block_size": 16, "num_kv_heads": 8})()


def configuration(specs: list[Any], algorithm: str = "sha256", **parallel: Any) -> tuple[Any, Any]:
    kinds = ("decode_context", "prefill_context", "tensor", "pipeline")
    ones = {f"{kind}_parallel_size": 1 for kind in kinds}
    cache = SimpleNamespace(prefix_caching_hash_algo=algorithm, calculate_kv_scales=False)
    model = SimpleNamespace(use_mla=False, get_total_num_kv_heads=lambda: 8, get_total_num_hidden_layers=lambda: 61)
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(**ones | parallel), cache_config=cache, model_config=model
    )
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=[f"layers.{n}"]) for n, spec in enumerate(specs)]
    return vllm_config, SimpleNamespace(kv_cache_groups=groups)


def test_supported_model_passes() -> None:
    """Full attention, its heads cut by TP."""
    check_supported(*configuration([FULL_SPEC], tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("configured", "said"),
    [
        (configuration([FULL_SPEC], algorithm="xxhash"), "'xxhash' is not cryptographic"),
        (configuration([FULL_SPEC], decode_context_parallel_size=2), "decode_context_parallel_size: must be 1"),
        (
            configuration([FULL_SPEC], distributed_executor_backend="external_launcher", world_size=2),
            "distributed_executor_backend: must not be external_launcher",
        ),
        (configuration([FULL_SPEC], pipeline_parallel_size=2), "pipeline_parallel_size: must divide the 61 layers"),
        (
            configuration([FULL_SPEC, WIDE_SPEC], tensor_parallel_size=2),
            "tensor_parallel_size: must be 1 .* a rank has 8 of layers.1, and 4 of most",
        ),
        (
            (*configuration([WIDE_SPEC], pipeline_parallel_size=61), 8),
            r"head_groups: 8 parts .*decode_tp_size.* 61 stages \(pipeline_parallel_size\) are more than 256",
        ),
        ((*configuration([WIDE_SPEC, FULL_SPEC]), 2), "head_groups: must be 1 .* a rank has 4 of layers.1, and 8"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_a_sentence(configured: tuple[Any, ...], said: str) -> None:
    """At start, with the name of the setting, not at run time."""
    with pytest.raises(InvalidArgumentError, match=said):
        check_supported(*configured)


FIELDS = {
    "model": "m", "revision": "r1", "dtype": "bfloat16", "kv_quant": "", "kv_heads": 8, "head_size": 64,
    "layer_groups": 1, "head_groups": 2, "hash_algorithm": "sha256",
}  # fmt: skip
WORKERS = {"layers": 2, "layout": "FLASH:2x16", "isa": ""}
WINDOW = {"span": 64, "names": ("layers.0", "layers.2")}
OTHERS = {"block_tokens": 16, "stored": "bfloat16", "fingerprint": "f0"}

CHANGES = [
    ("model", "n"), ("revision", "r2"), ("dtype", "float16"), ("kv_quant", "fp8"), ("stored", "uint8:fp8"),
    ("kv_heads", 4), ("head_size", 128), ("layer_groups", 2), ("head_groups", 4), ("hash_algorithm", "blake3"),
    ("fingerprint", "f1"), ("layers", 4), ("layout", "FLASH:16x2"), ("isa", "x86-amx"), ("block_tokens", 32),
    ("span", 128), ("names", ("layers.0", "layers.1")),
]  # fmt: skip


def engine(**changed: Any) -> list[Namespace]:
    """Return the namespaces of an engine with a window and full attention, changed as told."""
    own: dict[str, Any] = FIELDS | WORKERS | WINDOW | OTHERS | changed
    tokens, stored = own["block_tokens"], own["stored"]
    window = Group(0, SLIDING_WINDOW, tokens, own["span"], own["names"], stored)
    full = Group(1, FULL, tokens, 0, ("layers.1", "layers.3"), stored)
    fields = {name: own[name] for name in FIELDS}
    ranks = facts(own["layout"], own["isa"], own["layers"])
    return group_namespaces(fields, Groups((window, full), tokens, 1), ranks, own["fingerprint"])


@given(st.sets(st.sampled_from(CHANGES)), st.sets(st.sampled_from(CHANGES)))
def test_engines_that_differ_in_anything_share_nothing(one: set[Any], two: set[Any]) -> None:
    """Equal digests mean equal engines, group by group; and no two groups of an engine share a digest."""
    first, second = engine(**dict(one)), engine(**dict(two))
    assert first[0].digest != first[1].digest
    assert (first[0].digest == second[0].digest) == (one == two)
    assert (first[1].digest == second[1].digest) == all(name in WINDOW for name, _ in one ^ two)


def test_namespaces_that_cannot_be_are_none_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Whether the ranks differ or all that they hold is too much: in a sentence, and nothing raised into a step."""
    group = Group(0, FULL, 16, 0, ("layers.0",), "bfloat16")
    groups = Groups((group,), 16, 1)
    found = agreed_namespaces(FIELDS, groups, {facts()}, "f0")
    assert found == group_namespaces(FIELDS, groups, facts(), "f0")
    large = FIELDS | {"kv_heads": 64, "layer_groups": 8, "head_groups": 64}
    assert agreed_namespaces(large, groups, {facts(layers=10)}, "f0") is None
    assert agreed_namespaces(FIELDS, groups, {facts(), facts(isa="vec")}, "f0") is None
    said = [record.getMessage() for record in caplog.records]
    assert all(text.startswith("kvpool: nothing is loaded or saved: ") for text in said)
    assert "layer_groups x head_groups must be at most 256, not 512" in said[0]
    assert "all ranks must hold KV alike" in said[1]


@given(st.data())
def test_every_field_of_a_namespace_is_in_its_digest(data: st.DataObject) -> None:
    """Changing any one field changes the digest, and the difference is named."""
    base = Namespace(model="m", layers=4, kv_heads=4)
    name, value = data.draw(st.sampled_from(sorted(base.as_dict().items())))
    assume(name != "format_version")
    other = replace(base, **{name: value * 2 if isinstance(value, int) else value + "x"})
    assert other.digest != base.digest
    assert base.differences(other) == [name]


def model_config(max_model_len: int = 100, **config: Any) -> Any:
    return SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: config), max_model_len=max_model_len)


def test_architecture_is_part_of_the_revision() -> None:
    """As the engine has it, overrides included; the maximum length only where keys are rotated by it."""
    plain = {"rope_parameters": {"rope_type": "default"}, "layers": 2}
    long = {"rope_parameters": {"rope_type": "longrope"}, "layers": 2}
    assert _architecture(model_config(**plain)) == _architecture(model_config(200, **plain, _name_or_path="/there"))
    assert _architecture(model_config(**plain)) != _architecture(model_config(**plain | {"layers": 3}))
    assert _architecture(model_config(**long)) != _architecture(model_config(200, **long))
