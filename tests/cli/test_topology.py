"""kvpoolctl topology against a master that answers from a script, and rank tables made of flags alone."""

import json
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import grpc
import pytest
from click.testing import CliRunner

from kvpool.cli.ctl import command
from kvpool.model import Namespace
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, master_pb2, master_pb2_grpc, types_pb2

USED, UNUSED = Namespace(model="used", layers=2), Namespace(model="unused")


def node(name, host, state):
    address = types_pb2.NodeAddress(
        node_id=name, host=host, port=700, socket_path=f"/run/kvpool/{name}.sock", boot_id="x"
    )
    return admin_pb2.NodeStatus(
        address=address, state=state, capacity_bytes=1 << 30, used_bytes=1 << 20, blocks=5, last_seen_s=0.5, epoch=1
    )


def engine(role, address, devices=(), **more):
    said = master_pb2.EngineAnnouncement(
        owner=1, engine=f"e-{role}", role=role, address=address, model="m", tensor_parallel=2, pipeline_parallel=1,
        host="h", boot_id="x", devices=devices, **more,
    )  # fmt: skip
    return master_pb2.EngineStatus(engine=said, last_seen_s=0.5, blocks=7)


class FakeMaster(admin_pb2_grpc.AdminServicer, master_pb2_grpc.MasterServicer):
    """Knows three nodes on two live hosts, engines, two namespaces and a backend."""

    engines = (
        engine("kv_consumer", "10.0.0.2:8100", ["4,29.0.0.4", "5"]),
        engine("kv_producer", "10.0.0.1:8100", ["0,29.0.0.1", "1,29.0.0.2"], transfers=True, namespaces=[b"\2" * 16]),
        engine("kv_both", "", ["7"], residency=True),
    )
    nodes = (node("b", "10.0.0.8", "live"), node("a", "10.0.0.7", "live"), node("c", "10.0.0.9", "dead"))

    def Status(self, request, context):  # noqa: N802  # the generated base class names it
        backend = admin_pb2.BackendStatus(
            id=b"\1" * 16,
            url="/mnt/kv",
            state=types_pb2.Backend.READ_ONLY,
            servers=[admin_pb2.BackendStatus.Server(node="b"), admin_pb2.BackendStatus.Server(node="a")],
        )
        return admin_pb2.StatusResponse(
            version="1.2.3", master_epoch=0xFEED, uptime_s=90, engines=2, engine_blocks=40, backends=[backend]
        )

    def Engines(self, request, context):  # noqa: N802
        return master_pb2.EnginesResponse(engines=self.engines)

    def Nodes(self, request, context):  # noqa: N802
        return admin_pb2.NodesResponse(nodes=self.nodes)

    def Namespaces(self, request, context):  # noqa: N802
        return admin_pb2.NamespacesResponse(
            namespaces=[
                admin_pb2.NamespaceStatus(
                    digest=space.digest, descriptor=types_pb2.NamespaceDescriptor(**space.as_dict()), blocks=blocks
                )
                for space, blocks in ((USED, 3), (UNUSED, 0))
            ]
        )


