"""The parts of ``kvpool-bench ttft`` that need no engine, against a server that only looks like one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import click
import pytest
from click.testing import CliRunner

from kvpool.bench import ttft_pools
from kvpool.bench.harness import BenchError
from kvpool.bench.ttft_data import Prompts, Shape, percentile, ratios
from kvpool.bench.ttft_engines import EngineSpec, Model, Python, engine_python, kvpool_transfer, read_model
from kvpool.bench.ttft_http import Server, parse_metrics
from kvpool.bench.ttft_pairs import OFF, OFF_AGAIN, Arm, Fault, FaultRun, Pairs, cpu_seconds, measure_misses
from kvpool.bench.ttft_phases import COLD, HBM, LOCAL, OTHER, Phases, System, Timing
from kvpool.bench.ttft_relay import Relay
from kvpool.bench.ttft_report import TTFTReport, check_plot, draw
from kvpool.cli.bench import command
from kvpool.errors import InvalidArgumentError
from tests.bench.fake_engine import FakeEngine, FakePool, begin_stream, send_chunk, send_event, serving, wait_until

SHAPE = Shape(input_tokens=17, output_tokens=3, concurrency=2, prompts=4)
LIMIT_S = 20.0


@pytest.fixture
def engines():
    """Two engines on one pool; the first holds four prompts of its own."""
    pool = FakePool()
    pair = FakeEngine(pool), FakeEngine(pool)
    with serving(*pair):
        yield pair


def server(engine, **changes):
    found = Server(engine.url, **changes)
    found.find_model()
    return found


def phases(report, *systems, seed=1):
    return Phases(systems, Prompts(seed, 3, 4096), report, LIMIT_S)


# ---- statistics and data ----


def test_percentiles_lie_between_values():
    """Linear interpolation, the ends included, whatever the order."""
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]
    assert percentile([7.0], 0.9) == 7.0


def test_ratios_are_taken_pair_by_pair():
    """What both have in common cancels out; the spread shows what does not."""
    found = ratios([1.0, 20.0, 330.0], [1.0, 10.0, 110.0])
    assert (found.least, found.median, found.most, found.count) == (1.0, 2.0, 3.0, 3)
    assert found.least <= found.sure_from <= found.median <= found.sure_to <= found.most
    same = ratios([5.0, 6.0], [5.0, 6.0])
    assert (same.sure_from, same.sure_to) == (1.0, 1.0)


def test_pairs_of_different_length_are_refused():
    """A pair that lacks its other half is a mistake, not a figure."""
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_prompts_come_again_with_their_seed_and_share_what_they_should():
    """Equal seeds, equal prompts; distinct ones have nothing in common, sharing ones exactly a prefix."""
    first, again, other = (Prompts(seed, 3, 4096).distinct(3, 50) for seed in (5, 5, 6))
    assert first == again != other
    assert len({tuple(prompt) for prompt in first}) == 3
    assert {3 <= token < 4096 for prompt in first for token in prompt} == {True}
    prefixes = [[1] * 8, [2] * 8]
    shared = Prompts(5, 3, 4096).sharing(prefixes, 4, 20)
    assert [prompt[:8] for prompt in shared] == [*prefixes, *prefixes]
    assert len({tuple(prompt[8:]) for prompt in shared}) == 4
    assert {len(prompt) for prompt in shared} == {20}


@pytest.mark.parametrize("block", [16, 128])
def test_an_engine_holds_a_and_b_pushes_it_out(block):
    """The engine's own cache has room for data set A, and data set B is at least as large as the cache."""
    shape = Shape(4096, 10, 4, 8)
    blocks = shape.engine_blocks(block)
    assert blocks > shape.prompts * shape.blocks(block)
    assert shape.evicting_prompts(blocks * block) * shape.input_tokens >= blocks * block


# ---- a server by its URL ----


def test_the_first_token_is_timed_before_the_end(engines):
    """TTFT ends with the first chunk that holds a choice, not with the head, a comment, or the last chunk."""
    engine, _ = engines
    go_on = threading.Event()
    begun = threading.Event()

    def answer(handler, request):
        begin_stream(handler)
        send_chunk(handler, b": a comment\n\n")
        send_event(handler, {"choices": []})
        send_event(handler, {"choices": [{"text": ""}]})  # a token whose text is not whole yet
        begun.set()
        assert go_on.wait(LIMIT_S)
        send_chunk(handler, b'data: {"choices": [{"te')  # an event may be cut anywhere
        send_chunk(handler, b'xt": "x"}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\n')
        send_chunk(handler, b"data: [DONE]\n\n")
        send_chunk(handler, b"")

    engine.answer = answer
    held = []
    asking = threading.Thread(target=lambda: held.append(server(engine).complete([1, 2], 2, LIMIT_S)))
    asking.start()
    assert begun.wait(LIMIT_S)
    threading.Event().wait(0.5)  # most of which must show as the difference of the two times
    go_on.set()
    asking.join(LIMIT_S)
    (got,) = held
    assert (got.text, got.prompt_tokens, got.output_tokens, got.cached_tokens, got.error) == ("x", 5, 2, None, "")
    assert 0 < got.ttft_s <= got.total_s - 0.05


