"""Which engines may share bytes: the namespace of one vLLM configuration.

vLLM's block hashes name tokens, not weights, types or layouts. Everything else that decides what
lies in a block is gathered here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpool.errors import InvalidArgumentError
from kvpool.model import SAFE_HASHES, SHARDS_MAX, Namespace
from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.weights import weights_digest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kvpool.config import ConnectorSettings
    from kvpool_vllm.groups import Group, Groups
    from kvpool_vllm.metadata import RankFacts

logger = logging.getLogger(LOGGER_NAME)

_LENGTH_DEPENDENT = re.compile(r'"(rope_)?type": "(longrope|dynamic|su)"')
"""Rotary embeddings that turn keys by other angles in engines of another maximum length."""

_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")


# ---- the model -----------------------------------------------------------------------------------


def model_label(model: str) -> str:
    """Return a model's name without where it lies: two hosts may keep one model in two places."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+?)/snapshots/", model + "/")
    return cached[1] if cached else model.rstrip("/").rpartition("/")[2] or model


def _checkpoint(model_config: Any, load_config: Any) -> Path | None:
    path = Path(model_config.model)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache  # type: ignore[import-not-found,unused-ignore]

    found = try_to_load_from_cache(
        model_config.model, "config.json", cache_dir=load_config.download_dir, revision=model_config.revision
    )
    return Path(found).parent if isinstance(found, str) else None


def _architecture(model_config: Any) -> str:
    """Return a digest of what the model's configuration says, with the length that rotations depend on."""
    config = {k: v for k, v in model_config.hf_config.to_dict().items() if k not in _VOLATILE_CONFIG}
    text = json.dumps(config, sort_keys=True, default=str)
    if _LENGTH_DEPENDENT.search(text):
        text += f"max_model_len={model_config.max_model_len}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _model_revision(model_config: Any, load_config: Any) -> str:
    """Return what stands for weights and architecture, computed from content, not from names."""
    shape = _architecture(model_config)
    load_format = str(getattr(load_config.load_format, "value", load_config.load_format))
    if load_format == "dummy":
        return f"dummy-seed-{model_config.seed}-{shape}"
    checkpoint = _checkpoint(model_config, load_config)
    digest = weights_digest(checkpoint) if checkpoint is not None else ""
    if not digest:
        digest = f"{model_config.model}@{model_config.revision or 'unversioned'}"
        logger.warning(
            "kvpool: no weights of %s found to identify them by; KV is shared with every engine that loads %s: "
            "give --revision if the weights behind that name can change",
            model_config.model,
            digest,
        )
    return f"{digest}-{shape}"


# ---- what is refused -------------------------------------------------------------------------------


