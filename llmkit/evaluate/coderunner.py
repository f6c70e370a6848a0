"""Runs programs that a language model wrote, shut off from this machine, and says how each ended.

    probe();  run_program("assert 1 + 1 == 2").status == "passed"

Linux only, as root or as a user who may have user namespaces; elsewhere `probe` refuses. A program gets namespaces of
its own (user, PID, network, mount, IPC), no privileges, an almost empty environment, an empty stdin, the standard
library (no installed packages) and system folders read-only, and a scratch folder in memory. Home, project, /proc and
all else do not exist for it. When it ends, so does all that it started. Costs about 25 ms (benchmarks/code_runner.py).

"passed" means that the last line was reached: a nonce that is in no memory of the program goes, turned round, from one
pipe into another after it. No printed word, os._exit(0) or SystemExit can stand for that. What remains possible:
- A program written against this very file can copy the nonce itself, or hand tests an object that equals anything: both
  run in one process. Good enough to score models; as a reward to train on, look at what was rewarded.
- Bugs of the kernel: of its system calls only those are refused that reach past namespaces and limits. For a model that
  may be hostile by intent, use a machine that may be lost.
- Memory is limited for each process, not in total: up to Limits.num_processes times memory_bytes, short of the kernel's
  out-of-memory killer, which takes these programs first.
"""

import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..config import UserError

JAIL = Path(__file__).with_name("jail.py")
SETUP_S = 20.0  # from start to shut off; milliseconds, unless the machine is swamped
# the order of sets is the same every time, and so the verdict
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/sandbox", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
READY = b"ready\n"
REFUSED = "allow_code_execution: programs cannot be shut off on this machine"
ADVICE = (
    "allow user namespaces (kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0; in a "
    "container seccomp=unconfined), or score this task on another machine"
)


@dataclass(frozen=True)
class Limits:
    """Of one program. Time is CPU time first, so that a busy machine changes no verdict."""

    wall_s: float = 15.0
    cpu_s: int = 3
    memory_bytes: int = 1 << 30  # address space of each process
    num_processes: int = 16  # with threads
    file_bytes: int = 16 << 20  # of each file, and of all in the scratch folder
    num_files: int = 64  # open at once
    output_bytes: int = 1 << 20  # stdout and stderr together


@dataclass(frozen=True)
class Outcome:
    """passed | failed | timeout | memory | output | killed."""

    status: str
    stdout: str
    stderr: str
    wall_s: float


def run_many(
    programs: Sequence[str],
    limits: Limits = Limits(),
    num_workers: int | None = None,
    tell: Callable[[int, int], object] = lambda done, more: None,
) -> list[Outcome]:
    """Outcomes in the order of the programs, as many at once as there are cores; tell(so many done, more to do).

    Raises UserError where programs cannot be shut off.
    """
    probe()
    tell(0, len(programs))
    outcomes = []
    with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
        try:
            for outcome in pool.map(lambda program: run_program(program, limits), programs):
                outcomes.append(outcome)
                tell(1, 0)
        finally:
            pool.shutdown(cancel_futures=True)
    return outcomes


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Runs one program to its end, or until it exceeds a limit. Raises UserError where it cannot be shut off."""
    probe()
    return _run(source, limits)


# ---- is it shut off?


@cache
def probe() -> None:
    """Runs a program that looks for a way out. Raises UserError that names what it found, or why it could not start."""
    if sys.platform != "linux":
        raise UserError(f"allow_code_execution: shutting programs off needs Linux, and this is {sys.platform}")
    with tempfile.TemporaryDirectory() as outside:
        os.chmod(outside, 0o777)  # so that only the jail stands in between
        Path(outside, "file").touch()
        others = [name for _, name in socket.if_nameindex() if name != "lo"]
        low = Limits(num_processes=4, memory_bytes=256 << 20)
        outcome = _run(f"{PROBE}\nprobe({outside!r}, {others!r}, {sorted(ENVIRONMENT)!r})", low)
        found = outcome.stdout.strip() or outcome.stderr.strip().split("\n")[-1] or outcome.status
        if outcome.status != "passed" or sorted(os.listdir(outside)) != ["file"]:
            raise UserError(f"{REFUSED} ({found}); {ADVICE}")


PROBE = """
import os, socket