@pytest.fixture
def master():
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        fake = FakeMaster()
        admin_pb2_grpc.add_AdminServicer_to_server(fake, server)
        master_pb2_grpc.add_MasterServicer_to_server(fake, server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield fake
        server.stop(grace=None).wait(timeout=10)


def run(*args):
    return CliRunner().invoke(command, args)


def test_topology_is_what_the_master_knows(master):
    """Nodes and engines with addresses, namespaces in use, backends with who serves them."""
    result = run("topology", "--master", master.address)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["master"] == {
        "address": master.address,
        "version": "1.2.3",
        "epoch": "000000000000feed",
        "uptime_s": 90,
    }
    assert [(n["node_id"], n["state"], n["host"], n["port"], n["socket_path"]) for n in data["nodes"]] == [
        ("a", "live", "10.0.0.7", 700, "/run/kvpool/a.sock"),
        ("b", "live", "10.0.0.8", 700, "/run/kvpool/b.sock"),
        ("c", "dead", "10.0.0.9", 700, "/run/kvpool/c.sock"),
    ]
    assert [one["address"] for one in data["engines"]] == ["", "10.0.0.1:8100", "10.0.0.2:8100"]
    assert data["engines"][1] == {
        "engine_id": "e-kv_producer", "address": "10.0.0.1:8100", "role": "prefill", "model": "m",
        "tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel_rank": 0, "host": "h", "boot_id": "x",
        "devices": ["0,29.0.0.1", "1,29.0.0.2"], "namespaces": ["02" * 16], "transfers": True, "layerwise": False,
        "loads": False, "reports_residency": False, "blocks": 7, "last_seen_s": 0.5,
    }  # fmt: skip
    assert [item["descriptor"]["model"] for item in data["namespaces"]] == ["used"]
    backend = {"id": str(UUID("01" * 16)), "url": "/mnt/kv", "state": "read_only", "nodes": ["a", "b"]}
    assert data["backends"] == [backend]


def test_the_rank_table_of_live_engines(master):
    """Their devices by role; who names none, or does both, is left out and named on stderr."""
    result = run("topology", "--ranktable", "--master", master.address)
    assert result.exit_code == 0, result.output
    keys = ("server_id", "device_id", "device_ip", "cluster_id")
    prefill = [("10.0.0.1", "0", "29.0.0.1", "1"), ("10.0.0.1", "1", "29.0.0.2", "2")]
    decode = [("10.0.0.2", "4", "29.0.0.4", "3"), ("10.0.0.2", "5", "", "4")]
    assert json.loads(result.stdout) == {
        "version": "1.2",
        "server_count": "2",
        "prefill_device_list": [dict(zip(keys, entry, strict=True)) for entry in prefill],
        "decode_device_list": [dict(zip(keys, entry, strict=True)) for entry in decode],
        "status": "completed",
    }
    assert result.stderr.startswith("left out: e-kv_both:")


def test_a_rank_table_without_devices_is_not_completed(master):
    """Engines on CPUs have none; the host stands for the address where that is not known."""
    master.engines = (engine("kv_producer", "", ["0"]), engine("kv_consumer", "10.0.0.2:8100"))
    table = json.loads(run("topology", "--ranktable", "--master", master.address).stdout)
    assert table["status"] == "initializing"
    assert table["server_count"] == "1"
    assert [entry["server_id"] for entry in table["prefill_device_list"]] == ["h"]
    assert table["decode_device_list"] == []


def test_engines_as_a_table(master):
    """What a person wants to know of each, and whatever is in a name stays text."""
    result = run("engines", "--master", master.address)
    assert result.exit_code == 0, result.output
    for words in ("10.0.0.1:8100", "prefill", "tp 2, pp 1, dp rank 0", "whole", "not known", "not told", "0.5 s ago"):
        assert words in result.stdout
    data = json.loads(run("engines", "--json", "--master", master.address).stdout)
    assert [one["role"] for one in data["engines"]] == ["both", "prefill", "decode"]


def test_no_engine_is_exit_code_1(master):
    """With a word on how one gets there."""
    master.engines = ()
    result = run("engines", "--master", master.address)
    assert result.exit_code == 1
    assert "connector" in result.stdout
    assert json.loads(run("engines", "--json", "--master", master.address).stdout) == {"engines": []}


@pytest.mark.parametrize("table", [[], ["--ranktable"]])
def test_a_pool_without_live_nodes_is_exit_code_1(master, table):
    """Scripts that wait for a pool can tell."""
    master.nodes = (node("c", "10.0.0.9", "dead"),)
    assert run("topology", *table, "--master", master.address).exit_code == 1


# ---- ranktable -------------------------------------------------------------------------------------

THREE = ("--ips", "192.0.0.1", "192.0.0.2", "192.0.0.3", "--npus-per-node", "2", "--network-card-name", "eth0",
         "--prefill-device-cnt", "2", "--decode-device-cnt", "4")  # fmt: skip
ONE_PREFILL_TWO_DECODE = """\
{
  "version": "1.2",
  "server_count": "3",
  "prefill_device_list": [
    {
      "server_id": "192.0.0.1",
      "device_id": "0",
      "device_ip": "29.0.1.0",
      "cluster_id": "1"
    },
    {
      "server_id": "192.0.0.1",
      "device_id": "1",
      "device_ip": "29.0.1.1",
      "cluster_id": "2"
    }
  ],
  "decode_device_list": [
    {
      "server_id": "192.0.0.2",
      "device_id": "6",
      "device_ip": "29.0.2.6",
      "cluster_id": "3"
    },
    {
      "server_id": "192.0.0.2",
      "device_id": "7",
      "device_ip": "29.0.2.7",
      "cluster_id": "4"
    },
    {
      "server_id": "192.0.0.3",
      "device_id": "6",
      "device_ip": "29.0.3.6",
      "cluster_id": "5"
    },
    {
      "server_id": "192.0.0.3",
      "device_id": "7",
      "device_ip": "29.0.3.7",
      "cluster_id": "6"
    }
  ],
  "status": "completed"
}
"""


def hccn(tmp_path, host, addresses):
    path = tmp_path / f"{host}.conf"
    path.write_text("".join(f"address_{n}={ip}\nnetmask_{n}=255.255.0.0\n" for n, ip in addresses.items()))
    return f"192.0.0.{host}={path}"


def test_one_prefill_and_two_decode_hosts(tmp_path):
    """The three hosts of the LLMDataDist guide: two devices each, 0 and 1 for prefill, 6 and 7 for decode."""
    files = [
        hccn(tmp_path, 1, {0: "29.0.1.0", 1: "29.0.1.1", 6: "29.0.1.6"}),
        hccn(tmp_path, 2, {6: "29.0.2.6", 7: "29.0.2.7"}),
        hccn(tmp_path, 3, {6: "29.0.3.6", 7: "29.0.3.7"}),
    ]
    result = run("ranktable", *THREE, "--local-device-ids", "0,1", "6,7", "6,7", "--hccn-conf", *files)
    assert result.exit_code == 0, result.output
    assert result.stdout == ONE_PREFILL_TWO_DECODE
    assert result.stderr == ""


def test_a_list_may_begin_behind_an_equals_sign():
    """--ips=A B is --ips A B."""
    counts = ("--prefill-device-cnt", "2", "--decode-device-cnt", "2", "--npus-per-node=2")
    one = run("ranktable", "--ips=10.0.0.1", "10.0.0.2", *counts)
    other = run("ranktable", "--ips", "10.0.0.1", "10.0.0.2", *counts)
    assert one.exit_code == 0, one.output
    assert json.loads(one.stdout) == json.loads(other.stdout)


def test_one_list_of_devices_is_for_every_host():
    """--local-device-ids as in the guide, once; addresses that nobody told are empty, and stderr says so."""
    result = run("ranktable", *THREE, "--local-device-ids", "6,7")
    table = json.loads(result.stdout)
    devices = table["prefill_device_list"] + table["decode_device_list"]
    assert [(d["server_id"], d["device_id"]) for d in devices] == [
        (f"192.0.0.{host}", str(device)) for host in (1, 2, 3) for device in (6, 7)
    ]
    assert {d["device_ip"] for d in devices} == {""}
    assert "device_ip of 6 devices is empty" in result.stderr


def test_without_a_list_all_devices_are_used_in_order():
    """Prefill takes the first ones, decode the next, and what is left stays out."""
    result = run("ranktable", "--ips", "10.0.0.1,10.0.0.2", "--prefill_device_cnt", "3", "--decode_device_cnt", "6")
    table = json.loads(result.stdout)
    assert table["server_count"] == "2"
    assert [d["device_id"] for d in table["prefill_device_list"]] == ["0", "1", "2"]
    decode = [(d["server_id"], d["device_id"], d["cluster_id"]) for d in table["decode_device_list"]]
    assert decode[0] == ("10.0.0.1", "3", "4")
    assert decode[-1] == ("10.0.0.2", "0", "9")


@pytest.mark.parametrize(
    ("changed", "flag", "allowed"),
    [
        (("--ips", "192.0.0.1", "host-two"), "--ips", "IP addresses"),
        (("--ips", "192.0.0.1", "192.0.0.1"), "--ips", "once"),
        (("--npus-per-node", "0"), "--npus-per-node", "1<=x"),
        (("--npus-per-node", "two"), "--npus-per-node", "integer"),
        (("--network-card-name", "eth0/1"), "--network-card-name", "15 characters"),
        (("--prefill-device-cnt", "-1"), "--prefill-device-cnt", "x>=0"),
        (("--prefill-device-cnt", "3"), "--prefill-device-cnt", "1 to 6"),
        (("--local-device-ids", "0,0"), "--local-device-ids", "different numbers"),
        (("--local-device-ids", "0-1"), "--local-device-ids", "for example 0,1"),
        (("--local-device-ids", "0,1,2"), "--local-device-ids", "up to 2"),
        (("--local-device-ids", "0,1", "6,7"), "--local-device-ids", "one, or 3"),
        (("--hccn-conf", "192.0.0.1=/nowhere/hccn.conf"), "--hccn-conf", "/nowhere/hccn.conf"),
        (("--hccn-conf", "192.0.0.4=/etc/hostname"), "--hccn-conf", "one of --ips"),
    ],
)
def test_bad_input_names_the_flag_and_what_is_allowed(changed, flag, allowed):
    """Exit code 2, and one line that says what to write instead."""
    args = list(THREE)
    if changed[0] in args:
        at = args.index(changed[0])
        until = next((i for i in range(at + 1, len(args)) if args[i].startswith("--")), len(args))
        del args[at:until]
    result = run("ranktable", *args, *changed)
    assert result.exit_code == 2
    assert flag in result.stderr
    assert allowed in result.stderr


def test_a_file_without_addresses_is_refused(tmp_path):
    """A file of another kind is no hccn.conf of a host without devices."""
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 localhost\n")
    result = run("ranktable", *THREE, "--hccn-conf", f"192.0.0.1={path}")
    assert result.exit_code == 2
    assert "address_0" in result.stderr
