"""Imports what engines import, so that whoever is forked afterwards has it."""

from __future__ import annotations

import contextlib
import gc
import importlib

MODULES = (
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.model_loader",
    "kvpool_vllm.connector",
    "kvpool_vllm.worker",
    "kvpool_vllm.testing",
)

for name in MODULES:
    with contextlib.suppress(ImportError):  # then it is imported by those who need it, and fails there
        importlib.import_module(name)

# Each engine collects garbage several times while it starts: not among a million objects that stay.
gc.collect()
gc.freeze()