def refuse(handler, request):
    handler.send_response(400)
    handler.send_header("Content-Length", "8")
    handler.end_headers()
    handler.wfile.write(b"too long")


def cut(handler, request):
    begin_stream(handler)
    send_event(handler, {"choices": [{"text": "a"}]})
    send_chunk(handler, b"")


def no_token(handler, request):
    begin_stream(handler)
    send_chunk(handler, b"data: [DONE]\n\n")
    send_chunk(handler, b"")


def fail_midway(handler, request):
    begin_stream(handler)
    send_event(handler, {"error": {"message": "out of luck"}})
    send_chunk(handler, b"")


def nonsense(handler, request):
    begin_stream(handler)
    send_chunk(handler, b"data: [1\n\n")
    send_chunk(handler, b"")


def hang_up(handler, request):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refuse, "status 400: too long"),
        (cut, "before it was done"),
        (no_token, "no token"),
        (fail_midway, "out of luck"),
        (nonsense, "ValueError|JSONDecodeError"),
        (hang_up, "RemoteDisconnected|Reset"),
    ],
)
def test_a_request_that_fails_is_counted_and_harms_no_other(engines, answer, error):
    """Every way not to be answered ends as an answer that says why."""
    engine, _ = engines

    def sometimes(handler, request):
        if request["prompt"][0] == 1:
            answer(handler, request)
        else:
            begin_stream(handler)
            send_event(handler, {"choices": [{"text": "fine"}]})
            send_chunk(handler, b"data: [DONE]\n\n")
            send_chunk(handler, b"")

    engine.answer = sometimes
    load = server(engine).run([[1], [2], [3]], 2, 2, LIMIT_S)
    assert [bool(each.error) for each in load.answers] == [True, False, False]
    (failed,) = load.failed
    assert any(part in failed.error for part in error.split("|"))


def test_a_server_that_says_nothing_more_is_given_up(engines):
    """The deadline is for the whole answer, not for each of its pieces."""
    engine, _ = engines
    end = threading.Event()

    def trickle(handler, request):
        begin_stream(handler)
        while not end.wait(0.05):
            send_chunk(handler, b": still here\n\n")

    engine.answer = trickle
    try:
        assert "TimeoutError" in server(engine).complete([1], 1, 0.3).error
    finally:
        end.set()


