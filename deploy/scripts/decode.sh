#!/bin/sh
# Starts one decode engine: it loads from the pool what prefill engines stored, and stores nothing.
set -eu
name=decode.sh
# Its id is the address that it serves at: so kvpool-proxy knows whose cache the pool tells of.
kv_transfer_config='{
  "kv_connector": "KVPoolConnector", "kv_role": "kv_consumer", "engine_id": "'"${2-}:${4-}"'",
  "kv_connector_extra_config": {"consumer_is_to_load": true, "report_residency": true}}'
# shellcheck source=deploy/scripts/engine.sh
. "$(dirname "$0")/engine.sh"