def probe(outside, interfaces, environment):
    found = []

    def check(name, is_open):
        if is_open:
            found.append(name)

    def works(action):
        try:
            action()
        except (OSError, MemoryError):
            return False
        return True

    def is_routed(family, address):
        with socket.socket(family, socket.SOCK_DGRAM) as udp:
            return works(lambda: udp.connect((address, 9)))  # looks for a route, sends nothing

    check("other processes are visible", os.getpid() != 2 or os.getppid() != 1 or os.path.exists("/proc/1"))
    shared = {name for _, name in socket.if_nameindex()} & set(interfaces)
    routed = [a for f, a in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "192.0.2.1")) if is_routed(f, a)]
    check("network interfaces are visible", shared or routed)
    check("the file system is visible", os.path.exists(outside))
    check("writes outside the scratch folder", any(
        works(lambda: open(os.path.join(folder, "probe"), "w")) for folder in (outside, "/", "/usr", "/dev")))
    check("no scratch folder", not works(lambda: open("probe", "w")) or os.listdir(".") != ["probe"])
    check("environment", set(os.environ) - set(environment))
    check("privileges", os.getuid() == 0 or works(lambda: os.chroot("/")) or works(lambda: os.setuid(0)))
    check("system calls are not filtered", works(lambda: os.memfd_create("probe")))
    check("no limit of memory", works(lambda: bytearray(512 << 20)))
    children = []
    while len(children) < 20 and works(lambda: children.append(os.fork())):
        if children[-1] == 0:
            os.read(0, 1)
            import time
            time.sleep(60)
    check("no limit of processes", len(children) == 20)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    print("; ".join(found))
    assert not found
"""


# ---- one program


def _run(source: str, limits: Limits) -> Outcome:
    nonce = secrets.token_bytes(32)
    nonce_fd, give = os.pipe()
    os.write(give, nonce)
    os.close(give)
    proof_fd, prove = os.pipe()
    numbers = (limits.cpu_s, limits.memory_bytes, limits.num_processes, limits.file_bytes, limits.num_files)
    command = [_interpreter(), "-P", "-s", "-S", str(JAIL), *map(str, (os.getpid(), nonce_fd, prove, *numbers))]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT, cwd="/", pass_fds=(nonce_fd, prove)
        )
        os.close(prove)
        with process:
            try:
                _feed(process, source)
                seen, stopped, started = _watch(process, proof_fd, limits)
            finally:
                _end(process)
    finally:
        os.close(nonce_fd)
        os.close(proof_fd)
    proof, stdout, stderr = bytes(seen[0]), *(part.decode("utf-8", "replace") for part in seen[1:])
    if not proof.startswith(READY):
        reason = stopped or stderr.strip().split("\n")[-1] or f"exit code {process.returncode}"
        raise UserError(f"{REFUSED} ({reason}); {ADVICE}")
    is_proved = secrets.compare_digest(proof, READY + nonce[::-1])
    status = stopped or _status(process.returncode, is_proved)
    return Outcome(status, stdout, stderr, round(time.monotonic() - started, 4))


def _interpreter() -> str:
    """Itself, not a link in a virtual environment, which the program will not see."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _feed(process: subprocess.Popen, source: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(source.encode("utf-8", "surrogatepass"))
        process.stdin.close()
    except BrokenPipeError:  # it could not start, and says why on stderr
        pass


def _watch(process: subprocess.Popen, proof_fd: int, limits: Limits) -> tuple[list[bytearray], str, float]:
    """What came through (proof, stdout, stderr), why it must be stopped ("": it has ended), and when it started.

    The pipes end with the last process, since init and the outer process hold them too.
    """
    assert process.stdout is not None and process.stderr is not None
    fds = [proof_fd, process.stdout.fileno(), process.stderr.fileno()]
    seen = [bytearray() for _ in fds]
    started = time.monotonic()
    deadline = started + SETUP_S
    with selectors.DefaultSelector() as selector:
        for fd, part in zip(fds, seen, strict=True):
            selector.register(fd, selectors.EVENT_READ, part)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                return seen, "timeout", started
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                elif key.fd == proof_fd and not seen[0]:
                    started = time.monotonic()
                    deadline = started + limits.wall_s
                key.data.extend(chunk)
            if len(seen[1]) + len(seen[2]) > limits.output_bytes or len(seen[0]) > 1024:
                return seen, "output", started
    return seen, "", started


def _end(process: subprocess.Popen) -> None:
    """Everything is dead and buried afterwards: the outer process ends after init, and init after all others."""
    process.terminate()
    try:
        process.wait(SETUP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # takes init with it


def _status(code: int, is_proved: bool) -> str:
    from . import jail  # not where there is no Linux

    if code == 0 and is_proved:
        return "passed"
    if code == jail.NO_MEMORY:
        return "memory"
    if code == 128 + signal.SIGXCPU:
        return "timeout"
    return "killed" if code < 0 or code > 128 else "failed"
