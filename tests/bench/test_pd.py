"""``kvpool-bench pd``: workloads, simulated instances, and HTTP against servers that only look like engines."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter

import pytest
from click.testing import CliRunner

from kvpool.bench import pd_transfer, pd_workload
from kvpool.bench.harness import BenchError
from kvpool.bench.pd import Work
from kvpool.bench.pd_counts import Counters
from kvpool.bench.pd_drive import Drive
from kvpool.bench.pd_report import PDReport
from kvpool.bench.pd_results import Asked, Result, Row, Where
from kvpool.bench.pd_sim import ROUTINGS, Cluster, Simulation
from kvpool.bench.pd_stage import EngineSizes, Shape, engine_specs
from kvpool.bench.pd_transfer import AFTER, COLD, HITS, LAYERS, RUN, WITH, System, TransferRun, copies
from kvpool.bench.pd_workload import KINDS, Ask, make, marked, read, write
from kvpool.bench.pool import BenchPool
from kvpool.bench.ttft_data import Prompts
from kvpool.bench.ttft_engines import Model, Python
from kvpool.bench.ttft_http import Metrics, Server, parse_metrics
from kvpool.cli.bench import command
from kvpool.errors import InvalidArgumentError
from tests.bench.fake_engine import FakeEngine, FakePool, begin_stream, send_chunk, send_event, serving

LIMIT_S = 20.0
PYTHON = Python("py", vllm="1", kvpool="1", torch="1", transformers="1", mooncake="", cpu=True)


def server(engine):
    found = Server(engine.url)
    found.find_model()
    return found


def simulated(asks, routing, cluster, concurrency=16):
    policy, master = ROUTINGS[routing]
    return Simulation(cluster, policy, master=master).run(asks, concurrency)


# ---- workloads ----


@pytest.mark.parametrize("name", KINDS)
def test_a_workload_comes_again_with_its_seed_and_its_histories_grow(name):
    """Each turn's prompt begins with the one before; turns of a session are in order, all sessions are there."""
    kind = KINDS[name]
    asks = make(kind, 7)
    assert asks == make(kind, 7) != make(kind, 8)
    assert Counter(ask.session for ask in asks) == dict.fromkeys(range(kind.sessions), kind.turns)
    last: dict[int, Ask] = {}
    for ask in asks:
        before = last.get(ask.session)
        assert ask.turn == (0 if before is None else before.turn + 1)
        assert before is None or ask.prompt.startswith(before.prompt)
        last[ask.session] = ask


def test_sessions_share_their_system_prompts_and_nothing_else():
    """Two of them go apart at the first question, if not before."""
    asks = [ask for ask in make(KINDS["chat"], 3) if not ask.turn]
    heads = {ask.prompt.split("\n")[0] for ask in asks}
    assert len(heads) == KINDS["chat"].systems
    assert len({ask.prompt for ask in asks}) == len(asks)


def test_sessions_begin_at_random_times_and_think():
    """A Poisson process: gaps that average to the rate; turns follow, and the file is in the order of time."""
    asks = make(KINDS["chat"], 3, rate=2.0, think_s=5.0)
    times = [ask.at for ask in asks]
    assert times == sorted(times)
    starts = sorted(ask.at for ask in asks if not ask.turn)
    assert starts[-1] / len(starts) == pytest.approx(0.5, rel=0.3)
    by_session = {ask.session: [one.at for one in asks if one.session == ask.session] for ask in asks}
    gaps = [b - a for each in by_session.values() for a, b in itertools.pairwise(each)]
    assert sum(gaps) / len(gaps) == pytest.approx(5.0, rel=0.2)


def test_a_marked_workload_is_as_long_and_shares_no_beginning():
    """So that one routing's round finds nothing of another's."""
    asks = make(KINDS["small"], 3)
    one, two = marked(asks, "0 0"), marked(asks, "0 1")
    assert [len(ask.prompt) for ask in one] == [len(ask.prompt) for ask in two]
    assert not {ask.prompt[:8] for ask in one} & {ask.prompt[:8] for ask in two}


