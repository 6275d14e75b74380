#!/bin/sh
# Starts one prefill engine: it finds prefixes in the pool, and stores there what it computes.
set -eu
name=prefill.sh
kv_transfer_config='{
  "kv_connector": "KVPoolConnector", "kv_role": "kv_producer",
  "kv_connector_extra_config": {"producer_is_to_load": true, "report_residency": true}}'
# shellcheck source=deploy/scripts/engine.sh
. "$(dirname "$0")/engine.sh"
