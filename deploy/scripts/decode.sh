#!/bin/sh
# Starts one decode engine: it takes from the pool what prefill engines stored, and stores nothing.
set -eu
name=decode.sh
kv_transfer_config='{
  "kv_connector": "KVPoolConnector", "kv_role": "kv_consumer",
  "kv_connector_extra_config": {"consumer_is_to_load": true, "report_residency": true}}'
# shellcheck source=deploy/scripts/engine.sh
. "$(dirname "$0")/engine.sh"
