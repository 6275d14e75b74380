#!/bin/sh
# Regenerates kvpool/rpc/v1 from proto/. An old compiler on purpose: its output runs with every
# protobuf an engine may pin from 5.29 on. Usage: make proto
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv-proto
[ -x "$venv/bin/python" ] || { "$python" -m venv "$venv"; "$venv/bin/pip" install -q 'grpcio-tools==1.71.2' 'setuptools<81'; }
out=${1:-kvpool/rpc/v1}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$venv/bin/python" -m grpc_tools.protoc -I proto --python_out="$tmp" --pyi_out="$tmp" --grpc_python_out="$tmp" proto/kvpool/v1/*.proto
mkdir -p "$out"
for f in "$tmp"/kvpool/v1/*; do
    sed -e 's/^from kvpool\.v1 import/from kvpool.rpc.v1 import/' "$f" > "$out/$(basename "$f")"
done
rm -f "$out/types_pb2_grpc.py"
: > "$out/__init__.py"
