"""`llmkit serve` refuses in one line what transformers cannot serve; what it starts answers, and ends with it."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from exported import bpe, chat_model

from llmkit import cli
from llmkit.deploy import serve
from llmkit.deploy.loading import find

ROOT = Path(__file__).parent.parent.parent


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def the_line(argv, capsys):
    assert cli.main(["serve", *map(str, argv)]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1, found
    return found.err


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    chat_model(folder / "ours")
    argv = ["export", "--model_name_or_path", str(folder / "ours"), "--output_dir", str(folder / "plain")]
    assert cli.main(argv) == 0
    return folder / "plain"


def test_what_cannot_be_served_is_refused_with_what_to_do(plain, tmp_path, capsys):
    ours = plain.parent / "ours"
    line = the_line(["--model_name_or_path", ours], capsys)
    assert f"`llmkit export --model_name_or_path {ours} --to qwen3 --output_dir served` first" in line
    chat_model(tmp_path / "llama", qk_norm=False)
    assert "--to llama --output_dir served`" in the_line(["--model_name_or_path", tmp_path / "llama"], capsys)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(plain)}))
    assert "is an adapter; `llmkit merge " in the_line(["--model_name_or_path", tmp_path / "adapter"], capsys)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/m.gguf").touch()
    assert "`llama-server -m " in the_line(["--model_name_or_path", tmp_path / "gguf"], capsys)
    (tmp_path / "gguf/config.json").write_text('{"architectures": ["GPT2ForSequenceClassification"]}')  # a model, too
    assert "GPT2ForSequenceClassification, which" in the_line(["--model_name_or_path", tmp_path / "gguf"], capsys)
    (tmp_path / "gguf/config.json").write_text('{"auto_map": {"AutoConfig": "a.B"}}')
    assert "carries code of its own" in the_line(["--model_name_or_path", tmp_path / "gguf"], capsys)
    assert "model_name_or_path is missing" in the_line([], capsys)
    assert "no such folder" in the_line(["--model_name_or_path", "./nowhere"], capsys)


def test_ports_hosts_and_missing_packages_are_one_line(plain, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = the_line(["--model_name_or_path", plain, "--port", port], capsys)
        assert f"port={port}: is taken on 127.0.0.1" in line
    assert "port=0; allowed: 1 to 65535" in the_line(["--model_name_or_path", plain, "--port", 0], capsys)
    assert "host='203.0.113.7'" in the_line(["--model_name_or_path", plain, "--host", "203.0.113.7"], capsys)
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi", "openai_that_is_not_there"))
    line = the_line(["--model_name_or_path", plain], capsys)
    assert "needs openai_that_is_not_there: `pip install 'transformers[serving]'`" in line


def test_a_server_that_does_not_start_is_one_line_and_an_open_host_is_warned_of(plain, tmp_path, monkeypatch, capsys):
    started = []

    def fails(argv, env, stdin):
        assert stdin == subprocess.PIPE  # whose end tells the server that we are gone
        started.append((argv, env))
        return right([sys.executable, "-c", "raise SystemExit(3)"])

    right = subprocess.Popen
    monkeypatch.setattr(serve.subprocess, "Popen", fails)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home/hub"))
    argv = ["serve", "--model_name_or_path", str(plain), "--host", "0.0.0.0", "--port", str(free_port()), "--use_cpu"]
    assert cli.main(argv) == 2
    found = capsys.readouterr()
    assert "`transformers serve` ended with exit code 3" in found.err
    assert found.out.startswith("warning   host=0.0.0.0: whoever reaches this machine may ask")
    words, env = started[0]
    assert words[3:5] == ["serve", str(plain)] and words[words.index("--device") + 1] == "cpu"
    assert env["HF_HUB_OFFLINE"] == "1" and (tmp_path / "home/hub").is_dir()


def test_an_address_of_ipv6_is_in_brackets(plain, monkeypatch, capsys):
    monkeypatch.setattr(serve, "_check_port", lambda *_: None)
    monkeypatch.setattr(serve, "_is_up", lambda *_: True)
    ends = subprocess.Popen([sys.executable, "-c", ""])
    monkeypatch.setattr(serve.subprocess, "Popen", lambda *_, **__: ends)
    assert cli.main(["serve", "--model_name_or_path", str(plain), "--host", "::1"]) == 0
    out = capsys.readouterr().out
    assert "serving   http://[::1]:8000/v1 in" in out and "curl http://[::1]:8000/v1/chat/completions " in out


STUB = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(503 if Handler.asked == 1 else 200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_is_no_error(sig, plain, monkeypatch, capfd):
    """A server that is up at its second answer; the signal comes while we wait for its end."""
    started = []

    class Signalled(subprocess.Popen):
        def __init__(self, words, **options):
            super().__init__([sys.executable, "-c", STUB, words[words.index("--port") + 1]], **options)
            started.append((self, words))

        def wait(self, timeout=None):
            if timeout is None:
                os.kill(os.getpid(), sig)
            return super().wait(timeout)

    monkeypatch.setattr(serve.subprocess, "Popen", Signalled)
    before = signal.getsignal(signal.SIGTERM)
    argv = ["--model_name_or_path", str(plain), "--port", str(free_port()), "--dtype", "float16"]
    assert cli.main(["serve", *argv]) == 0
    server, words = started[0]
    assert server.poll() == -signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert words[words.index("--dtype") + 1] == "float16"
    found = capfd.readouterr()
    assert "ask it    curl" in found.out and "warning" not in found.out
    assert found.err.count("/health") == 2  # 503 is not up


def test_how_to_ask_is_a_line_for_a_shell(plain, tmp_path):
    """A chat with a template, a continuation without; a quote in the folder's name."""
    folder = chat_model(tmp_path / "ann's", bpe(None))
    words = shlex.split(serve.how_to_ask(find(str(folder)), "localhost", 80))
    assert words[1] == "http://localhost:80/v1/completions" and json.loads(words[-1])["prompt"]
    assert json.loads(words[-1])["model"] == str(folder) and json.loads(words[-1])["temperature"] == 0
    words = shlex.split(serve.how_to_ask(find(str(plain)), "localhost", 80))
    assert words[1].endswith("/v1/chat/completions") and json.loads(words[-1])["messages"]


