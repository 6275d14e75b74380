"""Registers the connector's name with vLLM; the entry point of group ``vllm.general_plugins``."""

from __future__ import annotations


def register() -> None:
    """Make ``kv_connector: KVPoolConnector`` known, without importing the connector itself.

    vLLM calls this in each of its processes, some of which fork later: nothing here may start gRPC.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector("KVPoolConnector", "kvpool_vllm.connector", "KVPoolConnector")
    except ValueError:
        return  # a second call in the same process; vLLM refuses a name it already has
