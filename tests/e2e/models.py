"""Tiny checkpoints of several architectures, on which a wrong KV cache shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMON = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 16384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
WINDOW = 96
CHUNK = 128


def _qwen2(**changed: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": True} | changed)


def _deepseek() -> Any:
    from transformers import DeepseekV2Config

    # The engine's kernels for the CPU know this latent size alone; the output head is not tied in its model.
    return DeepseekV2Config(
        **COMMON, q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32,
        num_key_value_heads=4, moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=4, tie_word_embeddings=False,
    )  # fmt: skip


def _gemma() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **COMMON, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=True,
    )  # fmt: skip


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **COMMON, num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=WINDOW, rope_scaling=None, tie_word_embeddings=False,
    )  # fmt: skip


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**COMMON, num_key_value_heads=2, head_dim=32, sliding_window=WINDOW, tie_word_embeddings=True)


def _llama4() -> Any:
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        **COMMON, intermediate_size_mlp=256, num_key_value_heads=2, head_dim=32, num_local_experts=2,
        attention_chunk_size=CHUNK, interleave_moe_layer_step=1, tie_word_embeddings=True,
    )  # fmt: skip


def _mamba() -> Any:
    from transformers import Mamba2Config

    sizes = {k: v for k, v in COMMON.items() if k not in {"max_position_embeddings", "intermediate_size"}}
    return Mamba2Config(
        **sizes | {"num_hidden_layers": 2}, num_heads=8, head_dim=32, state_size=32, n_groups=1,
        tie_word_embeddings=True,
    )  # fmt: skip


KINDS: dict[str, Callable[[], Any]] = {
    "qwen2": _qwen2,
    "one-kv-head": lambda: _qwen2(num_key_value_heads=1),
    "mla": _deepseek,
    "sliding-and-full": _gemma,
    "sinks-and-experts": _gpt_oss,
    "sliding-only": _mistral,
    "chunked-and-full": _llama4,
    "mamba": _mamba,
}

_FACTORS = {
    # Latent attention rounds otherwise in prefill and decode: with strong weights that alone changes tokens.
    "mla": {"o_proj": 0.4, "down_proj": 0.2, "q_proj": 0.7},
    "sliding-only": {"o_proj": 0.7},
}


def _tune(kind: str) -> Callable[[str, Any], None]:
    def tune(name: str, parameter: Any) -> None:
        if kind == "sliding-and-full" and "norm" in name:  # these scale by one more than their weight
            parameter.fill_(5.0 if "post_attention" in name else 2.0 if "post_feed" in name else 0.0)
        for part, factor in _FACTORS.get(kind, {}).items():
            if part in name:
                parameter.mul_(factor)

    return tune


def make(directory: Path, kind: str) -> Path:
    """Write a checkpoint of one of ``KINDS``; return its directory."""
    from kvpool_vllm.random_model import write_model

    return write_model(directory / kind, KINDS[kind](), tune=_tune(kind))
