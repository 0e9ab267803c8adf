"""Layers on other devices: the same cache is kept, and the same answer given, as on the CPU."""

import contextlib
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from csp_edge import CSP, EdgeVLM, OptionError, ServerError
from csp_edge.cli import main
from csp_edge.engine import Engine
from csp_edge.policies import AdaKV
from small_gguf import MODEL
from test_csp_engine import engine_on, greedy, prefill

STAR = "What color is the star in image 2?"
BLUE = {"role": "user", "content": "Which image shows the blue star?"}


class Server:
    """csp-edge rpc-server in a process of its own."""

    def __init__(self, port=None):
        with socket.create_server(("127.0.0.1", port or 0)) as free:
            self.port = free.getsockname()[1]
        self.endpoint = f"127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "csp_edge", "rpc-server", "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.DEVNULL
        )

    def __enter__(self):
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self):
        for _ in range(600):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            assert self.process.poll() is None
            time.sleep(0.05)
        raise TimeoutError(self.endpoint)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def servers():
    """Two servers on loopback."""
    with Server() as one, Server() as other:
        yield [one.endpoint, other.endpoint]


@pytest.fixture
def server():
    """A server to be killed."""
    with Server() as server:
        yield server


def conversation(scenes, model=MODEL, **options):
    """The results of two questions, and logits: after each answer, and of the first once more."""
    with EdgeVLM(model, cache=CSP(0.2), n_threads=1, **options) as vlm:
        first = vlm.chat(STAR, scenes[:6])
        logits = [vlm.engine.logits.copy()]
        snapshot = vlm.engine.snapshot()
        second = vlm.chat([*vlm.messages, BLUE])
        logits.append(vlm.engine.logits.copy())
        vlm.engine.restore(snapshot)
        vlm.engine.decode(5)
        logits.append(vlm.engine.logits.copy())
        return [first, second], logits


def answer(model, **options):
    """The result of a question without pictures, and logits."""
    with EdgeVLM(model, cache=CSP(48, window=8), n_threads=1, n_ctx=1024, **options) as vlm:
        result = vlm.chat("Name three colors. " * 20, max_tokens=8)
        assert result.cache.cells_after == 48
        return [result], [vlm.engine.logits.copy()]


def recollection(scenes, model=MODEL, **options):
    """The result of a question that needs what was evicted, and logits."""
    with EdgeVLM(model, cache=CSP(64), recall=True, n_threads=1, **options) as vlm:
        vlm.chat(STAR, scenes[:6])
        result = vlm.chat([*vlm.messages, BLUE])
        return [result], [vlm.engine.logits.copy()]


def check_same(ours, theirs, atol):
    for result, other in zip(ours[0], theirs[0], strict=True):
        assert result.text == other.text
        for heads, expected in zip(result.cache.kept, other.cache.kept, strict=True):
            for kept, wanted in zip(heads, expected, strict=True):
                np.testing.assert_array_equal(kept, wanted)
    np.testing.assert_allclose(ours[1], theirs[1], atol=atol)


@pytest.fixture(scope="module")
def on_cpu(scenes):
    return conversation(scenes)


# the servers' CPU is the same as ours: their figures are equal to the last bit


@pytest.mark.parametrize("n_gpu_layers", [None, 4])
def test_layers_on_two_servers(servers, scenes, on_cpu, caplog, n_gpu_layers):
    with caplog.at_level(logging.DEBUG, "csp_edge"):
        theirs = conversation(scenes, rpc=servers, n_gpu_layers=n_gpu_layers)
    check_same(theirs, on_cpu, 0)
    for server in servers:
        assert re.search(rf"{re.escape(f'[{server}]')} KV buffer size", caplog.text)
    assert ("CPU KV buffer size" in caplog.text) == (n_gpu_layers == 4)


