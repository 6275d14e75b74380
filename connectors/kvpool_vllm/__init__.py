"""kvpool as vLLM's KV connector.

Importing this package imports nothing else: vLLM's plugin loader runs in every one of its processes.
"""

LOGGER_NAME = "vllm.kvpool"
"""Below vLLM's own logger, the only one that its logging configuration shows."""
