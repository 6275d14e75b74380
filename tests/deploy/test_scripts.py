"""Scripts: read by the shell and by shellcheck, and run with an engine that only notes how it was called."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy import files

SCRIPTS = sorted((files.DEPLOY / "scripts").glob("*.sh"))
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
ARGUMENTS = ["4,5", "10.0.0.2", "eth0", "9001", "2", "1", "0", "10.0.0.1", "13395"]
ENGINE = """#!/bin/sh
env > "$NOTES/env.$$"
printf '%s\\n' "$@" > "$NOTES/argv.$$.part"
mv "$NOTES/argv.$$.part" "$NOTES/argv.$$"
[ -z "${SERVE-}" ] || exec sleep 60
"""


def embedded():
    """Scripts within ConfigMaps."""
    for where, item in files.manifests():
        if item["kind"] == "ConfigMap":
            for name, text in item["data"].items():
                if name.endswith(".sh"):
                    yield pytest.param(text, id=f"{where}/{name}")


def shell_takes(text):
    return subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True, timeout=60, check=False)


def shellcheck(text):
    command = [str(SHELLCHECK), "-x", "-s", "sh", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True, timeout=60, check=False, cwd=files.ROOT)


ALL = [*(pytest.param(path.read_text(), id=files.named(path)) for path in SCRIPTS), *embedded()]


@pytest.mark.parametrize("text", ALL)
def test_scripts_are_clean(text):
    """`sh -n` reads them and shellcheck has nothing to say."""
    assert shell_takes(text).returncode == 0
    result = shellcheck(text)
    assert result.returncode == 0, result.stdout


def test_all_scripts_are_checked():
    """Ours and Kthena's."""
    assert len(SCRIPTS) == 4
    assert len(ALL) == 6
    assert shell_takes("if true; do").returncode != 0
    assert shellcheck("rm $1/x").returncode != 0


class Engine:
    """A `vllm` on the path that notes its arguments and environment, and ends or waits as it is told."""

    def __init__(self, folder):
        self.folder = folder
        program = folder / "vllm"
        program.write_text(ENGINE)
        program.chmod(0o755)
        self.env = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "NOTES": str(folder),
            "MODEL": "a-model",
            "KVPOOL_MASTER": "10.0.0.9:50088",
        }

    def run(self, script, *args, **env):
        """Run a script to its end; returns the process's result."""
        command = ["sh", str(files.DEPLOY / "scripts" / script), *args]
        return subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, timeout=60, check=False, cwd=self.folder
        )

    def calls(self):
        """Arguments and environment of each call, by port."""
        found = {}
        for path in self.folder.glob("argv.*"):
            if path.suffix == ".part":
                continue
            env = dict(
                line.split("=", 1)
                for line in path.with_name(f"env{path.suffix}").read_text().splitlines()
                if "=" in line
            )
            argv = path.read_text().split("\n")[:-1]
            found[value(argv, "--port")] = (argv, env)
        return found


def value(argv, flag):
    return argv[argv.index(flag) + 1]


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path)


@pytest.mark.parametrize(
    ("device", "variables"),
    [
        ("", {"CUDA_VISIBLE_DEVICES": "4,5", "NCCL_SOCKET_IFNAME": "eth0"}),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "4,5", "NCCL_SOCKET_IFNAME": "eth0"}),
        ("ascend", {"ASCEND_RT_VISIBLE_DEVICES": "4,5", "HCCL_IF_IP": "10.0.0.2", "HCCL_SOCKET_IFNAME": "eth0"}),
        ("cpu", {"VLLM_CPU_OMP_THREADS_BIND": "4|5"}),
    ],
)
@pytest.mark.parametrize(("script", "role"), [("prefill.sh", "kv_producer"), ("decode.sh", "kv_consumer")])
def test_one_variable_chooses_the_device(engine, script, role, device, variables):
    """The engine gets its devices, network and role, and what stands behind the ninth argument."""
    given = {"DEVICE": device} if device else {}
    result = engine.run(script, *ARGUMENTS, "--max-model-len", "17000", **given)
    assert result.returncode == 0, result.stderr
    argv, env = engine.calls()["9001"]
    assert argv[:2] == ["serve", "a-model"]
    assert value(argv, "--tensor-parallel-size") == "2"
    assert argv[-2:] == ["--max-model-len", "17000"]
    assert not any(arg.startswith("--data-parallel") for arg in argv)
    assert variables.items() <= env.items()
    assert (env["GLOO_SOCKET_IFNAME"], env["VLLM_HOST_IP"]) == ("eth0", "10.0.0.2")
    assert env["KVPOOL_MASTER"] == "10.0.0.9:50088"
    config = json.loads(("\n".join(argv)).partition("--kv-transfer-config\n")[2].partition("\n--max")[0])
    assert (config["kv_connector"], config["kv_role"]) == ("KVPoolConnector", role)
    assert env["KVPOOL_ENGINE_ADDRESS"] == "10.0.0.2:9001"


