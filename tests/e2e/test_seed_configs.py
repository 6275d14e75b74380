"""The ``--kv-transfer-config`` of AscendStore, Mooncake Store and UCM guides, on real engines and a real pool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, EngineProcess, Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Answer

BLOCKS = 6
PROMPT = BLOCKS * BLOCK_TOKENS + 5
UCM_MODULE = "ucm.integration.vllm.ucm_connector"
ASCEND = {"ASCEND_BUFFER_POOL": "4:8", "ASCEND_CONNECT_TIMEOUT": "10000", "ASCEND_TRANSFER_TIMEOUT": "10000"}

DOCUMENT = (ROOT / "docs" / "connector.md").read_text()
DOCUMENTED = re.findall(r"--kv-transfer-config '(.*?)'", DOCUMENT, re.DOTALL)

UCM_FILE = """
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "/mnt/test1"
      cache_buffer_capacity_gb: 64
enable_event_sync: true
use_layerwise: false
"""

pytestmark = pytest.mark.timeout(300)


class Engines(EngineProcess):
    """Engines one after another in one process, since most of a start is importing."""

    def __init__(self, model: Path) -> None:
        # A lookup may take its time on a busy machine, and a tiny model computes faster than anybody loads.
        patient = {"KVPOOL_LOOKUP_TIMEOUT": "5s", "KVPOOL_GATE": "off"}
        heard = {"VLLM_CONFIGURE_LOGGING": "0"}  # which takes our handler away
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.seed_engines", str(model)],
            cwd=ROOT,
            env={**os.environ, **patient, **heard},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self._up = False
        self.answered = 0

    def generate(self, prompt: list[int], tokens: int = 4) -> Answer:
        self.answered += 1
        return super().generate(prompt, tokens)

    def start(self, config: dict[str, Any], environment: dict[str, str], **arguments: Any) -> dict[str, Any]:
        """Start one; return what it said."""
        answer: dict[str, Any] = self.ask(
            "start", config=json.dumps(config), environment=environment, arguments=arguments
        )
        return answer

    def stop(self) -> None:
        """End it."""
        self.ask("stop")


@dataclass
class Stage:
    """A pool that holds one prompt's blocks, and engines to be started on it."""

    pool: Pool
    engines: Engines
    prompts: Prompts
    environment: dict[str, str]
    ucm_file: Path
    known: list[int]
    answer: Answer
    blocks: int
    """In the pool."""

    def check(self, config: dict[str, Any], *, loads: bool, saves: bool, **arguments: Any) -> dict[str, Any]:
        """Start an engine; see what it does with a prompt that the pool knows, and with one that it does not."""
        said = self.engines.start(config, self.environment, **arguments)
        try:
            answer = self.engines.generate(self.known)
            assert answer.tokens == self.answer.tokens
            assert answer.cached == (BLOCKS * BLOCK_TOKENS if loads else 0), self.engines.ask("state")
            self.engines.generate(self.prompts.random(PROMPT))
            if saves:
                self.blocks += BLOCKS
                self.pool.wait_blocks(self.blocks)
        finally:
            self.engines.stop()
        # Had this engine stored anything else, the node would have told the master by now or by the next test.
        assert self.pool.control("status")["blocks"] == self.blocks
        return said


@pytest.fixture(scope="module")
def stage(pool: Pool, model: Path, prompts: Prompts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Return engines that know the pool by a ``mooncake.json``, as all of the guides have it."""
    folder = tmp_path_factory.mktemp("seeds")
    mooncake = {
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "ascend",
        "device_name": "",
        "master_server_address": pool.address,
        "global_segment_size": "1GB",
    }
    (folder / "mooncake.json").write_text(json.dumps(mooncake))
    (folder / "ucm.yaml").write_text(UCM_FILE)
    environment = {**ASCEND, "MOONCAKE_CONFIG_PATH": str(folder / "mooncake.json")}
    engines = Engines(model)
    try:
        engines.start({"kv_connector": "KVPoolConnector", "kv_role": "kv_both"}, environment)
        known, answer = prompts.clear(engines, PROMPT)
        engines.stop()
        blocks = engines.answered * BLOCKS
        pool.wait_blocks(blocks)
        yield Stage(pool, engines, prompts, environment, folder / "ucm.yaml", known, answer, blocks)
    finally:
        engines.close()


def ignored(said: dict[str, Any]) -> set[str]:
    """Return the keys that were named as having no effect; each only once."""
    keys = [line.partition(" is not used: ")[0].split()[-1] for line in said["heard"] if " is not used: " in line]
    assert len(keys) == len(set(keys))
    return set(keys)


def test_colocated_mooncake_store(stage: Stage) -> None:
    """The colocated guide's configuration, with its mooncake.json and variables."""
    config = {
        "kv_connector": "MooncakeConnectorStoreV1",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "use_layerwise": False,
            "mooncake_rpc_port": "0",
            "load_async": True,
            "register_buffer": True,
        },
    }
    said = stage.check(config, loads=True, saves=True)
    assert said["connector"] == "KVPoolConnector"
    assert said["recomputes"]
    assert ignored(said) == {"ASCEND_BUFFER_POOL", "mooncake_rpc_port", "register_buffer"}