def test_the_server_ends_when_we_are_gone(tmp_path):
    """After kill -9, or when the terminal is closed, a server used to stay and hold its port."""
    (tmp_path / "transformers/cli").mkdir(parents=True)
    for folder in ("transformers", "transformers/cli"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "transformers/cli/transformers.py").write_text(
        "import sys, time\nprint(sys.argv[1:], flush=True)\ntime.sleep(60)\n"
    )
    argv = [sys.executable, "-c", serve.SERVER, "serve", "m"]
    server = subprocess.Popen(argv, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"['serve', 'm']\n"
    assert server.poll() is None
    server.stdin.close()
    assert server.wait(10) == -signal.SIGTERM


@pytest.mark.slow
def test_the_server_answers_as_it_says_and_ends_with_us(plain, tmp_path):
    pytest.importorskip("openai", reason="transformers[serving] is not installed")
    port = free_port()
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "llmkit", "serve", "--model_name_or_path", str(plain), "--port", str(port)]
    with (tmp_path / "out").open("w") as out:
        server = subprocess.Popen([*argv, "--use_cpu"], stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        deadline = time.monotonic() + 120
        while "ask it" not in (said := (tmp_path / "out").read_text()):
            assert server.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        assert f"serving   http://127.0.0.1:{port}/v1" in said and "warning" not in said
        words = shlex.split(re.search(r"ask it    (curl .*)", said)[1])  # what a shell would make of the line
        url, body = words[1], words[words.index("-d") + 1]
        asked = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            found = json.load(answer)
        assert found["choices"][0]["message"]["role"] == "assistant" and found["usage"]["completion_tokens"] > 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:  # 500 where there is no cache
            assert json.load(answer)["object"] == "list"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    assert server.returncode == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
