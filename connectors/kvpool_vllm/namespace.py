"""Which engines may share bytes: the namespace of one vLLM configuration.

vLLM's block hashes name tokens, not weights, types or layouts. Everything else that decides what
lies in a block is gathered here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpool.errors import InvalidArgumentError
from kvpool.model import SAFE_HASHES
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from kvpool_vllm.metadata import RankFacts

logger = logging.getLogger(LOGGER_NAME)

SAMPLE_BYTES = 4096
HEADER_BYTES_MAX = 1 << 28
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")


# ---- the weights -----------------------------------------------------------------------------------


def _samples(path: Path) -> Iterator[bytes]:
    """Yield a safetensors header, then begin, middle and end of every tensor."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > HEADER_BYTES_MAX:
            raise InvalidArgumentError("model", f"{path.name} has a header of {length} bytes, not a safetensors file")
        header = stream.read(length)
        yield header
        for name, tensor in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            for offset in sorted(
                {begin, max(begin, (begin + end - SAMPLE_BYTES) // 2), max(begin, end - SAMPLE_BYTES)}
            ):
                stream.seek(8 + length + offset)
                yield stream.read(min(SAMPLE_BYTES, end - offset))


def weights_digest(directory: Path) -> str:
    """Return a digest of a checkpoint directory's weights, or "" if there are none of a known kind.

    Names, shapes and types of all tensors, and three samples of 4 KiB from each: another training
    step changes nearly every tensor everywhere, and reading all weights would take minutes.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size};".encode())
        for sample in _samples(path):
            digest.update(sample)
    return digest.hexdigest()


def model_label(model: str) -> str:
    """Return a model's name without where it lies: two hosts may keep one model in two places."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+?)/snapshots/", model + "/")
    return cached[1] if cached else model.rstrip("/").rpartition("/")[2] or model


def _directory(model_config: Any) -> Path | None:
    path = Path(model_config.model)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache  # type: ignore[import-not-found,unused-ignore]

    found = try_to_load_from_cache(model_config.model, "config.json", revision=model_config.revision)
    return Path(found).parent if isinstance(found, str) else None


def _model_revision(model_config: Any, load_config: Any) -> str:
    """Return what stands for weights and architecture, computed from content, not from names."""
    config = {k: v for k, v in model_config.hf_config.to_dict().items() if k not in _VOLATILE_CONFIG}
    shape = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    load_format = str(getattr(load_config.load_format, "value", load_config.load_format))
    if load_format == "dummy":
        return f"dummy-seed-{model_config.seed}-{shape}"
    directory = _directory(model_config)
    digest = weights_digest(directory) if directory is not None else ""
    if not digest:
        digest = f"{model_config.model}@{model_config.revision or 'unversioned'}"
        logger.warning(
            "kvpool: no safetensors of %s found to identify its weights by; KV is shared with every engine "
            "that loads %s: give --revision if the weights behind that name can change",
            model_config.model,
            digest,
        )
    return f"{digest}-{shape}"


# ---- what is refused -------------------------------------------------------------------------------


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise InvalidArgumentError, in a sentence, for what would store KV that its hash does not name."""
    parallel = vllm_config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise InvalidArgumentError(
            "model",
            f"has {len(groups)} KV cache groups (a hybrid of attention kinds); kvpool supports one group so far",
        )
    spec = groups[0].kv_cache_spec
    kinds = {type(s).__name__ for s in getattr(spec, "kv_cache_specs", {"": spec}).values()}
    if not kinds <= {"FullAttentionSpec", "MLAAttentionSpec"}:
        raise InvalidArgumentError(
            "model", f"has KV of kind {', '.join(sorted(kinds))}; kvpool supports full attention"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise InvalidArgumentError(
                name, f"must be 1, not {getattr(parallel, name)}: blocks would be split by token"
            )
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise InvalidArgumentError("calculate_kv_scales", "must be off: scales of one engine mean nothing to another")
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in SAFE_HASHES:
        allowed = ", ".join(sorted(SAFE_HASHES))
        raise InvalidArgumentError(
            "prefix_caching_hash_algo", f"{algorithm!r} is not cryptographic; allowed: {allowed}"
        )


# ---- geometry --------------------------------------------------------------------------------------


def head_groups(total_kv_heads: int, tp: int) -> int:
    """Return into how many parts TP cuts the heads; fewer than ``tp`` where ranks hold the same heads."""
    if total_kv_heads % tp and tp % total_kv_heads:
        raise InvalidArgumentError("tensor_parallel_size", f"{tp} does not divide {total_kv_heads} KV heads evenly")
    return min(total_kv_heads, tp)


def shard_of(total_kv_heads: int, tp: int, tp_rank: int, pp_rank: int) -> tuple[int, bool]:
    """Return a rank's shard, and whether this rank is the one that stores it."""
    groups = head_groups(total_kv_heads, tp)
    copies = tp // groups
    return pp_rank * groups + tp_rank // copies, tp_rank % copies == 0


def hash_fingerprint(vllm_config: Any, block_tokens: int) -> str:
    """Return the engine's own hash of a fixed block: differs whenever seeds or algorithms do.

    Only once the engine has set its seed, which is after the connector is made.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    return bytes(hash_block_tokens(function, None, range(block_tokens))).hex()[:32]


def namespace_fields(vllm_config: Any) -> dict[str, Any]:
    """Return the fields known at start, the slow ones (the weights) among them."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    revision = _model_revision(model, vllm_config.load_config)
    if model.quantization:  # weights quantised while loading make other KV than the ones on disk
        revision += f"+{model.quantization}"
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is not None:  # its layers' KV lies in the same blocks
        revision += "+" + _model_revision(draft, vllm_config.load_config)
    total_heads = model.get_total_num_kv_heads()
    return {
        "model": model_label(model.model),
        "revision": revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_quant": "" if cache.cache_dtype == "auto" else str(cache.cache_dtype),
        "kv_heads": total_heads,
        "head_size": model.get_head_size(),
        "layer_groups": parallel.pipeline_parallel_size,
        "head_groups": head_groups(total_heads, parallel.tensor_parallel_size),
        "hash_algorithm": cache.prefix_caching_hash_algo,
    }


def whole_layers(facts: Collection[RankFacts]) -> RankFacts:
    """Return the ranks' common facts; raise InvalidArgumentError where they differ."""
    kinds = set(facts)
    if len(kinds) != 1:
        raise InvalidArgumentError("workers", f"all ranks must hold KV alike, these do not: {sorted(map(str, kinds))}")
    return kinds.pop()