def test_a_workload_file_is_read_as_it_was_written(tmp_path):
    """Times included; ``prompt`` and ``output_tokens`` are what other load generators look for."""
    path = str(tmp_path / "w.jsonl")
    for asks in (make(KINDS["small"], 3), make(KINDS["small"], 3, rate=1.0, think_s=1.0)):
        write(asks, path)
        assert read(path) == asks
    lines = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert all(isinstance(line["prompt"], str) and line["output_tokens"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no request"),
        ("{", "line 1"),
        ('{"session": 0, "turn": 0, "prompt": "a"}', "line 1: needs session"),
        ('{"session": 0, "turn": 0, "prompt": "a", "output_tokens": true}', "line 1: needs session"),
        ('{"session": 0, "turn": 0, "prompt": "", "output_tokens": 1}', "prompt must not be empty"),
        ('{"session": 0, "turn": 0, "prompt": "a", "output_tokens": 1, "at": -1}', "at no less than 0"),
        ('{"session": 0, "turn": 1, "prompt": "a", "output_tokens": 1}', "out of order"),
        ("[]", "line 1: needs session"),
    ],
)
def test_a_file_that_holds_no_workload_is_refused(tmp_path, text, says):
    """By its line, and with what is allowed."""
    path = tmp_path / "w.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=says):
        read(str(path))


# ---- simulated instances ----


def test_every_token_came_from_somewhere():
    """Whatever the routing: own cache, own node, other nodes and computed ones are all tokens of all prompts."""
    asks = make(KINDS["mixed"], 1)[:120]
    for routing in ROUTINGS:
        done = simulated(asks, routing, Cluster(3, 8192, 16384))
        assert len(done.asked) == len(asks)
        assert sum(done.tokens.values()) == done.prompt_tokens
        assert all(0 < one.ttft_s <= one.total_s for one in done.asked)


def test_one_instance_has_no_choice():
    """All routings are the same there, to the token and the moment."""
    asks = make(KINDS["small"], 1)
    first, *others = [simulated(asks, routing, Cluster(1, 4096, 8192)) for routing in ROUTINGS]
    assert all(other == first for other in others)
    assert first.tokens[Where.OTHER] == 0


def test_without_a_pool_nothing_comes_from_nodes():
    """And what no cache holds is computed."""
    done = simulated(make(KINDS["chat"], 1), "prefix", Cluster(4, 16384, 0))
    assert (done.tokens[Where.OWN], done.tokens[Where.OTHER]) == (0, 0)
    assert done.tokens[Where.HBM] > 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_routing_by_prefixes_hits_more_where_there_is_something_to_hit(seed):
    """With caches that together hold what is under way; and it costs nobody anything where there is nothing."""
    for name in ("chat", "documents", "mixed"):
        work = Work(name, make(KINDS[name], seed))
        held = work.under_way // 4
        plain, routed, told = (simulated(work.asks, routing, Cluster(4, held, 4 * held)) for routing in ROUTINGS)
        for better in (routed, told):
            assert better.near_tokens > 1.2 * plain.near_tokens
            assert sum(better.ttft_ms) < 0.95 * sum(plain.ttft_ms)
    work = Work("unique", make(KINDS["unique"], seed))
    plain, routed, _ = (simulated(work.asks, routing, Cluster(4, 20000, 80000)) for routing in ROUTINGS)
    assert sum(routed.ttft_ms) <= 1.05 * sum(plain.ttft_ms)


def test_twice_the_near_hits_of_round_robin():
    """Questions about documents on four instances: in the engine's own cache or its own node's memory."""
    work = Work("documents", make(KINDS["documents"], 1))
    held = work.under_way // 4
    plain, routed, told = (simulated(work.asks, routing, Cluster(4, held, 4 * held), 8) for routing in ROUTINGS)
    assert routed.near_tokens >= 2 * plain.near_tokens
    assert told.near_tokens >= 2 * plain.near_tokens


def test_requests_with_times_wait_for_them():
    """And for the turn before, which may take longer than thinking does."""
    asks = [
        Ask(0, 0, "a " * 4000, 50, at=1.0),
        Ask(1, 0, "b " * 40, 2, at=9.0),
        Ask(0, 1, "a " * 4000 + "c", 2, at=1.0),
    ]
    done = simulated(asks, "prefix", Cluster(2, 1 << 16, 0))
    assert [(one.ask.session, one.ask.turn) for one in done.asked] == [(0, 0), (0, 1), (1, 0)]
    assert done.wall_s > 9.0
    assert sum(one.total_s for one in done.asked) < 3.0


# ---- over HTTP ----


@pytest.fixture
def engine():
    """One engine that answers at once."""
    made = FakeEngine(FakePool())
    with serving(made):
        yield made


