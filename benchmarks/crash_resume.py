"""Crashes: a run that is killed over and over, finds a bit flipped or a full disk, must end with the same weights.

Owns the measurement of what `llmkit pretrain --resume_from_checkpoint true` promises, from outside, by its command:

    python benchmarks/crash_resume.py --kills 20     # about 4 minutes on one core; exit code 1 if a promise is broken

1. Kills by SIGKILL: every second one inside the save of a checkpoint, beginning with the very first save, the last
   one inside that of the final `model/`, the others at a random moment of training. After every kill the newest
   checkpoint must be whole.
2. Bits: one flipped anywhere in any file of a checkpoint must be noticed, and the run go on from the one before.
3. A disk that fills up during a save (a small tmpfs, so root only): one line, exit code 2, and room is all it needs.

Weights and losses are compared bit for bit with a run that was left alone, on the same machine, in one thread.
Leaves out power cuts (what the kernel had not yet written) and runs of several processes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from llmkit.train.checkpoint import damage

SAVE_STEPS = 8
STEPS_PER_KILL = 3 * SAVE_STEPS  # more than one life gains over its checkpoint: no run ends before its kills
FLIPS_PER_FILE = 20
WEIGHTS = "model/model.safetensors"
# one file of each kind, for the flips that are followed by a whole resume
KINDS = [WEIGHTS, "model/config.json", "model/modeling_llmkit.py", "optimizer.safetensors", "state.safetensors"]
KINDS += ["state.json", "index.json"]
# dropout and accumulation, so that random generators and the share of every micro-batch must come back too
RECIPE = {
    "config_overrides": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.1,
    },
    "vocab_size": 512,
    "datasets": [{"path": "builtin/toyworld", "split": "train[:2000]"}],
    "eval_datasets": [{"path": "builtin/toyworld", "name": "facts", "split": "validation[:20]"}],
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optim": "muon",
    "logging_steps": 1,
    "eval_steps": 40,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 3,
    "sample_prompts": [],
    "use_cpu": True,
}


class Bench:
    """The recipe, the weights and losses of the run that was left alone, and the promises that were broken."""

    def __init__(self, folder: Path, max_steps: int):
        self.folder, self.max_steps = folder, max_steps
        self.recipe = folder / "recipe.yaml"
        settings = {"output_dir": "set below", "store_dir": str(folder / "data"), "max_steps": max_steps}
        self.recipe.write_text(yaml.safe_dump({**RECIPE, **settings}), encoding="utf-8")
        self.broken: list[str] = []

    def start(self, run: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-m", "llmkit", "pretrain", str(self.recipe), "--output_dir", str(run)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *options], stdout=pipe, stderr=pipe, text=True, env=environment)

    def run(self, run: Path, *options: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a run that nobody disturbs."""
        process = self.start(run, *options)
        out, err = process.communicate()
        return process.returncode, out, err

    def expect(self, is_kept: bool, what: str) -> None:
        print(f"{'ok' if is_kept else 'BROKEN':<8}{what}", flush=True)
        if not is_kept:
            self.broken.append(what)

    def has_same_end(self, run: Path) -> bool:
        """The weights of the run that was left alone, in every bit of every tensor and of the file."""
        path, reference = run / WEIGHTS, self.folder / "alone" / WEIGHTS
        if not path.exists():
            return False
        ours, theirs = load_file(path), load_file(reference)
        is_same = ours.keys() == theirs.keys() and all(
            torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours
        )
        return is_same and digest(path) == digest(reference)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of the log that training wrote, in the order of the file."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]
    return []