def check_supported(vllm_config: Any, kv_cache_config: Any, groups: int = 1) -> None:
    """Raise InvalidArgumentError, in a sentence, for what would store KV that its hash does not name.

    What KV cache groups there may be is ``groups.read_groups``'s to say. ``groups``: of heads, as they are stored.
    """
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise InvalidArgumentError(
                name, f"must be 1, not {getattr(parallel, name)}: blocks would be split by token"
            )
    if getattr(parallel, "distributed_executor_backend", None) == "external_launcher" and parallel.world_size > 1:
        raise InvalidArgumentError(
            "distributed_executor_backend",
            "must not be external_launcher for more than one rank: each would schedule by what itself has loaded alone",
        )
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise InvalidArgumentError("calculate_kv_scales", "must be off: scales of one engine mean nothing to another")
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in SAFE_HASHES:
        allowed = ", ".join(sorted(SAFE_HASHES))
        raise InvalidArgumentError(
            "prefix_caching_hash_algo", f"{algorithm!r} is not cryptographic; allowed: {allowed}"
        )
    stages, layers = parallel.pipeline_parallel_size, vllm_config.model_config.get_total_num_hidden_layers()
    if layers % stages:
        raise InvalidArgumentError("pipeline_parallel_size", f"must divide the {layers} layers, {stages} does not")
    heads, tp = total_kv_heads(vllm_config.model_config), parallel.tensor_parallel_size
    if stages * groups > SHARDS_MAX:
        raise InvalidArgumentError(
            "head_groups",
            f"{groups} parts of a block's heads, as head_groups or the sizes of TP ask for (tensor_parallel_size, "
            f"prefill_tp_size, decode_tp_size), for each of {stages} stages (pipeline_parallel_size) are more than "
            f"{SHARDS_MAX}",
        )
    for group in kv_cache_config.kv_cache_groups if max(tp, groups) > 1 else ():
        spec = group.kv_cache_spec
        for one in getattr(spec, "kv_cache_specs", {"": spec}).values():
            if one.num_kv_heads != max(1, heads // tp):
                raise InvalidArgumentError(
                    "tensor_parallel_size" if tp > 1 else "head_groups",
                    f"must be 1 for a model whose layers differ in KV heads: a rank has {one.num_kv_heads} "
                    f"of {group.layer_names[0]}, and {max(1, heads // tp)} of most",
                )


# ---- geometry --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank holds of each block: shards, alone or like other ranks, who then take turns in storing them."""

    shard: int
    """The first one."""
    copy: int = 0
    copies: int = 1
    shards: int = 1
    """How many: one behind the other, each some of the rank's heads."""

    def stores(self, number: int) -> bool:
        """Whether the block of this number is this rank's to store."""
        return number % self.copies == self.copy


def total_kv_heads(model_config: Any) -> int:
    """Return the model's KV heads; latent attention has one, whatever its configuration says."""
    return 1 if model_config.use_mla else int(model_config.get_total_num_kv_heads())


def head_groups(heads: int, tp: int, others: Mapping[str, int] | None = None, asked: int = 0) -> int:
    """Return into how many parts the heads of stored blocks are cut: engines of any of these TPs hold whole parts.

    ``others``: TPs of other engines by the setting that says so. ``asked``: just so many parts, 0 for the least.
    Where TP is above the heads, ranks hold the same ones. Raises InvalidArgumentError.
    """
    groups = 1
    for name, size in {"tensor_parallel_size": tp, **({} if asked else others or {})}.items():
        if heads % size and size % heads:
            raise InvalidArgumentError(name, f"{size} does not divide {heads} KV heads evenly")
        groups = math.lcm(groups, min(heads, size))
    if not asked:
        return groups
    asked = min(heads, asked)
    if heads % asked or asked % groups:
        raise InvalidArgumentError(
            "head_groups", f"must divide {heads} KV heads and be a multiple of {groups}, not {asked}: TP is {tp}"
        )
    return asked


def stored_head_groups(vllm_config: Any, settings: ConnectorSettings) -> int:
    """Return into how many parts this engine's settings cut the heads of stored blocks."""
    sizes = {"prefill_tp_size": settings.prefill_tp_size, "decode_tp_size": settings.decode_tp_size}
    return head_groups(
        total_kv_heads(vllm_config.model_config),
        vllm_config.parallel_config.tensor_parallel_size,
        {name: size for name, size in sizes.items() if size},
        settings.head_groups,
    )


def place_of(heads: int, tp: int, tp_rank: int, pp_rank: int, groups: int = 0) -> Place:
    """Return what a rank holds of blocks whose heads are cut into ``groups``, 0 for as TP cuts them.

    Each pipeline stage has shards of its own.
    """
    own = head_groups(heads, tp)
    groups = groups or own
    copies, shards = tp // own, groups // own
    return Place(pp_rank * groups + tp_rank // copies * shards, tp_rank % copies, copies, shards)


def hash_fingerprint(vllm_config: Any, hash_tokens: int) -> str:
    """Return the engine's own hash of a fixed block: differs whenever seeds, algorithms or distances do.

    ``hash_tokens``: tokens from one hash of a request to the next. Only once the engine has set its seed,
    which is after the connector is made.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    return bytes(hash_block_tokens(function, None, range(hash_tokens))).hex()[:32]


def namespace_fields(vllm_config: Any, groups: int) -> dict[str, Any]:
    """Return the fields known at start, alike for all groups, the slow ones (the weights) among them.

    ``groups``: of heads, as they are stored.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    revision = _model_revision(model, vllm_config.load_config)
    if model.quantization:  # weights quantised while loading make other KV than the ones on disk
        revision += f"+{model.quantization}"
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is not None:  # its layers' KV lies in the same blocks
        revision += "+" + _model_revision(draft, vllm_config.load_config)
    return {
        "model": model_label(model.model),
        "revision": revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_quant": "" if cache.cache_dtype == "auto" else str(cache.cache_dtype),
        "kv_heads": total_kv_heads(model),
        "head_size": model.get_head_size(),
        "layer_groups": vllm_config.parallel_config.pipeline_parallel_size,
        "head_groups": groups,
        "hash_algorithm": cache.prefix_caching_hash_algo,
    }


def agreed_namespaces(
    fields: dict[str, Any], groups: Groups, facts: Collection[RankFacts], fingerprint: str
) -> list[Namespace] | None:
    """Return the namespace of each group; None, and say why, where ranks differ or a namespace cannot be."""
    try:
        return group_namespaces(fields, groups, whole_layers(facts), fingerprint)
    except InvalidArgumentError as error:
        logger.error("kvpool: nothing is loaded or saved: %s", error)  # noqa: TRY400 -- its sentence says all
        return None


def group_namespaces(fields: dict[str, Any], groups: Groups, facts: RankFacts, fingerprint: str) -> list[Namespace]:
    """Return the namespace of each group."""
    return [_group_namespace(fields, group, facts, fingerprint) for group in groups.all]


def _group_namespace(fields: dict[str, Any], group: Group, facts: RankFacts, fingerprint: str) -> Namespace:
    own = facts.groups[group.number]
    # Groups are cut differently by engines that keep more layers: the names say which layers a block holds.
    layers = hashlib.blake2b("\n".join(group.layers).encode(), digest_size=4).hexdigest()
    quant = fields["kv_quant"]
    if group.stored not in {"", fields["dtype"]}:  # as a checkpoint may ask for
        quant = f"{quant}/{group.stored}" if quant else group.stored
    return Namespace(
        **{**fields, "kv_quant": quant},
        block_tokens=group.block_tokens,
        layers=own.layers * fields["layer_groups"],
        layout=own.layout,
        isa=facts.isa,
        kv_group=f"{group.label} of layers {layers}",
        hash_fingerprint=fingerprint,
    )


def whole_layers(facts: Collection[RankFacts]) -> RankFacts:
    """Return the ranks' common facts; raise InvalidArgumentError where they differ."""
    kinds = set(facts)
    if len(kinds) != 1:
        raise InvalidArgumentError("workers", f"all ranks must hold KV alike, these do not: {sorted(map(str, kinds))}")
    return kinds.pop()
