"""What running a program shut off costs: an empty program by the code runner, and what it is made of.

    python benchmarks/code_runner.py --rounds 5 --programs 20

Prints the median over rounds of milliseconds a program. `interpreter` is a bare Python, `unshare tool` the
namespaces alone as util-linux makes them (`unshare -Urpfmni true`), `mount tools` those and a root of binds by `mount`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from llmkit.evaluate import coderunner

BINDS = "mount -t tmpfs x /proc; for d in usr bin sbin lib lib64; do mkdir /proc/$d; mount --rbind /$d /proc/$d; done"


def command(*words: str) -> Callable[[int], None]:
    def start(num: int) -> None:
        for _ in range(num):
            subprocess.run(words, check=True, capture_output=True)

    return start


def ours(num_workers: int) -> Callable[[int], None]:
    def start(num: int) -> None:
        outcomes = coderunner.run_many(["assert True"] * num, num_workers=num_workers)
        assert all(outcome.status == "passed" for outcome in outcomes)

    return start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", type=int, default=20)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    python = os.path.realpath(sys.executable)
    ways = {"interpreter": command(python, "-P", "-s", "-S", "-c", "pass")}
    if shutil.which("unshare"):
        spaces = ("unshare", "-Urpfmni")
        ways |= {"unshare tool": command(*spaces, "true"), "mount tools": command(*spaces, "sh", "-c", BINDS)}
    ways |= {"code runner, one at a time": ours(1), f"code runner, {cores} at a time": ours(cores)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    coderunner.probe()
    for _ in range(args.rounds):  # in alternation: what else the machine does falls on all
        for name, way in ways.items():
            started = time.perf_counter()
            way(args.programs)
            seconds[name].append((time.perf_counter() - started) / args.programs)
    for name, found in seconds.items():
        print(f"{name:<28} {1e3 * statistics.median(found):6.1f} ms")


if __name__ == "__main__":
    main()
