"""Programs that try to get out, to stay, to take everything, or to look as if they had passed: all stopped and failed.

A program that looks for a way out swallows every error and passes only if it found one, so "failed" is the proof.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from llmkit.config import UserError
from llmkit.evaluate import coderunner
from llmkit.evaluate.coderunner import Limits, run_many, run_program

if sys.platform == "linux":
    from llmkit.evaluate import jail
try:
    coderunner.probe()
    missing = ""
except UserError as error:
    missing = str(error)
isolated = pytest.mark.skipif(bool(missing), reason=missing)

SHORT = Limits(wall_s=0.4, cpu_s=1, memory_bytes=256 << 20)
PYTHON = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
SECRET = "a-secret-of-the-parent"
SLEEP = f"77.{os.getpid()}"  # seconds, and a mark of this session


def run(source: str, limits: Limits = Limits()) -> coderunner.Outcome:  # noqa: B008
    return run_program(textwrap.dedent(source).replace("SLEEP", SLEEP), limits)


def leftovers() -> list[bytes]:
    """Command lines of jails that this process started, and of what programs started (`sleep SLEEP`)."""
    marks = (b"jail.py\0%d\0" % os.getpid(), b"sleep\0%s\0" % SLEEP.encode())
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # gone in the meantime
            continue
        found += [line for mark in marks if mark in line]
    return found


@pytest.fixture(autouse=True)
def nothing_stays(request, tmp_path, monkeypatch):
    """No process, no mount, no open file, no file outside; and no way to the secret."""
    monkeypatch.setenv("SECRET", SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text(SECRET, encoding="utf-8")
    is_linux = sys.platform == "linux"
    num_open = len(os.listdir("/proc/self/fd")) if is_linux else 0
    yield
    if is_linux:
        assert leftovers() == []
        mounted = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
        assert [line for line in mounted if line.startswith(("jail ", "sandbox ")) or " /proc/root" in line] == []
        assert len(os.listdir("/proc/self/fd")) == num_open
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]


# ---- what is too much

HELD = {
    "endless loop": ("while True: pass", "timeout"),
    "fork bomb": (
        """
        import os
        while True:
            try: os.fork()
            except OSError: pass
        """,
        "timeout",
    ),
    "8 GB": ("x = bytearray(8 << 30)", "memory"),
    "8 GB in pieces": ("x = []\nwhile True: x.append(bytearray(64 << 20))", "memory"),
    "stdin": ("assert input() is not None", "failed"),
    "ignored signals": (
        """
        import signal, time
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(1)
        while True: time.sleep(60)
        """,
        "timeout",
    ),
    "output": ("while True: print('x' * 1000)", "output"),
    "output on stderr": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "recursion": ("def f(): f()\nf()", "failed"),
    "recursion without a limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return [*map(f, [x])]\nf(1)",
        "killed",
    ),
    "threads": (
        """
        import threading, time
        started = 0
        try:
            while True:
                threading.Thread(target=time.sleep, args=(60,)).start()
                started += 1
        except RuntimeError:
            assert started > 16  # more than the limit, and never
        """,
        "failed",
    ),
    "processes that sleep": (
        """
        import subprocess
        children = [subprocess.Popen(["/bin/sleep", "SLEEP"], start_new_session=True) for _ in range(8)]
        children[0].wait()
        """,
        "timeout",
    ),
    "a full disk": (
        """
        try:
            for n in range(100):
                open(str(n), "wb").write(bytes(1 << 20))
        except OSError:
            assert n > 16
        """,
        "failed",
    ),
    "a large file": ("open('x', 'wb').truncate(1 << 30)", "failed"),
    "open files": ("files = [open('/dev/null') for _ in range(100)]", "failed"),
}  # fmt: skip


@isolated
@pytest.mark.parametrize("name", HELD)
def test_what_takes_too_much_is_stopped(name):
    source, status = HELD[name]
    assert run(source, SHORT).status == status


@isolated
@pytest.mark.medium
def test_cpu_time_ends_a_loop_that_refuses_the_first_signal():
    source = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    outcome = run(source, Limits(cpu_s=1, wall_s=30))
    assert outcome.status == "timeout" and outcome.wall_s < 10


# ---- what stays

STAYS = {
    "daemon": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(64):
                    try: os.close(fd)
                    except OSError: pass
                os.execv("/bin/sleep", ["sleep", "SLEEP"])
            os._exit(0)
        os.wait()
        """,
    "parent leaves": """
        import os
        if os.fork(): os._exit(0)
        """,
    "zombies": """
        import os
        for _ in range(5):
            if os.fork() == 0: os._exit(0)
        os.execv("/bin/sleep", ["sleep", "0"])
        """,
    "init": """
        import os, signal, time
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
            os.kill(1, number)
        os.kill(-1, signal.SIGKILL)
        time.sleep(0.1)
        assert os.getppid() != 1
        """,
    "its process group": """
        import os, signal
        os.killpg(0, signal.SIGTERM)
        os.kill(0, signal.SIGKILL)
        """,
}