def test_text_on_two_servers(servers, smollm2_path):
    check_same(answer(smollm2_path, rpc=servers), answer(smollm2_path), 0)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_servers_cache_grows_and_shrinks(servers, demo_paths, kv_type):
    rows = []
    for options in ({}, {"rpc": servers, "n_gpu_layers": -1}):
        engine = engine_on(demo_paths, kv_type=kv_type, **options)
        prefill(engine)
        logits = [engine.logits.copy()]
        sizes = {engine.n_cells_max}
        for n_cells in (512, 256, 480):
            engine._hook.resize(max(n_cells, engine.n_cells + 8))
            sizes.add(engine.n_cells_max)
            logits.append(greedy(engine, 2)[-1])
        engine.prune(AdaKV(40))
        sizes.add(engine.n_cells_max)
        logits.append(greedy(engine, 3)[-1])
        rows.append(np.stack(logits))
        assert sizes == {256, 512}
        engine.close()
    np.testing.assert_array_equal(*rows)


def test_recall_from_a_server(servers, scenes):
    check_same(recollection(scenes, rpc=servers), recollection(scenes), 0)


def test_a_conversation_saved_here_goes_on_there(servers, scenes, tmp_path):
    path = tmp_path / "talk.csp"
    with EdgeVLM.demo(cache=CSP(0.2), n_threads=1) as vlm:
        vlm.chat(STAR, scenes[:4])
        vlm.save(path)
        expected = vlm.chat([*vlm.messages, BLUE]).text, vlm.engine.logits.copy()
    with EdgeVLM.load(path, n_threads=1, rpc=servers) as vlm:
        assert vlm.chat([*vlm.messages, BLUE]).text == expected[0]
        np.testing.assert_array_equal(vlm.engine.logits, expected[1])


# servers that are not there


def test_a_server_that_is_lost(server, scenes):
    vlm = EdgeVLM.demo(cache=CSP(0.2), n_threads=1, rpc=[server.endpoint])
    vlm.chat(STAR, scenes[:3])
    server.process.kill()
    server.process.wait()
    lost = f"connection to the RPC server {server.endpoint} is lost"
    for call in (
        lambda: vlm.engine.decode(5) or vlm.engine.logits,
        lambda: vlm.chat([*vlm.messages, BLUE]),
        lambda: vlm.chat(STAR, scenes[:6]),
        vlm.engine.snapshot,
        vlm.reset,
    ):
        with pytest.raises(ServerError, match=lost):
            call()
    with pytest.raises(ServerError, match="Connection refused: start `csp-edge rpc-server`"):
        EdgeVLM.demo(rpc=[server.endpoint])

    with Server(server.port):
        with pytest.raises(ServerError, match=lost):
            EdgeVLM.demo(rpc=[server.endpoint])
        vlm.close()
        with EdgeVLM.demo(cache=CSP(0.2), n_threads=1, rpc=[server.endpoint]) as other:
            assert other.chat(STAR, scenes[:3]).text == "blue"


@pytest.mark.parametrize("moment", range(4))
def test_a_server_that_is_lost_in_a_prompt(server, scenes, moment):
    """Whatever is under way then."""

    def progress(stage, done, total):
        if stage == "prefill" and done:
            stages.append(done)
            if len(stages) == 1 + 2 * moment:
                server.process.send_signal(signal.SIGKILL)
                server.process.wait()

    stages = []
    with EdgeVLM.demo(n_threads=1, rpc=[server.endpoint], progress=progress) as vlm:
        with pytest.raises(ServerError, match="is lost"):
            vlm.chat(STAR, scenes[:6])
        with pytest.raises(ServerError, match="is lost"):
            vlm.chat(STAR)


@pytest.mark.parametrize("share", [0, 50, 90])
def test_a_server_that_is_lost_while_the_model_loads(server, share):
    def progress(stage, done, total):
        if stage == "load" and done >= share and server.process.poll() is None:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()

    with pytest.raises(ServerError, match=server.endpoint):
        EdgeVLM.demo(n_threads=1, rpc=[server.endpoint], progress=progress)


@pytest.mark.parametrize("call", [Engine.clear, Engine.snapshot, lambda e: e.observe(8)])
def test_a_server_that_is_lost_between_two_questions(server, scenes, call):
    with EdgeVLM.demo(n_threads=1, rpc=[server.endpoint]) as vlm:
        vlm.chat(STAR, scenes[:3])
        server.process.kill()
        server.process.wait()
        with pytest.raises(ServerError, match="is lost"):
            call(vlm.engine)
            vlm.chat(STAR)


