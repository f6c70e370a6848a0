"""The inside of coderunner.py: a script of its own that shuts itself off from this Linux machine, then runs a program.

    python -P -s -S jail.py PARENT_PID NONCE_FD PROOF_FD CPU_S MEMORY PROCESSES FILE_BYTES FILES   < program

Three processes. The outer one (this script) moves into new namespaces and a root of its own, gives up every privilege
and waits; SIGTERM ends it all. Its child is init of the PID namespace: whatever happens to it, the kernel ends all that
is in there. Init's child runs the program, in a fork: a fresh interpreter would cost another 7 ms. The exit code says
how that went. Needs Linux 5.12 (mount_setattr; limits of processes hold from 5.14 on) and only Python: os.unshare
comes with 3.12 only, and mount, pivot_root and capset never, hence ctypes; the tools of util-linux would cost a process
for each step. Leaves out wall time and amount of output, which the caller watches.
"""

import ctypes
import os
import resource
import select
import signal
import struct
import sys
import types
from collections.abc import Callable

FAILED, NO_MEMORY, LEFT_BEHIND = 1, 3, 4  # exit codes; 0: ran to its end; 128 + n: signal n
NOBODY = 65534  # no root: the kernel counts processes of everyone but root

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
SPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = 2, -100, 0x8000, 442
READ_ONLY, NO_SUID = 1, 2  # MOUNT_ATTR_*
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CAPABILITIES = 0x20080522  # version 3 of the interface

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
# System calls that no namespace holds: sockets of unusual kinds (a virtual machine's vsock reaches its host), keyrings,
# io_uring (sockets again), memory that no limit counts (memfd, shared segments), what looks into the kernel
CALLS = {  # asm/unistd.h of x86_64 and aarch64
    "shmget": (29, 194), "memfd_create": (319, 279), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "io_uring_setup": (425, 425), "ptrace": (101, 117), "perf_event_open": (298, 241),
    "bpf": (321, 280), "userfaultfd": (323, 282),
}  # fmt: skip
SOCKET, AF_NETLINK = (41, 198), 16  # the last of the families that are let through, after Unix and IP
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
REFUSE, ALLOW, KILL = 0x00050001, 0x7FFF0000, 0x80000000  # 1: EPERM

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: int | bytes | ctypes.Structure | ctypes.Array | None) -> None:
    """A function of libc; its failure is an OSError that names it. Numbers go as long, which every argument fits."""
    if getattr(libc, name)(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from None


# ---- away from the machine


def enter_namespaces() -> None:
    """User, mount, PID (for children), network, IPC and host name. Anyone may who may have a user namespace."""
    uid, gid = os.geteuid(), os.getegid()
    maps = {name: _own_ids(f"/proc/self/{name}") for name in ("uid_map", "gid_map")}
    if uid != 0 or not all(_holds(text, NOBODY) for text in maps.values()):
        call("unshare", SPACES)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        return
    # root keeps all ids for now, to reach an interpreter in whosever home; only a process outside may map them
    moved, has_moved = os.pipe()
    me, helper = os.getpid(), os.fork()
    if helper == 0:
        os.close(has_moved)
        if os.read(moved, 1):
            for name, text in maps.items():
                write(f"/proc/{me}/{name}", text)
        os._exit(0)
    call("unshare", SPACES)
    os.write(has_moved, b"x")
    os.close(has_moved)
    os.close(moved)
    if os.waitpid(helper, 0)[1]:
        raise OSError("uid_map: cannot be written")


def _own_ids(path: str) -> str:
    """A map of all ids that there are here to themselves."""
    with open(path, encoding="ascii") as file:
        return "".join(f"{inner} {inner} {count}\n" for inner, _, count in map(str.split, file))


def _holds(ids: str, wanted: int) -> bool:
    ranges = [[int(word) for word in line.split()] for line in ids.splitlines()]
    return any(first <= wanted < first + count for first, _, count in ranges)


def change_root(scratch_bytes: int) -> None:
    """A root with the interpreter, system folders and three devices, all read-only, and an empty /sandbox."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    new = "/proc"  # any folder that surely exists and holds nothing of what is shown
    libraries = [f"{prefix}/{lib}" for prefix in (sys.prefix, sys.exec_prefix) for lib in ("lib", sys.platlibdir)]
    shown = [*SYSTEM, *DEVICES, *libraries, os.path.realpath(sys.executable)]
    mount("jail", new, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    inner = f"{new}/root"
    os.mkdir(inner)
    for path in shown:
        _show(path, inner)
    os.mkdir(f"{inner}/sandbox")
    if not os.path.lexists(f"{inner}/tmp"):
        os.symlink("sandbox", f"{inner}/tmp")
    os.chdir(new)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    options = f"size={scratch_bytes},nr_inodes=1k,mode=700,uid={NOBODY},gid={NOBODY}"
    mount("sandbox", "/root/sandbox", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chroot("/root")  # who is in a chroot gets no user namespace, so no privileges in one of its own either
    os.chdir("/sandbox")


def _show(path: str, root: str) -> None:
    """The same path below the new root, with what is mounted there."""
    target = root + path
    if not os.path.exists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):  # /lib -> usr/lib
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    mount(path, target, "", MS_BIND | MS_REC)


def drop_privileges(parent: int) -> None:
    if os.getuid() != NOBODY:
        os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads init's memory or changes it; no core dumps
    filter_system_calls()
    die_with(parent)  # changing the user has undone it


def filter_system_calls() -> None:
    """seccomp: EPERM for CALLS and for sockets of families above netlink's. Raises OSError."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"seccomp: system calls of {machine} are unknown; known: {', '.join(MACHINES)}")
    column, arch = MACHINES[machine]
    denied = [numbers[column] for numbers in CALLS.values()]
    load, equal, above, give = 0x20, 0x15, 0x25, 0x06  # of a 32-bit word; jump by (if so, if not) instructions; return
    checks = [
        *((equal, len(denied) - i + 4, 0, number) for i, number in enumerate(denied)),
        (above, 4, 0, 0x3FFFFFFF),  # the x32 twins of all calls
        (equal, 0, 2, SOCKET[column]),
        (load, 0, 0, 16),  # the family
        (above, 1, 0, AF_NETLINK),
        (give, 0, 0, ALLOW),
        (give, 0, 0, REFUSE),
    ]
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, KILL), (load, 0, 0, 0), *checks]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    address = ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p).value
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HxxxxxxQ", len(program), address), 0, 0)