@isolated
@pytest.mark.parametrize("name", STAYS)
def test_what_wants_to_stay_ends_with_the_program(name):
    assert run(STAYS[name], SHORT).status in ("failed", "killed")


# ---- what wants out

ANY = """
import ctypes, os, socket, subprocess
found = []
def attempt(action):
    try:
        if action(): found.append(action)
    except OSError: pass
"""

WAYS_OUT = {
    "writes": """
        libraries = os.path.dirname(os.__file__)
        for folder in (OUTSIDE, libraries, "/", "/usr", "/usr/lib", "/dev", "/etc", "/root", "/home", "/var/tmp"):
            attempt(lambda: open(os.path.join(folder, "x"), "w"))
        """,
    "a link": """
        os.symlink(OUTSIDE, "link")
        attempt(lambda: open("link/x", "w"))
        attempt(lambda: open("link/secret").read())
        os.symlink("/usr/lib", "lib")
        attempt(lambda: open("lib/x", "w"))
        attempt(lambda: os.link("/etc/ld.so.cache", "cache"))
        """,
    "files of others": """
        for path in (OUTSIDE + "/secret", PROJECT + "/pyproject.toml", "/etc/passwd", "/proc/1", "/sys/kernel"):
            attempt(lambda: os.path.exists(path))
        """,
    "environment": """
        attempt(lambda: "SECRET" in os.environ)
        attempt(lambda: ctypes.CDLL(None).getenv(b"SECRET"))
        for pid in ("self", "1", os.getppid(), PARENT):
            attempt(lambda: SECRET in open(f"/proc/{pid}/environ").read())
        """,
    "network": """
        for address in (("127.0.0.1", PORT), ("192.0.2.1", 80)):
            attempt(lambda: socket.create_connection(address, timeout=1))
        attempt(lambda: socket.socket(socket.AF_UNIX).connect("\\0llmkit-test") is None)
        attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect(("::1", PORT)) is None)
        for family in (socket.AF_PACKET, socket.AF_VSOCK, 38):  # 38: AF_ALG
            for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW):
                attempt(lambda: socket.socket(family, kind))
        """,
    "other processes": """
        for pid in (PARENT, *range(3, 3000)):
            attempt(lambda: os.kill(pid, 0) is None)
        """,
    "privileges": """
        libc = ctypes.CDLL(None, use_errno=True)
        attempt(lambda: os.setuid(0) is None)
        attempt(lambda: os.chroot("/") is None)
        for flags in (0x10000000, 0x20000, 0x40000000):
            attempt(lambda: libc.unshare(flags) == 0)
        attempt(lambda: libc.mount(b"x", b"/sandbox", b"tmpfs", 0, None) == 0)
        attempt(lambda: libc.ptrace(16, 1, None, None) == 0)  # PTRACE_ATTACH to init
        attempt(lambda: os.mknod("disk", 0o60600, os.makedev(8, 0)) is None)
        attempt(lambda: os.memfd_create("x"))
        for number in NUMBERS:  # those that no limit or namespace holds, and their x32 twins
            for n in (number, number | 0x40000000):
                attempt(lambda: libc.syscall(ctypes.c_long(n), 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != 1)
        attempt(lambda: libc.sethostname(b"x", 1) == 0)
        """,
    "subprocess": """
        shell = lambda line: subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True)
        assert shell("echo works").stdout == "works\\n"
        attempt(lambda: SECRET in shell(f"env; cat /proc/*/environ; cat {OUTSIDE}/secret").stdout)
        attempt(lambda: shell(f"echo x > {OUTSIDE}/x").returncode == 0)
        """,
    "open files of the parent": """
        num_open = 0
        for fd in range(64):
            try: num_open += os.fstat(fd) is not None
            except OSError: pass
        attempt(lambda: num_open > 5)  # stdin, stdout, stderr, and the two pipes of the proof
        for fd in range(3, 64):
            attempt(lambda: SECRET in os.read(fd, 1 << 16).decode("latin-1"))
        """,
}  # fmt: skip