def test_an_interrupt_hangs_up(engines):
    """Ctrl-C does not wait for answers that are on their way, nor for requests that have not begun."""
    engine, _ = engines
    hung_up = threading.Event()

    def for_ever(handler, request):
        begin_stream(handler)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        with contextlib.suppress(OSError):
            while True:
                send_chunk(handler, b": still here\n\n")
                time.sleep(0.01)
        hung_up.set()

    engine.answer = for_ever
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            server(engine).run([[1], [2], [3]], 1, 1, 1000.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert hung_up.wait(LIMIT_S)
    assert len(engine.requests) == 1


def test_a_request_holds_what_a_benchmark_needs(engines):
    """Token ids as they are, streamed, greedy, with usage; vLLM's extension only where it is wanted."""
    engine, _ = engines
    server(engine).complete([5, 6, 7], 2, LIMIT_S)
    server(engine, ignore_eos=True).complete([5], 2, LIMIT_S)
    first, second = engine.requests
    assert first == {
        "model": "fake", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert second["ignore_eos"] is True


def test_a_url_may_end_in_v1(engines):
    """As OpenAI's own clients want it."""
    engine, _ = engines
    assert Server(engine.url + "/v1/").find_model() == "fake"


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:notaport", ""])
def test_what_is_no_url_is_refused(url):
    """With the name of the flag."""
    with pytest.raises(InvalidArgumentError, match="url"):
        Server(url)


def test_a_server_that_is_not_there_is_named():
    """One line with its address."""
    with pytest.raises(BenchError, match=r"127\.0\.0\.1:1"):
        Server("127.0.0.1:1").find_model()


def test_metrics_are_summed_over_engines():
    """Capacity is blocks times tokens of a block; other metrics, comments and broken lines are passed over."""
    page = """\
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="a b"} 10.0
vllm:prefix_cache_hits_total{engine="1",model_name="a b"} 5.0
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="20"} 1.0
vllm:cache_config_info{block_size="128",engine="1",num_gpu_blocks="22"} 1.0
vllm:broken
python_info 3
"""
    found = parse_metrics(page)
    assert (found.own_hits, found.external_hits, found.capacity_tokens, found.block_tokens) == (15.0, None, 5376, 128)
    assert parse_metrics("").capacity_tokens is None


# ---- the phases ----


def test_every_phase_is_the_hit_that_it_is_named_for(engines):
    """Cold misses, HBM hits in the engine, B pushes A out, then the pool answers, on the other engine too."""
    first, second = engines
    report = TTFTReport()
    timings = phases(report, System("kvpool", server(first), server(second))).measure(SHAPE)
    assert [(t.phase, t.hit_share, t.same_text) for t in timings] == [
        (COLD, 0.0, None), (HBM, 1.0, None), (LOCAL, 1.0, 4), (OTHER, 1.0, 4),
    ]  # fmt: skip
    assert report.notes == []
    assert second.own_hits == 0
    evicting = [request for request in first.requests if request["max_tokens"] == 1]
    assert len(evicting) * SHAPE.input_tokens >= first.capacity * 5 * 4


def test_a_hit_that_did_not_happen_is_said(engines):
    """A figure beside a miss comes with a warning; it is not left out, and not passed off as a hit."""
    first, second = engines
    second.pool = FakePool()
    report = TTFTReport()
    timings = phases(report, System("kvpool", server(first), server(second))).measure(SHAPE)
    assert timings[-1].hit_share == 0.0
    assert [note for note in report.notes if "other_node_hit" in note and "0%" in note]


def test_a_cold_prompt_that_hits_ends_the_run(engines):
    """Then it was not cold."""
    first, second = engines
    first.take = lambda prompt: (setattr(first, "own_hits", first.own_hits + 16), 16)[1]
    with pytest.raises(BenchError, match="new random prompts"):
        phases(TTFTReport(), System("kvpool", server(first), server(second))).measure(SHAPE)


def test_a_failed_request_ends_the_run(engines):
    """A time that lacks some of its requests is no time."""
    engines[0].answer = refuse
    with pytest.raises(BenchError, match="status 400"):
        phases(TTFTReport(), System("kvpool", server(engines[0]))).measure(SHAPE)


def test_without_metrics_the_answers_tell_of_hits_and_b_must_be_named(engines):
    """A server without vLLM's page: usage counts hits; how much its cache holds has to be said."""
    first, _ = engines
    first.has_metrics = False
    report = TTFTReport()
    timings = phases(report, System("x", server(first))).measure(SHAPE)
    assert [(t.phase, t.hit_share) for t in timings] == [(COLD, 0.0), (HBM, 1.0)]
    assert [note for note in report.notes if "--evict_prompts" in note]
    told = phases(report, System("x", server(first), evict_prompts=5), seed=2).measure(SHAPE)
    assert [t.phase for t in told] == [COLD, HBM, LOCAL]


def test_a_cache_is_reset_where_that_is_offered(engines):
    """By request instead of by B; a server that refuses costs one phase, with the reason."""
    first, _ = engines
    report = TTFTReport()
    timings = phases(report, System("x", server(first), evict="reset")).measure(SHAPE)
    assert (timings[-1].phase, timings[-1].hit_share) == (LOCAL, 1.0)
    first.can_reset = False
    timings = phases(report, System("x", server(first), evict="reset"), seed=2).measure(SHAPE)
    assert [t.phase for t in timings] == [COLD, HBM]
    assert [note for note in report.notes if "VLLM_SERVER_DEV_MODE" in note]


def test_stored_waits_for_what_was_begun(monkeypatch):
    """Not for more than is new since the last call, and not for ever."""
    counts = iter([5, 5, 7, 9])
    last = [0]

    def count():
        last[0] = next(counts, last[0])
        return last[0]

    monkeypatch.setattr(ttft_pools, "POLL_S", 0)
    stored = ttft_pools.Stored(count)
    assert stored(4) == ""
    counts = iter([10, 12])
    monkeypatch.setattr(ttft_pools, "QUIET_S", 0.02)
    assert stored(0) == ""
    assert last == [12]  # saves that nobody counted on have come to rest
    counts = iter([13])
    monkeypatch.setattr(ttft_pools, "STORED_S", 0)
    assert "2 of 3 blocks" in stored(3)


# ---- pairs ----


def test_rounds_send_everybody_the_same_and_begin_elsewhere(engines):
    """Each round's prompts are new, equal for all engines, and another engine is the first each time."""
    order = []

    class Recorded(Server):
        def run(self, prompts, *rest):
            order.append((self.url, tuple(map(tuple, prompts))))
            return super().run(prompts, *rest)

    servers = [Recorded(engine.url) for engine in (*engines, engines[0])]
    arms = [Arm(name, each) for name, each in zip((OFF, OFF_AGAIN, "kvpool"), servers, strict=True)]
    report = TTFTReport()
    measure_misses(arms, SHAPE, Prompts(1, 3, 4096), report, 10, LIMIT_S)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 11  # one to warm up
    assert all(len({prompts for _, prompts in each}) == 1 for each in rounds)
    assert len({each[0][1] for each in rounds}) == 11
    assert [each[0][0] == engines[1].url for each in rounds[1:4]] == [False, True, False]
    assert [(f.detail["engine"], f.detail["pairs"], f.detail["failed"]) for f in report.figures] == [
        (OFF_AGAIN, 10, 0), ("kvpool", 10, 0),
    ]  # fmt: skip
    assert all(len(arm.tokens_per_s) == 10 for arm in arms)


def test_cpu_time_counts_children_and_not_the_dead():
    """An engine is more than its first process; a master that was killed counts nothing and harms nothing."""
    spin = "while True: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], start_new_session=True) as process:
        try:
            wait_until(lambda: cpu_seconds([process.pid]) > 0.3)
            with subprocess.Popen(["true"]) as dead:
                dead.wait(LIMIT_S)
            assert cpu_seconds([dead.pid]) == 0.0
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_fault_is_measured_on_prefixes_that_the_pool_holds(engines, monkeypatch):
    """Stored before, gone from the engine, asked for after; failures are counted, in the first seconds too."""
    first, second = engines
    monkeypatch.setattr("kvpool.bench.ttft_pairs.WINDOW_S", 0.05)
    prefix = 8

    broken = threading.Event()
    failures = iter([True])

    def answer(handler, request):
        if broken.is_set() and next(failures, False):
            refuse(handler, request)
            return
        begin_stream(handler)
        send_event(handler, {"choices": [{"text": "fine"}]})
        send_chunk(handler, b"data: [DONE]\n\n")
        send_chunk(handler, b"")

    second.answer = answer
    waited = []
    fault = Fault("stopped", broken.set, lambda blocks: waited.append(blocks) or "", 4)
    arms = [Arm(OFF, server(first)), Arm("kvpool", server(second))]
    report = TTFTReport()
    pairs = Pairs(arms, SHAPE, report, LIMIT_S)
    FaultRun(pairs, SHAPE, Prompts(1, 3, 4096), report, fault).measure(3)
    seeded = [tuple(r["prompt"][:prefix]) for r in second.requests if r["max_tokens"] == 1]
    asked = {tuple(r["prompt"][:prefix]) for r in second.requests if r["max_tokens"] == 3}
    assert len(set(seeded)) == len(seeded) == waited[1] // 2
    assert len(asked & set(seeded)) >= 3 * 2
    assert len(arms[1].failed) == 1
    assert len(arms[1].tokens_per_s) == 3
    (figure,) = report.figures
    assert (figure.name, figure.detail["failed"]) == ("throughput_stopped", 1)


# ---- a slow node ----


def test_a_relay_holds_back_answers_only(tmp_path, monkeypatch):
    """What the client sends goes on at once; what comes back waits, file descriptors included, in order."""
    monkeypatch.chdir(tmp_path)  # a unix socket's name must be short
    with socket.socket(socket.AF_UNIX) as node:
        node.bind("node")
        node.listen()
        relay = Relay("relay", "node")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(LIMIT_S)
            client.connect("relay")
            far, _ = node.accept()
            with far:
                client.sendall(b"ask")
                assert far.recv(10) == b"ask"
                read_end, write_end = os.pipe()
                socket.send_fds(far, [b"with fd"], [write_end])
                data, fds, _, _ = socket.recv_fds(client, 100, 4)
                assert data == b"with fd"
                os.write(fds[0], b"x")
                assert os.read(read_end, 1) == b"x"
                for fd in (read_end, write_end, *fds):
                    os.close(fd)
                relay.delay_s = 1.0
                far.sendall(b"late")
                client.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    client.recv(10)
                client.sendall(b"meanwhile")
                assert far.recv(10) == b"meanwhile"
                client.settimeout(LIMIT_S)
                assert client.recv(10) == b"late"
            assert client.recv(10) == b""  # an end passes through too


# ---- engines ----


def test_the_environment_of_an_engine_is_looked_into():
    """Without importing anything; what is missing is said with the flag's name."""
    with pytest.raises(InvalidArgumentError, match=r"engine_python: .* has no vLLM"):
        engine_python(sys.executable, "engine_python")
    with pytest.raises(InvalidArgumentError, match="peer_python: /nowhere"):
        engine_python("/nowhere", "peer_python")


def test_an_engine_is_started_with_what_was_asked_for(tmp_path):
    """All of its settings are on its command line."""
    python = Python("py", vllm="1", kvpool="1", torch="1", transformers="1", mooncake="", cpu=True)
    spec = EngineSpec(
        "a", python, Model("m", 1), 20, 128, 300, kvpool_transfer("h:1", "/s", {"gate": "off"}), resettable=True
    )
    command = spec.command(8123, tmp_path)
    at = command.index("py")
    assert {"HF_HUB_OFFLINE=1", "VLLM_SERVER_DEV_MODE=1", f"TMPDIR={tmp_path}"} <= set(command[:at])
    flags = dict(zip(command[at:], command[at + 1 :], strict=False))
    assert flags["--num-gpu-blocks-override"] == "20"
    extra = json.loads(flags["--kv-transfer-config"])["kv_connector_extra_config"]
    assert extra == {"master": "h:1", "node": "/s", "gate": "off"}
    assert "--kv-transfer-config" not in EngineSpec("a", python, Model("m", 1), 20, 128, 300).command(1, tmp_path)
    peer = EngineSpec("p", python, Model("m", 1), 20, 128, 300, environment={"MOONCAKE_CONFIG_PATH": "f"})
    assert "MOONCAKE_CONFIG_PATH=f" in peer.command(1, tmp_path)


def test_a_model_tells_how_much_kv_a_token_takes(tmp_path):
    """Two halves, heads, size, layers, two bytes; what is no checkpoint is refused."""
    config = {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model(tmp_path).token_bytes == 12288
    with pytest.raises(InvalidArgumentError, match="model: must be tiny, medium or a folder"):
        read_model(tmp_path / "absent")


# ---- the command ----


def run(*arguments):
    return CliRunner().invoke(command, ["ttft", *arguments])


def test_servers_by_url_from_end_to_end(engines, tmp_path):
    """A table, JSON and a picture of servers that somebody else runs."""
    first, second = engines
    figures, picture = tmp_path / "f.json", tmp_path / "f.png"
    done = run(
        *("--url", first.url, "--url", second.url, "--input_len", "17", "--concurrency", "2", "--prompts", "4"),
        *("--json", str(figures), "--plot", str(picture)),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text())["figures"]
    assert [each["name"] for each in found] == ["ttft_cold", "ttft_hbm_hit", "ttft_local_hit", "ttft_other_node_hit"]
    assert [each["hit_share"] for each in found] == [0.0, 1.0, 1.0, 1.0]
    assert all(len(each["ttft_ms"]) == 4 for each in found)
    assert "pool, other node" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--url", "http://a", "--url", "http://b", "--url", "http://c"), "url: one or two"),
        (("--miss-only", "--fault", "slow"), "fault: does not go with --miss_only"),
        (("--peer", "mooncake", "--url", "http://a"), "url: does not go with --peer"),
        (("--vocabulary", "9:3"), "vocabulary: must be LOW:HIGH"),
        (("--miss_only", "--input_len", "200", "--input_len", "300"), "input_len: throughput"),
        (("--input_len", "128"), "input_len: must be more than a block of 128"),
        (("--plot", "a.jpg"), "plot: must end in .png"),
        (("--miss_only", "--plot", "a.png"), "plot: shows times"),
        (("--segment_size", "many"), "segment_size"),
        (("--connector_config", "[1]"), "connector_config: must be a JSON object"),
        (("--engine_python", sys.executable), "engine_python: "),
    ],
)
def test_flags_that_make_no_sense_are_refused(arguments, says):
    """One line, exit code 2, before anything is started."""
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


def test_pairs_are_never_fewer_than_ten():
    """Fewer say nothing on a noisy machine."""
    assert run("--miss_only", "--pairs", "9").exit_code == 2


def test_a_picture_without_its_library_is_refused_at_once(monkeypatch):
    """Not after an hour of measuring."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgumentError, match="pip install"):
        check_plot("a.png")


def test_a_picture_that_cannot_be_written_is_said(tmp_path):
    """In one line."""
    timing = Timing("x", SHAPE, COLD, [1.0, 2.0], 1.0)
    with pytest.raises(click.ClickException, match="cannot write"):
        draw([timing], str(tmp_path))