def test_turns_of_a_session_follow_each_other(engine):
    """However many requests run at once, and no more of them than asked for."""
    asks = make(KINDS["small"], 1)
    lock, running, most, open_sessions = threading.Lock(), [0], [0], set()

    def answer(handler, request):
        session = next(ask.session for ask in asks if ask.prompt == request["prompt"])
        with lock:
            assert session not in open_sessions
            open_sessions.add(session)
            running[0] += 1
            most[0] = max(most[0], running[0])
        begin_stream(handler)
        send_event(handler, {"choices": [{"text": "x"}]})
        with lock:
            open_sessions.discard(session)
            running[0] -= 1
        send_event(handler, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})
        send_chunk(handler, b"data: [DONE]\n\n")
        send_chunk(handler, b"")

    engine.answer = answer
    asked, wall_s = Drive(server(engine), asks, 3, LIMIT_S).run()
    assert {(one.ask.session, one.ask.turn) for one in asked} == {(ask.session, ask.turn) for ask in asks}
    assert 0 < most[0] <= 3
    assert wall_s > 0
    assert {(one.prompt_tokens, one.output_tokens) for one in asked} == {(9, 3)}


def test_a_failed_request_ends_the_run(engine):
    """A figure without it would lie."""
    engine.answer = lambda handler, _: handler._body(500, "no")
    with pytest.raises(BenchError, match="status 500"):
        Drive(server(engine), make(KINDS["small"], 1), 2, LIMIT_S).run()


def test_a_workload_that_lacks_a_turn_cannot_go_on(engine):
    """Over HTTP as in the simulation."""
    asks = [Ask(0, 0, "a", 1), Ask(0, 2, "b", 1)]
    engine.take = lambda prompt: 0
    with pytest.raises(BenchError, match="a turn is missing"):
        Drive(server(engine), asks, 2, LIMIT_S).run()
    with pytest.raises(BenchError, match="a turn is missing"):
        simulated(asks, "prefix", Cluster(1, 4096, 0))


# ---- what engines count ----

PAGE = """
vllm:prefix_cache_hits_total{engine="0"} 100.0
vllm:external_prefix_cache_hits_total{engine="0"} 60.0
vllm:prompt_tokens_total{engine="0"} 200.0
vllm:kvpool_hit_tokens_total{engine="0",tier="local"} 40.0
vllm:kvpool_hit_tokens_total{engine="0",tier="remote"} 20.0
vllm:kvpool_load_seconds_total{engine="0"} 0.5
"""


class Told(Server):
    """A server whose metrics are those of a list, the last one from then on."""

    def __init__(self, *pages):
        super().__init__("http://nowhere:1")
        self.pages = list(pages)

    def metrics(self):
        return self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]


def test_tokens_are_counted_by_where_they_came_from():
    """By differences; what another connector than ours has loaded came from elsewhere."""
    page = parse_metrics(PAGE)
    assert (page.prompt_tokens, page.load_s, page.pool_hits) == (200.0, 0.5, {"local": 40.0, "remote": 20.0})
    start, nixl = Metrics(0.0, 0.0, prompt_tokens=0.0), Metrics(10.0, 60.0, prompt_tokens=100.0)
    counted = Counters([Told(page), Told(nixl)]).since([start, start])
    assert counted.tokens == {Where.HBM: 110, Where.OWN: 40, Where.OTHER: 80, Where.NONE: 70}
    assert counted.moved == 0
    divided = Counters([Told(page)], [Told(nixl)]).since([start, start])
    assert divided.tokens == {Where.HBM: 100, Where.OWN: 40, Where.OTHER: 20, Where.NONE: 70}
    assert divided.moved == 60
    assert Counters([Told(page), Told(Metrics())]).since([start, Metrics()]) is None


def test_counters_are_read_once_they_have_settled():
    """Engines count a load a step after it."""
    pages = [Metrics(float(n), prompt_tokens=1.0) for n in (1, 2, 3)]
    assert Counters([Told(*pages)]).read() == [pages[-1]]


# ---- engines ----


