"""kvpoolctl against a master that answers from a script, over a real socket on loopback."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import grpc
import pytest
from click.testing import CliRunner

from kvpool.cli.ctl import command
from kvpool.cli.printers import print_table
from kvpool.model import Namespace
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, master_pb2, types_pb2

ONE, TWO = Namespace(model="one"), Namespace(model="two", layers=2)
KEYS = [bytes([n]) * 32 for n in range(4)]
HEX = ",".join(key.hex() for key in KEYS)
PACKED = b"".join(key[:16] for key in KEYS)
Block = admin_pb2.ExplainedBlock
BACKEND = str(UUID("ab" * 16))
FILE_OWNER = master_pb2.LookupResponse.Owner(node=0, tier="fs", shards=b"\x01", backend=b"\xab" * 16)


class FakeMaster(admin_pb2_grpc.AdminServicer):
    """Answers what its fields hold, and remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.abort = None
        self.status = admin_pb2.StatusResponse(
            version="1.2.3",
            master_epoch=0xFEED,
            uptime_s=90,
            blocks=7,
            nodes_live=1,
            nodes_known=2,
            capacity_bytes=1 << 30,
            used_bytes=1 << 20,
            counters={"lookups": 12},
            settings={"port": "50088"},
        )
        self.nodes = [
            admin_pb2.NodeStatus(
                address=types_pb2.NodeAddress(node_id="b", host="10.0.0.8", port=700, socket_path="/run/x.sock"),
                state="live",
                capacity_bytes=1 << 30,
                used_bytes=1 << 29,
                blocks=5,
                last_seen_s=0.25,
                epoch=1,
            ),
            admin_pb2.NodeStatus(address=types_pb2.NodeAddress(node_id="a"), state="dead", last_seen_s=4000),
        ]
        self.namespaces = [
            admin_pb2.NamespaceStatus(
                digest=space.digest,
                descriptor=types_pb2.NamespaceDescriptor(**space.as_dict()),
                blocks=3,
                bytes=3 << 20,
            )
            for space in (ONE, TWO)
        ]
        self.lookup = master_pb2.LookupResponse(
            prefix=3,
            reason=master_pb2.LookupResponse.NOT_WHOLE,
            nodes=[types_pb2.NodeAddress(node_id="a"), types_pb2.NodeAddress(node_id="b")],
            runs=[
                master_pb2.LookupResponse.Run(
                    blocks=2, owners=[master_pb2.LookupResponse.Owner(node=1, tier="dram", shards=b"\x05")]
                ),
                master_pb2.LookupResponse.Run(blocks=1, owners=[FILE_OWNER]),
            ],
        )
        self.evicted = admin_pb2.EvictBlocksResponse(blocks=4, bytes=4096)
        self.explained = [
            Block(
                verdict=Block.PRESENT,
                namespace=ONE.digest,
                holders=[Block.Holder(name="b", tier="dram", state="live", shards=[0, 1])],
                leases=2,
                last_use_s=90,
            ),
            Block(
                verdict=Block.EVICTED,
                namespace=ONE.digest,
                removals=[Block.Removal(why=Block.Removal.ROOM, node="b", age_s=7)],
                holders=[Block.Holder(name="engine[red]", tier="hbm")],
            ),
            Block(
                verdict=Block.NAMESPACE_DIFFERS,
                namespace=ONE.digest,
                other=TWO.digest,
                differences=[Block.Difference(field="dtype", here="float16", there="bfloat16")],
            ),
            Block(verdict=Block.NEVER_STORED, namespace=ONE.digest),
        ]

    def _answer(self, request, context, reply):
        self.asked.append(request)
        if self.abort is not None:
            context.abort(*self.abort)
        return reply

    def Status(self, request, context):  # noqa: N802  # the generated base class names it
        return self._answer(request, context, self.status)

    def Nodes(self, request, context):  # noqa: N802
        return self._answer(request, context, admin_pb2.NodesResponse(nodes=self.nodes))

    def Namespaces(self, request, context):  # noqa: N802
        return self._answer(request, context, admin_pb2.NamespacesResponse(namespaces=self.namespaces))

    def Inspect(self, request, context):  # noqa: N802
        return self._answer(request, context, self.lookup)

    def Explain(self, request, context):  # noqa: N802
        blocks = self.explained[: len(request.keys) // 16]
        return self._answer(request, context, admin_pb2.ExplainResponse(blocks=blocks, memory_s=60, silent=["c"]))

    def EvictBlocks(self, request, context):  # noqa: N802
        return self._answer(request, context, self.evicted)


@pytest.fixture
def master():
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        fake = FakeMaster()
        admin_pb2_grpc.add_AdminServicer_to_server(fake, server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield fake
        server.stop(grace=None).wait(timeout=10)


@pytest.fixture
def ctl(master):
    def run(*arguments, stdin=None):
        return CliRunner().invoke(command, ["--master", master.address, *arguments], input=stdin)

    return run


class TestPool:
    def test_status_as_json_has_stable_keys(self, ctl):
        """A script can rely on names and types; 64-bit identifiers are text."""
        result = ctl("--json", "status")
        assert result.exit_code == 0
        data = json.loads(result.stdout)
        assert data["version"] == "1.2.3"
        assert data["master_epoch"] == "000000000000feed"
        assert data["counters"] == {"lookups": 12}
        assert data["warming"] is False

    def test_status_for_people(self, ctl):
        """Memory and nodes are readable."""
        result = ctl("status")
        assert result.exit_code == 0
        assert "1.0 MiB of 1.0 GiB (0.1%)" in result.stdout
        assert "1 live of 2 known" in result.stdout
        assert "1.5 min" in result.stdout

    def test_options_may_follow_the_command(self, ctl):
        """`kvpoolctl status --json` is what people type."""
        assert json.loads(ctl("status", "--json").stdout)["blocks"] == 7

    def test_nodes(self, ctl):
        """Sorted by name, dead ones included."""
        data = json.loads(ctl("nodes", "--json").stdout)
        assert [(node["node_id"], node["state"]) for node in data["nodes"]] == [("a", "dead"), ("b", "live")]
        table = ctl("nodes").stdout
        assert "10.0.0.8:700" in table
        assert "512.0 MiB of 1.0 GiB" in table

    def test_no_live_node_is_exit_code_1(self, ctl, master):
        """A script can wait for the first node."""
        del master.nodes[0]
        assert ctl("nodes").exit_code == 1
        master.nodes.clear()
        result = ctl("nodes")
        assert result.exit_code == 1
        assert "no node has reported" in result.stdout

    def test_namespaces(self, ctl, master):
        """The whole descriptor is in the JSON, the digest in both."""
        data = json.loads(ctl("namespaces", "--json").stdout)["namespaces"]
        assert [item["descriptor"]["model"] for item in data] == ["one", "two"]
        assert Namespace(**data[1]["descriptor"]) == TWO
        assert data[0]["digest"] == ONE.digest.hex()
        assert TWO.digest.hex() in ctl("namespaces").stdout
        master.namespaces.clear()
        assert ctl("namespaces").exit_code == 1

    def test_names_from_clients_cannot_write_to_the_terminal(self, ctl, master):
        """A model's name is printed as text: no markup, no control characters."""
        master.namespaces[0].descriptor.model = "[red]\x1b[2Jmodel"
        result = ctl("namespaces")
        assert "\x1b[2J" not in result.stdout
        assert "[red]?[2Jmodel" in result.stdout


    def test_what_is_piped_is_folded_nowhere(self, ctl, master):
        """A line each, to be searched and cut; digests are whole on a narrow terminal too."""
        for item in master.namespaces:
            item.descriptor.model, item.descriptor.revision = "m" * 100, "r" * 60
        text = ctl("namespaces").stdout
        assert all(f"{space.digest.hex()} │ {'m' * 100} │ {'r' * 60} │" in text for space in (ONE, TWO))

    def test_identifiers_are_whole_on_a_narrow_terminal(self, monkeypatch):
        """They are what other commands are given."""
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setenv("TERM", "xterm")
        print_table("", ("namespace", "model", "shape"), [(ONE.digest.hex(), "m" * 40, "s" * 40)])
        assert len(terminal.getvalue().splitlines()[0]) <= 60
        assert ONE.digest.hex() in terminal.getvalue()


class TestLookup:
    def test_a_hit_tells_where(self, ctl, master):
        """Runs become ranges of blocks with their owners' names."""
        result = ctl("--json", "lookup", "--namespace", "one", "--hashes", HEX)
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        assert (data["asked"], data["prefix"], data["reason"]) == (4, 3, "not_whole")
        assert data["runs"] == [
            {"first": 0, "blocks": 2, "owners": [{"node": "b", "tier": "dram", "shards": [0, 2], "backend": ""}]},
            {"first": 2, "blocks": 1, "owners": [{"node": "a", "tier": "fs", "shards": [0], "backend": BACKEND}]},
        ]
        request = master.asked[-1]
        assert request.namespace == ONE.digest
        assert request.hashes == PACKED
        assert not request.lease

    def test_for_people(self, ctl):
        """One line says how much, and why it ends."""
        result = ctl("lookup", "--namespace", ONE.digest.hex(), "--hashes", HEX)
        assert "3 of 4 blocks are in the pool; it ends there because: not whole" in result.stdout
        assert "b (dram, shards 0,2)" in result.stdout

    def test_no_hit_is_exit_code_1(self, ctl, master):
        """Like grep."""
        master.lookup = master_pb2.LookupResponse(reason=master_pb2.LookupResponse.NOT_STORED)
        assert ctl("lookup", "--namespace", "one", "--hashes", HEX).exit_code == 1

    @pytest.mark.parametrize("length", [4, 31])
    def test_the_beginning_of_a_digest_will_do(self, ctl, master, length):
        """As long as it is unique."""
        assert ctl("lookup", "--namespace", TWO.digest.hex()[:length], "--hashes", HEX).exit_code == 0
        assert master.asked[-1].namespace == TWO.digest

    def test_an_ambiguous_namespace_lists_what_it_may_mean(self, ctl, master):
        """Two revisions of one model have one name."""
        master.namespaces[1].descriptor.model = "one"
        result = ctl("lookup", "--namespace", "one", "--hashes", HEX)
        assert result.exit_code == 2
        assert ONE.digest.hex() in result.stderr
        assert TWO.digest.hex() in result.stderr

    def test_an_unknown_namespace_is_exit_code_1(self, ctl):
        """The pool was asked and knows none."""
        assert ctl("lookup", "--namespace", "three", "--hashes", HEX).exit_code == 1

    def test_hashes_from_a_file_and_from_standard_input(self, ctl, master, tmp_path):
        """Long prompts do not fit a command line."""
        path = tmp_path / "hashes.txt"
        path.write_text(HEX.replace(",", "\n") + "\n")
        assert ctl("lookup", "--namespace", "one", "--hashes", f"@{path}").exit_code == 0
        assert master.asked[-1].hashes == PACKED
        assert ctl("lookup", "--namespace", "one", "--hashes", "-", stdin=HEX).exit_code == 0
        assert master.asked[-1].hashes == PACKED

    @pytest.mark.parametrize(
        ("hashes", "problem"),
        [
            ("", "there are none"),
            (",", "there are none"),
            ("zz" * 16, "number 1"),
            (f"{'00' * 16},abc", "number 2"),
            ("00" * 15, "at least 16 bytes"),
            ("@/does/not/exist", "cannot read"),
            ("@~nobody-here/x", "cannot read ~nobody-here/x"),
        ],
    )
    def test_bad_hashes_are_exit_code_2(self, ctl, master, hashes, problem):
        """Refused before the master is asked."""
        result = ctl("lookup", "--namespace", "one", "--hashes", hashes)
        assert result.exit_code == 2
        assert problem in result.stderr
        assert master.asked == []


    def test_bytes_that_are_no_text_are_exit_code_2(self, ctl, master):
        """Standard input may be anything."""
        result = ctl("lookup", "--namespace", "one", "--hashes", "-", stdin=b"\xff\xfe")
        assert (result.exit_code, master.asked) == (2, [])
        assert "hashes: cannot read standard input" in result.stderr


class TestEvict:
    def test_coldest(self, ctl, master):
        """A size as operators write it."""
        result = ctl("evict", "--coldest", "1.5GB", "--yes")
        assert result.exit_code == 0
        assert "4 blocks (4.0 KiB)" in result.stdout
        assert master.asked == [admin_pb2.EvictBlocksRequest(coldest_bytes=3 << 29)]

    def test_some_keys_of_a_namespace(self, ctl, master):
        """JSON has the two numbers."""
        result = ctl("--json", "evict", "--namespace", "two", "--hashes", HEX, "-y")
        assert json.loads(result.stdout) == {"blocks": 4, "bytes": 4096}
        assert master.asked[-1] == admin_pb2.EvictBlocksRequest(namespace=TWO.digest, keys=PACKED)

    def test_it_asks_first(self, ctl, master):
        """No, end of input and anything but yes change nothing; standard output stays clean for scripts."""
        for answer in ("n\n", "", "\n"):
            result = ctl("evict", "--namespace", ONE.digest.hex(), stdin=answer)
            assert result.exit_code == 1
            assert "all blocks of namespace" in result.stderr
            assert master.asked == []
        assert json.loads(ctl("--json", "evict", "--coldest", "1MB", stdin="y\n").stdout)["blocks"] == 4

    def test_nothing_to_evict_is_exit_code_1(self, ctl, master):
        """The pool answered, but there was nothing."""
        master.evicted = admin_pb2.EvictBlocksResponse()
        assert ctl("evict", "--coldest", "1MB", "--yes").exit_code == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["--namespace", "one", "--coldest", "1GB"],
            ["--hashes", HEX],
            ["--coldest", "1GB", "--hashes", HEX],
            ["--coldest", "much"],
            ["--namespace", "one", "--hashes", "-"],
        ],
    )
    def test_unclear_requests_are_exit_code_2(self, ctl, master, arguments):
        """Nothing is dropped by guessing."""
        assert ctl("evict", *arguments).exit_code == 2
        assert master.asked == []