def test_a_server_that_is_killed_at_any_time(server, scenes):
    vlm = EdgeVLM.demo(n_threads=1, rpc=[server.endpoint])
    killer = threading.Timer(0.3, server.process.kill)
    killer.start()
    with pytest.raises(ServerError, match="is lost"):
        while True:
            vlm.reset()
            vlm.chat(STAR, scenes[:3])
    killer.join()
    vlm.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_machine_that_is_gone_is_noticed(server):
    """By probes of a connection on which nothing comes: timer 2 of Linux's TCP."""
    with EdgeVLM.demo(n_threads=1, rpc=[server.endpoint]) as vlm:
        vlm.chat("Hello", max_tokens=1)
        end = time.monotonic() + 10
        # 1 is the timer of what was sent and not acknowledged yet
        while "01" in (timers := timers_of(server.port)) and time.monotonic() < end:
            time.sleep(0.05)
        assert timers == ["02", "02"]


def timers_of(port):
    """Of both ends of all connections to that port."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    is_open = [row for row in rows if row[3] == "01"]
    return [row[5][:2] for row in is_open if f"0100007F:{port:04X}" in row[1:3]]


def test_a_server_at_work_for_another(server, monkeypatch):
    command = [sys.executable, "-c", BUSY, server.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"there\n"
        with monkeypatch.context() as patch:
            patch.setattr("csp_edge.rpc._TIMEOUT_S", 0.2)
            with pytest.raises(ServerError, match="may be at work for another"):
                EdgeVLM.demo(rpc=[server.endpoint])
        other.communicate()
    with (
        EdgeVLM.demo(rpc=[server.endpoint]) as first,
        EdgeVLM.demo(rpc=[server.endpoint]) as second,
    ):
        assert first.chat("Hello", max_tokens=1).usage == second.chat("Hello", max_tokens=1).usage


BUSY = """
import sys
from csp_edge import EdgeVLM

with EdgeVLM.demo(rpc=[sys.argv[1]]) as vlm:
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n" + b" " * 20])
def test_something_else_that_listens(answer):
    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ServerError, match="no RPC server of ggml's"):
            EdgeVLM.demo(rpc=[f"127.0.0.1:{listener.getsockname()[1]}"])
        thread.join()


@pytest.mark.parametrize(
    "rpc",
    [
        "127.0.0.1:1",
        ["127.0.0.1"],
        [":1"],
        ["127.0.0.1:0"],
        ["127.0.0.1:x"],
        ["127.0.0.1:" + "1" * 5000],
        ["a\0b:1"],
        [1],
        1,
    ],
)
def test_what_is_no_endpoint(rpc):
    with pytest.raises(OptionError, match=r"give (a list like|HOST:PORT)|no host"):
        EdgeVLM.demo(rpc=rpc)


def test_memory_is_this_machines():
    with pytest.raises(OptionError, match="memory='1GiB' and rpc: give one of them"):
        EdgeVLM.demo(memory="1GiB", rpc=["127.0.0.1:1"])


def test_command_line(server, scenes, capsys):
    assert (
        main(["chat", "--rpc", server.endpoint, "-i", str(scenes[0]), "-i", str(scenes[1]), STAR])
        == 0
    )
    assert capsys.readouterr().out == "blue\n"
    assert main(["chat", "--rpc", "nowhere", "Hello"]) == 1
    assert "give HOST:PORT" in capsys.readouterr().err
    assert main(["rpc-server", "--port", str(server.port)]) == 1
    assert "Address already in use" in capsys.readouterr().err
    assert main(["rpc-server", "--host", "203.0.113.1"]) == 1
    assert "can't listen on 203.0.113.1:50052" in capsys.readouterr().err
    for option in ("--port=0", "--port=65536", "--threads=0"):
        assert main(["rpc-server", option]) == 1
        assert "give" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_ends_a_server(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(10) == -signal.SIGINT