def test_engines_are_on_machines_of_their_own_and_know_their_side(tmp_path):
    """A loopback address each, as their nodes have; producers and consumers where prefill and decode are apart."""
    pool = BenchPool("127.0.0.1:1", None, sockets=["/a", "/b", "/c"])  # nobody asks it anything
    sizes = EngineSizes(100, 32, 1024)

    def started(shape, given=pool):
        return engine_specs(shape, sizes, PYTHON, Model("m", 1), given, {"use_layerwise": True})

    both = started(Shape(2))
    assert [spec.host for spec in both] == ["127.0.0.1", "127.0.0.2"]
    assert [spec.transfer["kv_role"] for spec in both] == ["kv_both", "kv_both"]
    extra = both[1].transfer["kv_connector_extra_config"]
    assert (extra["node"], extra["use_layerwise"], extra["report_residency"]) == ("/b", True, True)
    apart = started(Shape(2, 1))
    assert [spec.transfer["kv_role"] for spec in apart] == ["kv_producer", "kv_producer", "kv_consumer"]
    nixl = started(Shape(1, 1, "nixl"), None)
    ports = {spec.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] for spec in nixl}
    assert ports == {"127.0.0.1", "127.0.0.2"}
    assert [spec.transfer for spec in started(Shape(2, 0, "none"), None)] == [None, None]
    config = json.loads(both[1].command(8123, tmp_path)[-1])
    assert config["engine_id"] == "127.0.0.2:8123"


# ---- transfers ----


class Pair:
    """A prefilling engine and a decoding one that takes only what the other has answered, or is told to wait for."""

    def __init__(self, prefill, decode):
        self.sent = []
        prefill.answer = self._prefill
        decode.answer = self._decode

    def _prefill(self, handler, request):
        if request["stream"]:  # a warm-up
            self._decode(handler, request)
            return
        params = request["kv_transfer_params"]
        self.sent.append(("prefill", params.get("transfer_id")))
        assert request["max_tokens"] == 1
        handler._body(
            200, json.dumps({"choices": [], "kv_transfer_params": {"transfer_id": "f", "remote": len(request)}})
        )

    def _decode(self, handler, request):
        self.sent.append(("decode", (request.get("kv_transfer_params") or {}).get("transfer_id")))
        begin_stream(handler)
        send_event(handler, {"choices": [{"text": f"t{request['prompt'][0]}"}]})
        send_chunk(handler, b"data: [DONE]\n\n")
        send_chunk(handler, b"")


def test_a_transfer_is_measured_beside_hits_and_copies(monkeypatch):
    """The decoding engine gets what the prefilling one says, or the same id where both are asked at once; then hits."""
    prefill, decode = FakeEngine(FakePool()), FakeEngine(FakePool())
    pair, report = Pair(prefill, decode), PDReport()
    monkeypatch.setattr(pd_transfer, "QUIET_S", 0.0)
    with serving(prefill, decode), copies(8, 4, 2048) as bare:
        system = System("kvpool", server(prefill), server(decode), at_once=True)
        TransferRun(32, 2, Prompts(1, 3, 4096), report, LIMIT_S).measure(system, bare)
    sent = [side for side, _ in pair.sent]
    assert sent.count("prefill") == 2 + 2 * 2
    assert sent.count("decode") == 1 + 2 + 2 * 2 * (1 + HITS)
    first, *after = pair.sent[:3]
    beside = sorted(pair.sent[3:5])
    assert first == ("decode", None), "it computes a prompt before it is sent one"
    assert after == [("prefill", None), ("decode", "f")]
    assert beside[0][1] == beside[1][1] and len(beside[0][1]) == 16
    names = [(figure.name, figure.detail["decode asked"]) for figure in report.figures]
    assert names == [*[("transfer", AFTER)] * 3, ("ttft", AFTER), *[("transfer", WITH)] * 3, ("ttft", WITH)]
    assert [figure.limit for figure in report.figures[:3]] == [RUN, LAYERS, COLD]
    assert all(len(figure.detail["each_ms"]) == 2 and figure.limit_value > 0 for figure in report.figures)
    assert report.tables("t")[0].row_count == 8


def test_an_engine_that_hands_nothing_over_is_said():
    """Nothing is measured where the decoding engine would compute it all."""
    prefill, decode = FakeEngine(FakePool()), FakeEngine(FakePool())
    prefill.answer = lambda handler, _: handler._body(200, "{}")
    with serving(prefill, decode), copies(2, 2, 1024) as bare:
        system = System("nixl", server(prefill), server(decode))
        with pytest.raises(BenchError, match="does not say where"):
            TransferRun(32, 1, Prompts(1, 3, 4096), PDReport(), LIMIT_S).measure(system, bare)