class TestExplain:
    def test_as_json(self, ctl, master):
        """Names, not numbers; a block that was never used has no last use."""
        result = ctl("--json", "explain", "--namespace", "one", *(key.hex() for key in KEYS))
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        assert [b["verdict"] for b in data["blocks"]] == ["present", "evicted", "namespace_differs", "never_stored"]
        assert [b["key"] for b in data["blocks"]] == [key[:16].hex() for key in KEYS]
        assert data["blocks"][1]["removals"] == [{"why": "room", "node": "b", "age_s": 7.0}]
        assert data["blocks"][2]["differences"] == [{"field": "dtype", "here": "float16", "there": "bfloat16"}]
        assert (data["blocks"][0]["last_use_s"], data["blocks"][1]["last_use_s"]) == (90, None)
        assert (data["silent"], data["overflowed"]) == (["c"], False)
        assert master.asked[-1] == admin_pb2.ExplainRequest(namespace=ONE.digest, keys=PACKED)

    def test_for_people(self, ctl):
        """A row a block; what came from clients is text."""
        text = ctl("explain", *(key.hex() for key in KEYS)).stdout
        for said in (
            "b (dram, shards 0,1); leased 2 times; last used 1.5 min ago or before",
            "engine[red] (hbm); evicted from b 7.0 s ago to make room for a put",
            "dtype is 'bfloat16' there, 'float16' here",
            "not since the master started, 1.0 min ago",
            "1 of 4 blocks are in the pool",
            "do not answer: c",
        ):
            assert said in text, text

    def test_a_full_index_is_named(self, ctl, master):
        """Files go for want of rows in it, too, with the same reason."""
        removal = Block.Removal(why=Block.Removal.CAPACITY, node="/mnt/kv", age_s=7)
        master.explained = [Block(verdict=Block.EVICTED, removals=[removal])]
        text = ctl("explain", KEYS[0].hex()).stdout
        assert "because its storage backend, or the master's index (max_blocks), was full" in text

    def test_from_a_file_and_from_standard_input(self, ctl, master, tmp_path):
        """Without --namespace any will do."""
        path = tmp_path / "hashes.txt"
        path.write_text(HEX.replace(",", "\n"))
        assert ctl("explain", "--hashes-file", str(path)).exit_code == 0
        assert ctl("explain", "--hashes_file", "-", stdin=HEX).exit_code == 0
        assert master.asked == [admin_pb2.ExplainRequest(keys=PACKED)] * 2

    def test_many_keys_are_several_questions(self, ctl, master, tmp_path):
        """Each within the master's limit; the answers are one list."""
        master.explained = [Block(verdict=Block.UNKNOWN)] * 1024
        path = tmp_path / "hashes.txt"
        path.write_text("\n".join(f"{n:032x}" for n in range(2500)))
        result = ctl("--json", "explain", "--hashes-file", str(path))
        assert result.exit_code == 1
        assert [len(request.keys) // 16 for request in master.asked] == [1024, 1024, 452]
        assert len(json.loads(result.stdout)["blocks"]) == 2500
        assert "2300 more are not shown" in ctl("explain", "--hashes-file", str(path)).stdout

    @pytest.mark.parametrize("arguments", [[], ["ab" * 16, "--hashes-file", "-"], ["xyz"], ["--hashes-file", "/none"]])
    def test_unclear_questions_are_exit_code_2(self, ctl, master, arguments):
        """Before the master is asked."""
        assert ctl("explain", *arguments).exit_code == 2
        assert master.asked == []


class TestWarnings:
    def test_status_and_namespaces_say_who_hashes_differently(self, ctl, master):
        """In the table and for scripts."""
        master.status.warnings.append("they differ")
        master.namespaces[0].disagrees_with.append(TWO.digest)
        assert "warning: they differ" in ctl("status").stdout
        assert json.loads(ctl("status", "--json").stdout)["warnings"] == ["they differ"]
        assert f"{ONE.digest.hex()} shares nothing with {TWO.digest.hex()}" in ctl("namespaces").stdout
        data = json.loads(ctl("namespaces", "--json").stdout)["namespaces"]
        assert [item["disagrees_with"] for item in data] == [[TWO.digest.hex()], []]

    def test_lookup_shows_what_engines_hold(self, ctl, master):
        """Apart from the pool's own: nobody else can read it."""
        ranges = [master_pb2.LookupResponse.Range(first=1, blocks=2)]
        master.lookup.residents.add(engine="vllm", tier="hbm", ranges=ranges)
        assert "vllm (hbm, its own)" in ctl("lookup", "--namespace", "one", "--hashes", HEX).stdout
        data = json.loads(ctl("--json", "lookup", "--namespace", "one", "--hashes", HEX).stdout)
        assert data["residents"] == [{"engine": "vllm", "tier": "hbm", "ranges": [{"first": 1, "blocks": 2}]}]


class TestTrouble:
    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (grpc.StatusCode.PERMISSION_DENIED, 4),
            (grpc.StatusCode.UNAUTHENTICATED, 4),
            (grpc.StatusCode.INVALID_ARGUMENT, 2),
            (grpc.StatusCode.NOT_FOUND, 1),
            (grpc.StatusCode.INTERNAL, 5),
            (grpc.StatusCode.UNAVAILABLE, 3),
        ],
    )
    def test_each_kind_of_failure_has_its_exit_code(self, ctl, master, status, code):
        """And one line that repeats what the master said."""
        master.abort = (status, "because of the test")
        result = ctl("status")
        assert result.exit_code == code
        assert "because of the test" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1

    def test_no_master_is_exit_code_3(self):
        """A port that nobody listens on."""
        result = CliRunner().invoke(command, ["--master", "127.0.0.1:1", "--timeout", "2s", "status"])
        assert result.exit_code == 3
        assert "cannot reach a master at 127.0.0.1:1" in result.stderr

    @pytest.mark.parametrize("option", [["--master", "nowhere"], ["--timeout", "soon"]])
    def test_a_bad_option_is_exit_code_2(self, option):
        """One line that names it."""
        result = CliRunner().invoke(command, [*option, "status"])
        assert result.exit_code == 2
        assert option[0].removeprefix("--") in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1

    def test_the_master_may_come_from_the_environment(self, master, monkeypatch):
        """KVPOOL_MASTER is --master."""
        monkeypatch.setenv("KVPOOL_MASTER", master.address)
        assert CliRunner().invoke(command, ["status"]).exit_code == 0