def die_with(parent: int) -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # too late
        os._exit(FAILED)


# ---- the program


def init(run_program: Callable[[], None], cpu_s: int) -> int:
    """PID 1: starts the program, buries what has died, and says how the program ended."""
    program = os.fork()
    if program == 0:
        run_program()
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            break
    if os.WIFSIGNALED(status):
        is_late = usage.ru_utime + usage.ru_stime >= cpu_s
        return 128 + (signal.SIGXCPU if is_late else os.WTERMSIG(status))
    code = os.WEXITSTATUS(status)
    return LEFT_BEHIND if code == 0 and _has_children() else code


def _has_children() -> bool:
    """Orphans come to init: those that still run."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def run(source: bytes, nonce_fd: int, proof_fd: int) -> None:
    """Runs the program, and then shows that it came to its end: the nonce, turned round, from one pipe into the other.

    Until then it is in no memory of this process. Turned round, since a program that copies whatever it can read to
    wherever it can write has not come to its end. Never returns.
    """
    me, getpid, read, write, leave = os.getpid(), os.getpid, os.read, os.write, os._exit
    module = types.ModuleType("program")  # not __main__: what is under `if __name__ == ...` is no part of an answer
    sys.modules["program"], sys.argv = module, ["program.py"]
    code = FAILED
    try:
        exec(compile(source.decode("utf-8", "surrogatepass"), "program.py", "exec"), module.__dict__)
        _flush()
        if getpid() == me:  # a fork that falls out of the program is not the program
            write(proof_fd, read(nonce_fd, 64)[::-1])
            code = 0
    except MemoryError:
        code = NO_MEMORY
    except BaseException:  # SystemExit too: the tests were to come after it
        sys.__excepthook__(*sys.exc_info())
        _flush()
    finally:
        leave(code)


def _flush() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):  # ours: what the program put in their place may be anything
        if stream and not stream.closed:
            stream.flush()


def set_limits(cpu_s: int, memory: int, num_processes: int, file_bytes: int, num_files: int) -> None:
    limits = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),  # SIGXCPU, and a second later SIGKILL
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_NPROC: (num_processes + 2,) * 2,  # the outer process and init count
        resource.RLIMIT_FSIZE: (file_bytes, file_bytes),
        resource.RLIMIT_NOFILE: (num_files, num_files),
        resource.RLIMIT_STACK: (8 << 20, 8 << 20),
        resource.RLIMIT_CORE: (1, 1),  # 0 would still feed a core_pattern that is a pipe
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        allowed = [value if hard == resource.RLIM_INFINITY else min(value, hard) for value in limit]
        resource.setrlimit(which, (allowed[0], allowed[1]))


def main() -> None:
    parent, nonce_fd, proof_fd, cpu_s, memory, num_processes, file_bytes, num_files = map(int, sys.argv[1:])
    die_with(parent)
    source = sys.stdin.buffer.read()  # to its end, so that nobody waits for more
    write("/proc/self/oom_score_adj", "1000")  # where memory runs short this goes, and not the model that is asked
    enter_namespaces()
    change_root(file_bytes)
    drop_privileges(parent)

    def program() -> None:
        set_limits(cpu_s, memory, num_processes, file_bytes, num_files)
        run(source, nonce_fd, proof_fd)

    outer_ends, outer_lives = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outer_lives)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if select.select([outer_ends], [], [], 0)[0]:  # the outer process died before that line
            os._exit(FAILED)
        os.close(outer_ends)
        os.setsid()  # a signal to one's process group would reach the caller, PID namespace or not
        os.write(proof_fd, b"ready\n")  # before the program exists, so that it cannot say otherwise
        os._exit(init(program, cpu_s))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(str(error))