# ---- the command ----


def run(*arguments):
    return CliRunner().invoke(command, ["pd", *arguments])


def test_simulated_from_end_to_end(tmp_path):
    """A written workload, read again: a table, JSON and a picture; the first routing is what others are beside."""
    workload, figures, picture = (str(tmp_path / name) for name in ("w.jsonl", "f.json", "f.png"))
    written = run("--workload", "small", "--seed", "3", "--write", workload)
    assert written.exit_code == 0, written.output
    assert len(pd_workload.read(workload)) == 32
    done = run("--simulated", "--read", workload, "--json", figures, "--plot", picture)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert [each["routing"] for each in found] == list(ROUTINGS)
    assert [each["ratio"] is None for each in found] == [True, False, False]
    for each in found:
        assert sum(each["tokens"].values()) == each["prompt_tokens"]
        assert len(each["ttft_ms"]) == each["requests"] == 32
    assert "beside round robin" in done.output
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_are_compared_request_by_request():
    """In the order of sessions and turns, whatever order they ended in."""
    asks = [Ask(0, 0, "a", 1), Ask(1, 0, "b", 1)]
    slow = Result([Asked(asks[1], 4.0, 5.0, 10, 2), Asked(asks[0], 1.0, 2.0, 10, 2)], 5.0, {})
    fast = Result([Asked(asks[0], 0.5, 1.0, 10, 2), Asked(asks[1], 1.0, 2.0, 10, 2)], 4.0, {})
    found = Row("w", "fast", [fast]).beside(Row("w", "slow", [slow]))
    assert (found.least, found.most) == (0.25, 0.5)
    assert Row("w", "slow", [slow]).tokens(Where.HBM) is None


def test_engines_by_url_from_end_to_end(tmp_path):
    """Two proxies in front of servers that somebody else runs; every round asks for prompts of its own."""
    pair = [FakeEngine(FakePool()) for _ in range(2)]
    for one in pair:
        one.take = lambda prompt: 0
    figures = tmp_path / "f.json"
    with serving(*pair):
        urls = [part for one in pair for part in ("--url", one.url)]
        done = run(*urls, "--seed", "1", "--sessions", "3", "--turns", "2", "--rounds", "2", "--json", str(figures))
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text())["figures"]
    assert [(each["routing"], each["rounds"], each["requests"]) for each in found] == [
        ("round robin", 2, 12),
        ("prefix", 2, 12),
    ]
    prompts = [request["prompt"] for one in pair for request in one.requests]
    assert len(set(prompts)) == len(prompts)
    assert min(len(one.requests) for one in pair) > 6


def test_prefill_and_decode_apart_by_url(tmp_path):
    """The proxies ask one side to prefill and the other to decode; tokens are counted where prompts are prefilled."""
    prefill, decode = FakeEngine(FakePool()), FakeEngine(FakePool())
    pair, figures = Pair(prefill, decode), tmp_path / "f.json"
    with serving(prefill, decode):
        done = run("--url", prefill.url, "--decode_url", decode.url, "--workload", "small", "--sessions", "2",
                   "--turns", "2", "--rounds", "1", "--json", str(figures))  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text())["figures"]
    assert [(each["routing"], each["engines"], each["requests"]) for each in found] == [
        ("round robin", "1P1D", 4),
        ("prefix", "1P1D", 4),
    ]
    assert ("decode", "f") in pair.sent


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--simulated", "--url", "http://a"), "url: does not go with --simulated"),
        (("--prefill", "1"), "decode: --prefill and --decode"),
        (("--decode_url", "http://a"), "decode_url: needs --url"),
        (("--prefill", "1", "--decode", "1", "--connector", "none"), "connector: prefill and decode apart"),
        (("--read", "x", "--workload", "chat"), "workload: does not go with --read"),
        (("--read", "/nowhere/x"), "read: cannot read"),
        (("--workload", "chat", "--write", "/nowhere/x"), "write: cannot write"),
        (("--workload", "chat", "--workload", "mixed", "--write", "x"), "write: one --workload"),
        (("--connector_config", "[]"), "connector_config: must be a JSON object"),
        (("--plot", "x.jpg"), "plot: must end in .png"),
        (("--transfer", "--simulated"), "transfer: does not go with --simulated"),
    ],
)
def test_flags_that_make_no_sense_are_refused(arguments, says):
    """One line, exit code 2, before anything is started."""
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