NUMBERS = [] if missing else [n[jail.MACHINES[os.uname().machine][0]] for n in jail.CALLS.values()]


@isolated
@pytest.mark.parametrize("name", WAYS_OUT)
def test_there_is_no_way_out(name, tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        open(tmp_path / "outside" / "secret", encoding="utf-8") as file,
    ):
        os.set_inheritable(file.fileno(), True)
        named = {
            "OUTSIDE": str(tmp_path / "outside"), "PROJECT": str(Path(coderunner.__file__).parents[2]),
            "SECRET": SECRET, "PARENT": os.getpid(), "PORT": server.getsockname()[1], "NUMBERS": NUMBERS,
        }  # fmt: skip
        lines = [f"{key} = {value!r}" for key, value in named.items()]
        source = "\n".join(
            [ANY, *lines, textwrap.dedent(WAYS_OUT[name]), "print('to its end', flush=True)", "assert found"]
        )
        outcome = run_program(source)
    assert outcome.stdout == "to its end\n" and outcome.status == "failed", outcome


# ---- what looks as if it had passed

FORGED = {
    "printed": "print('passed')\nassert False",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit in a thread's place": "raise SystemExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "a guessed nonce": """
        import os
        for fd in range(3, 64):
            try: os.write(fd, b"ready\\n" + bytes(32))
            except OSError: pass
        """,
    "a wrong nonce and an end": """
        import os
        for fd in range(3, 64):
            try: os.write(fd, bytes(32))
            except OSError: pass
        os._exit(0)
        """,
    "everything copied everywhere": """
        import os
        found = b""
        for fd in range(64):
            try: found += os.read(fd, 64)
            except OSError: pass
        for fd in range(3, 64):
            try: os.write(fd, found)
            except OSError: pass
        os._exit(0)
        """,
    "a flood of proofs": """
        import os
        while True:
            for fd in range(3, 64):
                try: os.write(fd, bytes(4096))
                except OSError: pass
        """,
    "a fork that goes on": """
        import os
        if os.fork():
            os.wait()
            os._exit(0)
        """,
    "patched functions": """
        import os, sys
        os._exit = lambda code: None
        os.getpid = lambda: 2
        sys.__excepthook__ = sys.excepthook = lambda *_: None
        assert False
        """,
    "silent streams": "import sys\nsys.stdout.close()\nsys.stderr.close()\nassert False",
    "no program": "def f(:",
    "no text": "\udc80 = 1",
    "a zero": "x = '\0'",
    "brackets": "(" * 100_000,
    "crash": "import ctypes\nctypes.string_at(0)",
}


@isolated
@pytest.mark.parametrize("name", FORGED)
def test_what_only_looks_as_if_it_had_passed_has_not(name):
    assert run(FORGED[name], SHORT).status in ("failed", "killed", "memory", "output")


# ---- what is right

GOOD = {
    "nothing": "",
    "text": "assert 'é字'.upper() == 'É字'\nprint('é字')",
    "data class": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
    "pickle": "import pickle\nclass A: pass\nassert isinstance(pickle.loads(pickle.dumps(A())), A)",
    "scratch": "import tempfile\ntempfile.TemporaryFile().write(b'x')\nopen('y', 'w')\nopen('y')",
    "threads": "from concurrent.futures import *\nassert [*ThreadPoolExecutor(4).map(int, '1234')] == [1, 2, 3, 4]",
    "a child, waited for": "import os\nif os.fork() == 0: os._exit(3)\nassert os.WEXITSTATUS(os.wait()[1]) == 3",
    "a child, not waited for": "import os, time\nif os.fork() == 0: os._exit(0)\ntime.sleep(0.1)",
    "interpreter": "import subprocess, sys\nassert subprocess.check_output([sys.executable, '-V'])[:6] == b'Python'",
    "libraries": "import decimal, hashlib, json, math, random, re, sqlite3, statistics, zlib",
    "no main": "if __name__ == '__main__': raise ValueError",
    "other output": "import sys\nsys.stdout = sys.stderr = None",
    "closed output": "import sys\nsys.stdout.close()",
    "output": "print('x' * 100_000)",
}  # fmt: skip


@isolated
@pytest.mark.parametrize("name", GOOD)
def test_good_programs_pass(name):
    outcome = run(GOOD[name])
    assert outcome.status == "passed", outcome


@isolated
def test_an_outcome_says_what_was_printed_and_what_went_wrong():
    outcome = run("print('é')\nassert 1 == 2, 'sums'")
    assert (outcome.status, outcome.stdout) == ("failed", "é\n")
    assert 'File "program.py", line 2' in outcome.stderr and outcome.stderr.endswith("AssertionError: sums\n")


@isolated
def test_the_same_program_meets_the_same_order_of_sets():
    """Hash seeds are fixed: a verdict that depends on the order of a set is the same every time."""
    assert len({run("print(list(map(str, {'a', 'b', 'c', 'd', 'e'})))").stdout for _ in range(4)}) == 1


@isolated
def test_many_at_once_keep_their_order():
    told = []
    outcomes = run_many(["assert 1", "assert 0", "while 1: pass", "print(3)"], SHORT, 3, lambda *n: told.append(n))
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "timeout", "passed"]
    assert outcomes[3].stdout == "3\n" and told == [(0, 4), (1, 0), (1, 0), (1, 0), (1, 0)]


@isolated
def test_programs_die_with_whoever_runs_them():
    """`kill -9` of the caller while a program sleeps."""
    code = "from llmkit.evaluate.coderunner import run_program\nrun_program('import time; print(1); time.sleep(77)')"
    caller = subprocess.Popen([sys.executable, "-c", code], env=PYTHON)
    mark = b"jail.py\0%d\0" % caller.pid

    def count() -> int:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return sum(mark in line for line in lines)

    def wait_for(num: int) -> None:
        for _ in range(200):
            if count() == num:
                return
            time.sleep(0.05)
        raise AssertionError(f"{count()} processes, expected {num}")

    wait_for(3)  # outer, init, program
    caller.kill()
    caller.wait()
    wait_for(0)


@isolated
def test_root_of_a_container_who_has_no_other_ids_may_run_programs():
    """There nobody, whom programs run as, is not mapped, and mounts for nobody were invalid."""
    if not (tool := shutil.which("unshare")):
        pytest.skip("needs the tool unshare")
    code = "from llmkit.evaluate import coderunner as c; print(c._run('', c.Limits()))"
    command = [tool, "--user", "--map-root-user", sys.executable, "-c", code]
    done = subprocess.run(command, env=PYTHON, capture_output=True, text=True)
    assert "status='passed'" in done.stdout, done.stderr


# ---- where it does not hold

HOLES = {
    "network interfaces": ("| CLONE_NEWNET ", ""),
    "other processes": ("| CLONE_NEWPID ", ""),
    "environment": ("def main() -> None:", "def main() -> None:\n    os.environ['SECRET'] = ''"),
    "privileges": ("    drop_privileges(parent)\n", ""),
    "no limit of memory": ("resource.RLIMIT_AS:", "resource.RLIMIT_DATA + 1000 if 0 else resource.RLIMIT_RSS:"),
    "no limit of processes": ("(num_processes + 2,) * 2", "(1000, 1000)"),
    "the file system": ("SYSTEM = (", "SYSTEM = (TMP, "),
    "system calls": ("    filter_system_calls()\n", ""),
    "unshare: Operation not permitted": ("    enter_names", "    raise OSError('unshare: Operation not permitted')\n#"),
}  # fmt: skip


@isolated
@pytest.mark.parametrize("name", HOLES)
def test_the_probe_refuses_a_sandbox_with_a_hole(name, tmp_path, monkeypatch):
    old, new = HOLES[name]
    source = coderunner.JAIL.read_text(encoding="utf-8")
    assert old in source
    (tmp_path / "jail.py").write_text(source.replace(old, new.replace("TMP", repr(str(tmp_path)))), encoding="utf-8")
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(coderunner, "JAIL", tmp_path / "jail.py")
    coderunner.probe.cache_clear()
    with pytest.raises(UserError, match=f"^allow_code_execution: programs cannot be shut off .*{name}.*$") as refused:
        run_many(["open('ran', 'w')"])
    assert "\n" not in str(refused.value)


def test_elsewhere_than_on_linux_it_refuses(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    coderunner.probe.cache_clear()
    with pytest.raises(UserError, match="needs Linux, and this is darwin"):
        run_program("")
