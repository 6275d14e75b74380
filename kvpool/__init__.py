"""kvpool: a KV-cache pool for LLM servers.

``kvpool.Client`` is the public entry point; it is imported on first use, so that ``import kvpool``
stays cheap and pulls in no gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpool.model import Namespace

if TYPE_CHECKING:
    from kvpool.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "Namespace", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from kvpool.client import Client

        return Client
    raise AttributeError(f"module 'kvpool' has no attribute {name!r}")