def test_the_port_of_a_transfer_connector_is_left_out(engine):
    """Callers of the other guides' scripts give a tenth argument."""
    assert engine.run("prefill.sh", *ARGUMENTS, "20001", "--enforce-eager").returncode == 0
    argv, _ = engine.calls()["9001"]
    assert argv[-1] == "--enforce-eager"
    assert "20001" not in argv


@pytest.mark.parametrize(
    ("args", "env", "says"),
    [
        (ARGUMENTS[:8], {}, "nine arguments"),
        (ARGUMENTS, {"DEVICE": "tpu"}, "cuda, ascend or cpu"),
        (["0,1,2", *ARGUMENTS[1:]], {"DEVICE": "cpu"}, "equal shares"),
        (ARGUMENTS, {"MODEL": ""}, "MODEL"),
        (ARGUMENTS, {"KVPOOL_MASTER": ""}, "KVPOOL_MASTER"),
    ],
)
def test_what_is_missing_is_named(engine, args, env, says):
    """No engine is started; the message says what is wrong and how the script is called."""
    result = engine.run("decode.sh", *args, **env)
    assert result.returncode == 2
    assert says in result.stderr
    assert "usage:" in result.stderr
    assert engine.calls() == {}


GROUP = {"LOCAL_IP": "10.0.0.2", "NIC_NAME": "eth0", "DP_ADDRESS": "10.0.0.1", "DP_RANK_START": "2", "TP_SIZE": "2",
         "DP_SIZE": "5", "DP_SIZE_LOCAL": "3", "DEVICES_PER_HOST": "6"}  # fmt: skip


def waits_for(engine, count):
    deadline = time.monotonic() + 60
    while len(engine.calls()) < count:
        assert time.monotonic() < deadline, "the engines were not started"
        time.sleep(0.02)


def start_group(engine, *args, **env):
    return subprocess.Popen(
        ["sh", str(files.DEPLOY / "scripts/run_multi_dp.sh"), *args],
        env=engine.env | GROUP | {"SERVE": "1"} | env,
        cwd=engine.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_group_has_ranks_ports_and_devices_of_its_own(engine):
    """Three of five engines on this host: ranks from the first one on, ports in a row, an equal share of devices."""
    script = start_group(engine, "--enable-expert-parallel")
    waits_for(engine, 3)
    script.terminate()
    script.wait(timeout=60)
    calls = engine.calls()
    seen = {
        port: (value(argv, "--data-parallel-rank"), env["CUDA_VISIBLE_DEVICES"]) for port, (argv, env) in calls.items()
    }
    assert seen == {"9000": ("2", "0,1"), "9001": ("3", "2,3"), "9002": ("4", "4,5")}
    for argv, _ in calls.values():
        assert value(argv, "--data-parallel-size") == "5"
        assert value(argv, "--data-parallel-address") == "10.0.0.1"
        assert value(argv, "--data-parallel-rpc-port") == "13395"
        assert argv[-1] == "--enable-expert-parallel"


def test_engines_on_their_own_have_no_ranks(engine):
    """VLLM refuses ranks where a model has no experts: a group of one is no group, however many are on this host."""
    script = start_group(engine, DP_SIZE="1")
    waits_for(engine, 3)
    script.terminate()
    script.wait(timeout=60)
    assert sorted(engine.calls()) == ["9000", "9001", "9002"]
    assert not any(arg.startswith("--data-parallel") for argv, _ in engine.calls().values() for arg in argv)


def test_a_group_needs_a_device_for_each_engine(engine):
    """Zero devices each would give all of them all devices."""
    result = engine.run("run_multi_dp.sh", **GROUP | {"DEVICES_PER_HOST": "2"})
    assert result.returncode == 2
    assert "too few" in result.stderr


def pids(engine):
    return [int(path.suffix[1:]) for path in engine.folder.glob("argv.*")]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_group_ends_with_its_script(engine):
    """SIGTERM reaches every engine, and the script waits for them."""
    script = start_group(engine)
    waits_for(engine, 3)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=60) == 143
    assert all(map(gone, pids(engine)))


def test_a_group_ends_with_one_of_its_engines(engine):
    """An engine that dies takes the others along: without it they only wait."""
    script = start_group(engine)
    waits_for(engine, 3)
    os.kill(pids(engine)[1], signal.SIGKILL)
    assert script.wait(timeout=60) == 137
    assert all(map(gone, pids(engine)))