def newest(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step-*"), default=None)


# ---- 1. kills


def wait_until(is_time: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Looks every millisecond; gives up when the process has ended."""
    while not is_time() and process.poll() is None:
        time.sleep(0.001)


def kill_once(bench: Bench, run: Path, aim: str, rng: random.Random) -> bool:
    """Starts or resumes the run, kills it as `aim` says; True inside a save. RuntimeError when it ended by itself."""
    process = bench.start(run, "--resume_from_checkpoint", "true")
    assert process.stdout and process.stderr
    is_training = any(line.startswith("resume ") for line in process.stdout)  # reads on to that line, or the end
    folder = newest(run)
    due = (int(folder.name.split("-")[1]) if folder else 0) + rng.randint(1, 2 * SAVE_STEPS)
    partials = {aim: lambda: [*run.glob("checkpoints/.step-*")] for aim in ("first save", "save")}
    partials["final save"] = lambda: [*run.glob(".model.*")]
    if aim in ("save", "any moment"):
        wait_until(lambda: len(losses(run)) >= due, process)
    if aim in partials:
        wait_until(partials[aim], process)
    time.sleep(rng.uniform(0, 0.010 if aim in partials else 0.050))
    is_alive = is_training and process.poll() is None
    process.kill()
    _, err = process.communicate()
    if not is_alive:
        raise RuntimeError(f"exit code {process.returncode} {err.strip()}")
    return any(look() for look in partials.values())


def measure_kills(bench: Bench, num_kills: int, rng: random.Random) -> Path | None:
    """Returns a copy of the run as the last kill left it; None when it could not be killed that often."""
    run, num_inside, num_whole = bench.folder / "killed", 0, 0
    print(f"{'kill':<8}{'aimed at':<13}{'steps logged':>12}  {'inside a save':<15}newest checkpoint", flush=True)
    for i in range(1, num_kills + 1):
        aim = "first save" if i == 1 else "final save" if i == num_kills else "save" if i % 2 else "any moment"
        try:
            is_inside = kill_once(bench, run, aim, rng)
        except RuntimeError as error:
            bench.expect(False, f"kill {i} of {num_kills}: the run ended by itself: {error}")
            return None
        checkpoint = newest(run)
        wrong = damage(checkpoint) if checkpoint else None
        num_inside, num_whole = num_inside + is_inside, num_whole + (wrong is None)
        state = f"{checkpoint.name} {wrong or 'whole'}" if checkpoint else "none yet"
        partial = "partial folder" if is_inside else ""
        print(f"{f'{i}/{num_kills}':<8}{aim:<13}{len(losses(run)):>12}  {partial:<15}{state}", flush=True)
    shutil.copytree(run, bench.folder / "snapshot")
    code, _, err = bench.run(run, "--resume_from_checkpoint", "true")
    found, alone = losses(run), losses(bench.folder / "alone")
    bench.expect(num_inside >= num_kills // 4, f"{num_inside} of {num_kills} kills landed inside a save")
    bench.expect(num_whole == num_kills, f"{num_whole} of {num_kills} kills left the newest checkpoint whole")
    bench.expect(code == 0, f"after {num_kills} resumes the run ends with exit code {code} {err.strip()}")
    steps = [step for step, _ in found]
    bench.expect(steps == [*range(1, bench.max_steps + 1)], f"{len(set(steps)):,} steps logged, {len(steps):,} lines")
    same = sum(a == b for a, b in zip(found, alone, strict=False))
    bench.expect(same == len(alone) == len(found), f"{same:,} of {len(alone):,} losses equal those of the run alone")
    bench.expect(bench.has_same_end(run), f"final weights equal in every bit, sha256 {digest(run / WEIGHTS)[:16]}")
    left = [path.name for path in run.rglob(".*")]
    bench.expect(not left, f"{len(left)} hidden files left behind {' '.join(left)}")
    return bench.folder / "snapshot"


# ---- 2. bits


def flip_bit(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))


def measure_bits(bench: Bench, snapshot: Path, rng: random.Random) -> None:
    checkpoint = newest(snapshot)
    assert checkpoint, "the killed run has saved"
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    num_seen = 0
    for path in paths:
        bits = rng.sample(range(path.stat().st_size * 8), FLIPS_PER_FILE)
        for bit in bits:
            flip_bit(path, bit)
            num_seen += damage(checkpoint) is not None
            flip_bit(path, bit)
    total = len(paths) * FLIPS_PER_FILE
    bench.expect(num_seen == total, f"{num_seen} of {total} flipped bits noticed, {FLIPS_PER_FILE} in each file")
    bench.expect(damage(checkpoint) is None, "flipped back, the checkpoint is whole again")
    for name in KINDS:
        run = bench.folder / "flipped"
        shutil.copytree(snapshot, run)
        before, last = sorted((run / "checkpoints").glob("step-*"))[-2:]
        flip_bit(last / name, rng.randrange((last / name).stat().st_size * 8))
        code, out, _ = bench.run(run, "--resume_from_checkpoint", "true")
        blamed = "" if name == "index.json" else name  # a changed index blames the file whose line was hit
        is_said = f"{last.name} is damaged: {blamed}" in out and f"{before.name}, step" in out
        is_good = code == 0 and is_said and bench.has_same_end(run)
        bench.expect(is_good, f"{name}: said so, resumed from {before.name}, same final weights")
        shutil.rmtree(run)


# ---- 3. a full disk


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], None] | None]:
    """A tmpfs of that size, and what gives it another; None where mounting is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return

    def resize(num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def measure_full_disk(bench: Bench) -> None:
    one = newest(bench.folder / "alone")
    assert one, "the run alone has saved"
    num_bytes = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    room = 2 * num_bytes * bench.max_steps // SAVE_STEPS  # for every checkpoint: less is refused before training
    with small_disk(bench.folder / "disk", room) as resize:
        if resize is None:
            print("skipped  a full disk: mounting a small tmpfs is not permitted here (needs root)")
            return
        run = bench.folder / "disk" / "run"
        keep_all = ("--resume_from_checkpoint", "true", "--save_total_limit", "null")

        def fill_up() -> None:
            while not newest(run):
                time.sleep(0.01)
            usage = shutil.disk_usage(bench.folder / "disk")
            resize(usage.used + int(1.6 * num_bytes))  # one more checkpoint, and most of another

        filler = threading.Thread(target=fill_up, daemon=True)
        filler.start()
        code, _, err = bench.run(run, *keep_all)
        filler.join(timeout=5)
        lines = err.strip().splitlines()
        is_said = len(lines) == 1 and "the disk is full" in lines[0]
        bench.expect(code == 2 and is_said, f"a full disk: exit code {code}, {len(lines)} line: {err.strip()}")
        good = sorted((run / "checkpoints").iterdir())
        names = ", ".join(path.name for path in good)
        is_whole = bool(good) and all(damage(path) is None for path in good)
        bench.expect(is_whole, f"what is left there is whole: {names}")
        resize(room)
        code, out, err = bench.run(run, *keep_all)
        is_resumed = code == 0 and bool(good) and f"{good[-1].name}, step" in out
        bench.expect(is_resumed, f"with room made, it resumes from {names[-13:]}: exit code {code} {err.strip()}")
        bench.expect(losses(run) == losses(bench.folder / "alone"), "its log holds every step once, with equal losses")
        bench.expect(bench.has_same_end(run), "its final weights are equal in every bit")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits (default 0)")
    parser.add_argument("--output_dir", type=Path, help="keep the runs in this new folder (default: a temporary one)")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills {args.kills}; allowed: 1 or more")
    if args.output_dir and args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir}: exists already; name a new folder")
    started, rng = time.perf_counter(), random.Random(args.seed)
    with contextlib.ExitStack() as stack:
        folder = args.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder.resolve(), args.kills * STEPS_PER_KILL)
        code, _, err = bench.run(bench.folder / "alone")
        bench.expect(code == 0, f"{bench.max_steps} steps, left alone: exit code {code} {err.strip()}")
        if not bench.broken:
            snapshot = measure_kills(bench, args.kills, rng)
            if snapshot:
                measure_bits(bench, snapshot, rng)
            measure_full_disk(bench)
    print(f"{len(bench.broken)} promises broken, {time.perf_counter() - started:.0f} s", flush=True)
    return 1 if bench.broken else 0


if __name__ == "__main__":
    sys.exit(main())
