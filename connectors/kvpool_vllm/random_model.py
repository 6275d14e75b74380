"""Makes checkpoints with random weights, offline: ``python -m kvpool_vllm.random_model DIRECTORY tiny|medium``.

Plain random initialisation makes a model that echoes its last token whatever the cache holds. Here attention
is made sharp and its output strong, so that the next token depends on the whole prompt: a wrong KV cache shows.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

VOCABULARY = 4096
SPECIAL = ["<s>", "</s>", "<pad>"]
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "


def _corpus() -> list[str]:
    """Return made-up text: enough syllables for a vocabulary, the same on every machine."""
    rng = random.Random(7)  # noqa: S311 -- text, no secret
    syllables = [a + b + c for a in "bcdfglmnprst" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(6000)]
    return [" ".join(rng.choices(words, k=60)) + "." for _ in range(1500)]


def make_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE tokenizer and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _config(kind: str) -> Any:
    common = {
        "max_position_embeddings": 16384,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    if kind == "tiny":
        return LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, **common,
        )  # fmt: skip
    if kind == "medium":  # half a billion parameters in the shape of a small Qwen, real vocabulary size included
        return Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, use_sliding_window=False, **common,
        )  # fmt: skip
    raise ValueError(f"the model must be tiny or medium, not {kind!r}")


def _spread(name: str, width: float) -> float:
    """Return the standard deviation of a parameter's weights."""
    if name.endswith("bias"):
        return 0.1
    if "embed_tokens" in name or "lm_head" in name:
        return 0.3
    if "q_proj" in name or "k_proj" in name:
        return math.sqrt(3.0 / width)
    return math.sqrt((4.0 if "o_proj" in name else 1.0) / width)


def make_model(directory: Path, kind: str = "tiny", seed: int = 0) -> Path:
    """Write a checkpoint in bfloat16 and its tokenizer; return the directory. Raises ValueError for another kind."""
    return write_model(directory, _config(kind), seed)


def write_model(
    directory: Path, config: Any, seed: int = 0, tune: Callable[[str, torch.Tensor], None] | None = None
) -> Path:
    """Write a checkpoint of the configuration's architecture; ``tune`` may change each parameter, given its name."""
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer(directory)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, _spread(name, float(parameter.shape[-1])))
            if tune is not None:
                tune(name, parameter)
    model.to(torch.bfloat16).save_pretrained(directory, safe_serialization=True)
    return directory


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), sys.argv[2])
