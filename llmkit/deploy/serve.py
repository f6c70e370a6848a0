"""A plain model folder behind OpenAI's API: `transformers serve`, started right and said how to ask.

Owns what goes wrong before a server answers.   llmkit serve --model_name_or_path exports/qwen3 --port 8000

Leaves out the server: it is transformers' own, in a process of its own. It cannot run the code that our models carry,
so those are exported first.
"""

import contextlib
import errno
import http.client
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..align.lora import stored_config
from ..config import UserError
from ..hardware import cpu_seconds, detect
from ..run import Result, quiet_libraries
from ..verbs import ServeConfig
from .loading import Source, find

PACKAGES = ("openai", "fastapi", "uvicorn", "pydantic")  # of transformers[serving]
LOCAL = ("127.0.0.1", "localhost", "::1")
# the server, ending where its standard input does: when we are gone, by kill -9 too
SERVER = """
import os, runpy, signal, sys, threading
def watch():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module("transformers.cli.transformers", run_name="__main__")
"""


def _check_port(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise UserError(f"port={port}; allowed: 1 to 65535")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "is taken" if error.errno == errno.EADDRINUSE else "is not allowed to you"
            raise UserError(f"port={port}: {reason} on {host}; choose another, e.g. --port {port + 1}") from None
        raise UserError(
            f"host={host!r}: cannot be listened on ({error.strerror or error}); 127.0.0.1 always can"
        ) from None


def _check_model(source: Source) -> None:
    """Raises UserError for what `transformers serve` cannot load, with the command that makes something it can."""
    config = stored_config(source.base)
    is_ours = config.get("model_type") == "llmkit"
    if source.is_adapter:
        raise UserError(
            f"model_name_or_path={source.name!r}: is an adapter; "
            f"`llmkit {'export' if is_ours else 'merge'} --model_name_or_path {source.name} --output_dir served` first"
        )
    kind = next(iter(config.get("architectures") or []), "")
    if kind.endswith("Classification"):
        raise UserError(f"model_name_or_path={source.name!r}: is a {kind}, which writes no text; name a causal LM")
    if is_ours:
        target = "qwen3" if config.get("qk_norm", True) else "llama"
        command = f"llmkit export --model_name_or_path {source.name} --to {target} --output_dir served"
        raise UserError(f"model_name_or_path={source.name!r}: carries code, which is not served; `{command}` first")
    if "auto_map" in config:
        raise UserError(f"model_name_or_path={source.name!r}: carries code of its own, which is not served")


def check(config: ServeConfig) -> Source:
    folder = Path(config.model_name_or_path)
    if (
        config.model_name_or_path
        and not (folder / "config.json").is_file()
        and (files := sorted(folder.glob("*.gguf")))
    ):
        command = f"llama-server -m {shlex.quote(str(files[0]))}"
        raise UserError(f"model_name_or_path={config.model_name_or_path!r}: holds GGUF; `{command}`")
    source = find(config.model_name_or_path)
    _check_model(source)
    if lacking := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"llmkit serve needs {', '.join(lacking)}: `pip install 'transformers[serving]'`")
    _check_port(config.host, config.port)
    return source


def _make_cache() -> None:
    """`/v1/models` looks into the Hub's cache, and fails where there is none yet."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with contextlib.suppress(OSError):
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)


def _is_up(host: str, port: int) -> bool:
    asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(asked, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _stopped_with_us(server: subprocess.Popen) -> Iterator[None]:
    """A polite end for the server, whichever way ours comes: Ctrl-C, SIGTERM (as Ctrl-C), an error."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if is_main_thread else None
    try:
        yield
    finally:
        if server.poll() is None:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
        if is_main_thread:
            signal.signal(signal.SIGTERM, before)


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def how_to_ask(source: Source, host: str, port: int) -> str:
    """A curl line that works: a chat where there is a template, else a continuation."""
    body: dict[str, Any] = {"model": source.path, "max_tokens": 64, "temperature": 0}
    if source.load_tokenizer().chat_template:
        end, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        end, body["prompt"] = "completions", "Once upon a time"
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl {_address(host, port)}/{end} -H 'Content-Type: application/json' -d {data}"


def main(config: ServeConfig) -> Result:
    """Starts the server, says how to ask it, and stays until it is stopped. Raises UserError where it cannot start."""
    started = time.perf_counter()
    source = check(config)
    quiet_libraries()
    _make_cache()
    if config.host not in LOCAL:
        print(f"warning   host={config.host}: whoever reaches this machine may ask, unencrypted and without a password")
    device = "cpu" if config.use_cpu else detect(False).type
    argv = [sys.executable, "-c", SERVER, "serve", source.path]
    argv += ["--host", config.host, "--port", str(config.port), "--device", device, "--dtype", config.dtype]
    offline = {"HF_HUB_OFFLINE": "1"} if Path(source.path).is_dir() else {}  # a folder asks the Hub for nothing
    line = how_to_ask(source, config.host, config.port)
    print(f"loading   {source.path} on {device}", flush=True)
    server = subprocess.Popen(argv, env=os.environ | offline, stdin=subprocess.PIPE)
    with _stopped_with_us(server), contextlib.suppress(KeyboardInterrupt):
        while not _is_up(config.host, config.port):
            if server.poll() is not None:
                raise UserError(f"`transformers serve` ended with exit code {server.returncode}; it said why above")
            time.sleep(0.2)
        print(f"serving   {_address(config.host, config.port)} in OpenAI's API; Ctrl-C ends it")
        print(f"ask it    {line}", flush=True)
        server.wait()
    wall_s, cpu_s = round(time.perf_counter() - started, 2), round(cpu_seconds(), 2)
    return Result("serve", "ok", source.path, None, wall_s, cpu_s, 0, {}, {})
