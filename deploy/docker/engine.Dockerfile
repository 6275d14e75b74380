# An engine's image with the connector in it; the engine keeps its own pins. From the checkout's root:
#   docker build -f deploy/docker/engine.Dockerfile -t kvpool-vllm:0.1.0 .
#   docker build -f deploy/docker/engine.Dockerfile -t kvpool-vllm-ascend:0.1.0 \
#     --build-arg BASE=quay.io/ascend/vllm-ascend:TAG .      # of vLLM 0.32 or later: the connector needs that
ARG BASE=vllm/vllm-openai:v0.32.0
FROM $BASE
COPY pyproject.toml README.md LICENSE /tmp/kvpool/
COPY kvpool /tmp/kvpool/kvpool
COPY connectors /tmp/kvpool/connectors
RUN python3 -m pip install --no-cache-dir /tmp/kvpool && rm -rf /tmp/kvpool
