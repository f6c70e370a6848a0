"""Two ranks without the ten seconds of a launch: a process that has imported everything forks them.

    ranks = WarmRanks(environment);  code, out, err = ranks.run(variables, ["pretrain", "recipe.yaml"])

Each pair is new, as under torchrun, and has process group and environment of its own. What only the launcher does is
tested elsewhere: relaying signals, one line for a mistake, warnings of imports.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

SECONDS = 240  # then a rank is killed


class WarmRanks:
    """The waiting process, seen from a test."""

    def __init__(self, environment: dict[str, str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(self, variables: dict[str, str], words: list[str]) -> tuple[int, str, str]:
        """A verb of llmkit, or a script.py, on two ranks: the worst exit code, and what both wrote."""
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([variables, words, folder]), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            return code, *(Path(folder, name).read_text() for name in ("out", "err"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _rank(rank: int, port: int, variables: dict[str, str], words: list[str], folder: str) -> None:
    """In the child; never returns."""
    code = 1
    try:
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for handle, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= variables | {key: str(value) for key, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        if words[0].endswith(".py"):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        else:
            from llmkit import cli

            sys.argv = ["llmkit", *words]
            code = cli.main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids, worst = set(), 0
        for rank in range(2):
            if (pid := os.fork()) == 0:
                _rank(rank, port, *request)
            pids.add(pid)
        while pids:
            pid, status = os.wait()
            pids.discard(pid)
            if status:
                worst = worst or abs(os.waitstatus_to_exitcode(status))
                for other in pids:
                    os.kill(other, signal.SIGKILL)
        print(worst, flush=True)


if __name__ == "__main__":
    from llmkit.run import quiet_libraries

    quiet_libraries()
    import deepspeed  # noqa: F401

    import llmkit.data.toyworld
    import llmkit.train.checkpoint
    import llmkit.train.pretrain  # noqa: F401

    _serve()