def test_colocated_ascend_store(stage: Stage) -> None:
    """The store guide's colocation scenario."""
    config = {
        "kv_connector": "AscendStoreConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lookup_rpc_port": "1", "backend": "mooncake"},
    }
    assert ignored(stage.check(config, loads=True, saves=True)) == {"ASCEND_BUFFER_POOL", "lookup_rpc_port", "backend"}


def multi(role: str, folder: Path, child: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of the guides' shape: a connector that moves KV between two engines, and the store.

    vLLM's example connector stands for the first, which needs devices.
    """
    first = {
        "kv_connector": "ExampleConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"connectors": [first, child]},
    }


@pytest.mark.parametrize("told", [False, True])
def test_producer_in_multi_connector(stage: Stage, tmp_path: Path, told: bool) -> None:
    """The store guide's prefill node: it saves, and loads if told to."""
    extra = {"lookup_rpc_port": "0", "backend": "mooncake"} | ({"producer_is_to_load": True} if told else {})
    child = {"kv_connector": "AscendStoreConnector", "kv_role": "kv_producer", "kv_connector_extra_config": extra}
    said = stage.check(multi("kv_producer", tmp_path, child), loads=told, saves=True)
    assert said["connector"] == "MultiConnector"
    assert said["recomputes"]
    assert any("to load: producer_is_to_load" in line for line in said["heard"]) is not told


@pytest.mark.parametrize(
    ("extra", "loads", "saves"),
    [({}, False, False), ({"consumer_is_to_load": True}, True, False), ({"consumer_is_to_put": True}, False, True)],
)
def test_consumer_in_multi_connector(
    stage: Stage, tmp_path: Path, extra: dict[str, Any], loads: bool, saves: bool
) -> None:
    """The store guide's decode node: it does what it is told to."""
    extra = {"lookup_rpc_port": "0", "backend": "mooncake", **extra}
    child = {"kv_connector": "AscendStoreConnector", "kv_role": "kv_consumer", "kv_connector_extra_config": extra}
    stage.check(multi("kv_consumer", tmp_path, child), loads=loads, saves=saves)


def test_ucm_in_multi_connector(stage: Stage, tmp_path: Path) -> None:
    """The UCM guide's prefill node: a module path of a package that is not installed, and UCM's file."""
    child = {
        "kv_connector": "UCMConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": UCM_MODULE,
        "kv_connector_extra_config": {"UCM_CONFIG_FILE": str(stage.ucm_file)},
    }
    said = stage.check(multi("kv_producer", tmp_path, child), loads=True, saves=True)
    assert said["recomputes"]
    assert {"ucm_connector_name", "enable_event_sync"} <= ignored(said)
    assert sum("for kvpool-node, which this engine does not start" in line for line in said["heard"]) == 1


def mover(role: str, **more: Any) -> dict[str, Any]:
    """Return MooncakeConnectorV1 as the guides have it."""
    sides = {"prefill": {"dp_size": 1, "tp_size": 1}, "decode": {"dp_size": 1, "tp_size": 1}}
    extra = {"use_ascend_direct": True, **sides} if role == "kv_producer" else sides
    config = {"kv_connector": "MooncakeConnectorV1", "kv_role": role, "kv_port": "20001"}
    return config | {"kv_connector_extra_config": extra} | more


@pytest.mark.parametrize(
    ("role", "extra", "loads"),
    [("kv_producer", {}, False), ("kv_consumer", {"consumer_is_to_load": True}, True)],
)
def test_store_guide_as_it_is(stage: Stage, role: str, extra: dict[str, Any], loads: bool) -> None:
    """Both connectors of its MultiConnector are ours: the first moves prompts, the second is the store."""
    child = {"kv_connector": "AscendStoreConnector", "kv_role": role,
             "kv_connector_extra_config": {"lookup_rpc_port": "0", "backend": "mooncake", **extra}}  # fmt: skip
    config = {"kv_connector": "MultiConnector", "kv_role": role,
              "kv_connector_extra_config": {"connectors": [mover(role), child]}}  # fmt: skip
    said = stage.check(config, loads=loads, saves=role == "kv_producer")
    assert said["connector"] == "MultiConnector"
    assert said["recomputes"]
    assert {"kv_port", "prefill.dp_size", "lookup_rpc_port"} <= {
        line.partition(" is not used: ")[0].split()[-1] for line in said["heard"]
    }


def test_ucm_guide_decodes_as_it_is(stage: Stage) -> None:
    """A connector that moves prompts alone: it neither looks anything up nor stores what is nobody's transfer."""
    said = stage.check(mover("kv_consumer"), loads=False, saves=False)
    assert said["connector"] == "KVPoolConnector"
    assert not any("neither loads nor saves" in line for line in said["heard"])


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_kthena_as_it_is(stage: Stage, role: str) -> None:
    """With a module path of a package that is not installed, and the engine's own cache off: hashes are there."""
    path = {"kv_connector_module_path": "vllm_ascend.distributed.mooncake_connector", "engine_id": "group_0"}
    saves = role == "kv_producer"
    said = stage.check(mover(role, **path), loads=False, saves=saves, enable_prefix_caching=False)
    assert said["connector"] == "KVPoolConnector"


def test_own_module_path_gives_every_name(stage: Stage) -> None:
    """With it a name is ours even where vLLM has its own; the role alone, without MultiConnector."""
    config = {
        "kv_connector": "MooncakeStoreConnector",
        "kv_role": "kv_consumer",
        "kv_connector_module_path": "kvpool_vllm.connector",
        "kv_connector_extra_config": {"consumer_is_to_load": True},
    }
    assert stage.check(config, loads=True, saves=False)["connector"] == "KVPoolConnector"


@pytest.mark.parametrize("text", DOCUMENTED)
def test_documented_commands(stage: Stage, tmp_path: Path, text: str) -> None:
    """Each configuration of the document, with its folder and its master in other places."""
    config = json.loads(text.replace("/mnt/example", str(tmp_path)).replace("10.0.0.1:50088", stage.pool.address))
    children = config["kv_connector_extra_config"].get("connectors", [config])
    mine = next(child for child in children if child["kv_connector"] == "KVPoolConnector")
    told = any(mine["kv_connector_extra_config"].get(f"{side}_is_to_load") for side in ("producer", "consumer"))
    stage.check(config, loads=told or mine["kv_role"] == "kv_both", saves=mine["kv_role"] != "kv_consumer")


def test_keys_of_older_versions(stage: Stage) -> None:
    """Top-level keys of the rank-table guide, one of which vLLM itself would refuse; the role alone."""
    config = {
        "kv_connector": "KVPoolConnector",
        "kv_buffer_device": "npu",
        "kv_role": "kv_producer",
        "kv_parallel_size": 1,
        "kv_port": "20001",
        "engine_id": "0",
    }
    said = stage.check(config, loads=False, saves=True)
    assert ignored(said) == {"ASCEND_BUFFER_POOL", "kv_buffer_device", "kv_parallel_size", "kv_port"}


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_rank_table_guide_as_it_is(stage: Stage, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """LLMDataDist's command line; the rank table is named as something that nobody needs."""
    config = {
        "kv_connector": "LLMDataDistCMgrConnector",
        "kv_buffer_device": "npu",
        "kv_role": role,
        "kv_parallel_size": 1,
        "kv_port": "20001",
        "engine_id": "0",
        "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector",
    }
    monkeypatch.setitem(stage.environment, "DISAGGREGATED_PREFILL_RANK_TABLE_PATH", "/ranktable.json")
    said = stage.check(config, loads=False, saves=role == "kv_producer", enable_prefix_caching=False)
    # What vLLM itself would refuse is named once in a process, in the test before.
    assert ignored(said) - {"kv_parallel_size"} == {
        "ASCEND_BUFFER_POOL", "DISAGGREGATED_PREFILL_RANK_TABLE_PATH", "kv_buffer_device", "kv_port",
    }  # fmt: skip
