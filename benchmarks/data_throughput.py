"""How fast text becomes a token store, and in how much memory, beside `datasets` and beside the bare tokenizer.

    python benchmarks/data_throughput.py                      # 10 MB, 100 MB, 1 GB: about 25 minutes on two cores
    python benchmarks/data_throughput.py --sizes 10 --repeats 3 --json out.json

The text: the Python sources of the installed packages as JSON lines; repeats are salted, so that no word of five
letters or more comes back. The same 32,768-id BPE for all. Arms, each in a process tree of its own, in alternation,
medians, imports untimed:

    llmkit     a process per core reads shares of the file and writes parts (read_share, StoreWriter), which are joined
    datasets   load_dataset("json") untimed, then map(batched=True, num_proc=cores) and writing a memmap, like nanoGPT
    bare       encode_batch_fast of texts that are in memory already, all threads; nothing is read or written

Peak memory is the proportional set size (PSS) of the tree, sampled ten times a second. Then, on one core: cleaning with
and without MinHash signatures, and the loader on the largest store (best-fit, context 1,024).
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
ARMS = ("llmkit", "datasets", "bare")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
VOCAB_SIZE, TRAINING_BYTES = 32768, 50_000_000
LONGEST = 250_000  # a few tables in Python are longer and have no place to cut: llmkit counts and refuses those
LONG_WORD = re.compile(r"\b[A-Za-z_]{5,}\b")


# text and tokenizer


def sources() -> Iterator[str]:
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip() and "\0" not in text and len(text) < LONGEST:
                yield text


def write_text(path: Path, num_bytes: int) -> None:
    size = salt = 0
    partial_path = path.with_suffix(".partial")
    with partial_path.open("w", encoding="utf-8") as file:
        while size < num_bytes:
            for text in sources():
                if salt:
                    text = LONG_WORD.sub(rf"\g<0>{'abcdefgh'[salt % 8]}{salt}", text)
                size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if size >= num_bytes:
                    break
            salt += 1
    partial_path.rename(path)


def get_tokenizer(folder: Path) -> Path:
    from llmkit.data.tokenizer import train_bpe

    path = folder / "tokenizer"
    if not path.exists():

        def texts() -> Iterator[str]:
            left = TRAINING_BYTES
            for text in sources():
                yield text
                left -= len(text)
                if left < 0:
                    return

        train_bpe(texts(), VOCAB_SIZE).save_pretrained(path)
    return path


# the arms, each in its own process


@lru_cache(1)
def get_core(tokenizer: Path) -> Any:
    """One for each process: what it has learnt about words stays for the next share."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer / "tokenizer.json"))


def write_part(text: Path, tokenizer: Path, folder: Path, share_and_rank: tuple) -> int:
    from llmkit.data.encode import StoreWriter
    from llmkit.data.read import read_share
    from llmkit.data.sources import Source

    share, rank = share_and_rank
    part = folder / f"{rank:05d}"
    part.mkdir(parents=True)
    core = get_core(tokenizer)
    writer = StoreWriter(part, core, core.token_to_id("<|endoftext|>"))
    held, size = [], 0
    for row in read_share(Source(path="json", data_files=str(text)), share, 64 << 20):
        held.append(row.text)
        size += len(row.text)
        if size > 1 << 20:
            writer.write(held)
            held, size = [], 0
    writer.write(held)
    writer.close()
    return writer.num_bytes - sum(size for _, size in writer.refused)


def arm_llmkit(text: Path, tokenizer: Path, out: Path) -> tuple[float, int]:
    import multiprocessing

    from llmkit.data.encode import merge_stores
    from llmkit.data.read import plan_shares, share_size
    from llmkit.data.sources import Source

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start = time.perf_counter()
    source = Source(path="json", data_files=str(text))
    shares, _ = plan_shares(source, Path("/"), share_size(text.stat().st_size, CORES))
    work = [(share, rank) for rank, share in enumerate(shares)]
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        pool.map(partial(write_part, text, tokenizer, out / "parts"), work, chunksize=1)
    counts = merge_stores(sorted((out / "parts").iterdir()), out / "store")
    return time.perf_counter() - start, counts["num_tokens"]


def arm_datasets(text: Path, tokenizer: Path, out: Path) -> tuple[float, int]:
    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(out / "cache"))
    made = AutoTokenizer.from_pretrained(tokenizer)
    eos = made.eos_token_id
    start = time.perf_counter()

    def encode(batch: dict) -> dict:
        ids = [[*found, eos] for found in made(batch["text"], add_special_tokens=False)["input_ids"]]
        return {"ids": ids, "len": list(map(len, ids))}

    encoded = rows.map(encode, batched=True, num_proc=CORES, remove_columns=["text"], batch_size=100)
    total = sum(encoded["len"])
    tokens = np.memmap(out / "train.bin", np.uint16, "w+", shape=(total,))
    at = 0
    for k in range(shards := min(1024, len(encoded))):
        batch = encoded.shard(num_shards=shards, index=k, contiguous=True).with_format("numpy")
        found = np.concatenate(batch["ids"])
        tokens[at : at + len(found)] = found
        at += len(found)
    tokens.flush()
    return time.perf_counter() - start, total


def arm_bare(text: Path, tokenizer: Path, out: Path) -> tuple[float, int]:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    core = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    core.encode_special_tokens = True
    seconds, total, held, size = 0.0, 0, [], 0

    def encode() -> tuple[float, int]:
        start = time.perf_counter()
        found = core.encode_batch_fast(held, add_special_tokens=False)
        return time.perf_counter() - start, sum(map(len, found))

    with text.open(encoding="utf-8") as file:
        for line in file:
            held.append(json.loads(line)["text"])
            size += len(held[-1])
            if size > 4 << 20:
                spent, count = encode()
                seconds, total, held, size = seconds + spent, total + count, [], 0
    spent, count = encode()
    return seconds + spent, total + count


def run_arm(arm: str, text: Path, tokenizer: Path) -> None:
    with tempfile.TemporaryDirectory(dir=text.parent) as out:
        seconds, tokens = globals()[f"arm_{arm}"](text, tokenizer, Path(out))
        store = Path(out) / "store"
        if store.exists():  # for the loader
            shutil.rmtree(text.with_suffix(".store"), ignore_errors=True)
            store.rename(text.with_suffix(".store"))
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


# measuring


def tree_bytes(pid: int) -> int:
    """PSS of a session's processes."""
    total = 0
    for pid_text in subprocess.run(
        ["ps", "-o", "pid=", "--sid", str(pid)], capture_output=True, text=True
    ).stdout.split():
        try:
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid_text}/smaps_rollup").read_text(), re.M)
            total += int(found[1]) * 1024 if found else 0
        except OSError:
            continue
    return total


def measure(arm: str, text: Path, tokenizer: Path) -> dict:
    command = [sys.executable, __file__, "--arm", arm, "--text", str(text), "--tokenizer", str(tokenizer)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    peak = 0
    while child.poll() is None:
        peak = max(peak, tree_bytes(child.pid))
        time.sleep(0.1)
    if child.returncode:
        sys.exit(f"{arm} failed on {text}")
    return json.loads(child.stdout.read().splitlines()[-1]) | {"peak_bytes": peak}


def cleaning(text: Path, folder: Path) -> dict[str, float]:
    """MB/s of one core for `llmkit data`'s first step, with and without signatures: the second share of the file."""
    from loguru import logger

    from llmkit.data import prepare, stages
    from llmkit.verbs import DataConfig

    logger.disable("datatrove")

    found = {}
    for name, near_dedup in (("read and clean", False), ("read, clean and MinHash signatures", True)):
        output = folder / "clean"
        shutil.rmtree(output, ignore_errors=True)
        datasets = [{"path": "json", "data_files": str(text)}]
        plan = prepare.make_plan(DataConfig(output_dir=str(output), datasets=datasets, near_dedup=near_dedup))
        (output / "work").mkdir(parents=True)
        plan.save(output / "work")
        rank = min(1, len(plan.tasks) - 1)
        stages.read(str(output / "work"), None, 0)  # warms up what is imported
        start = time.perf_counter()
        stages.read(str(output / "work"), None, rank)
        found[name] = sum(share.size for share in plan.tasks[rank].shares) / 1e6 / (time.perf_counter() - start)
        shutil.rmtree(output)
    return found


def loading(store: Path, tokenizer: Path) -> dict[str, float]:
    """Tokens per second of one core, and the first batch after a seek, with the store out of the page cache."""
    import random

    import torch

    from llmkit.data.loader import Loader, Rows
    from llmkit.data.shards import open_store
    from llmkit.data.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    made = load_tokenizer(str(tokenizer))
    rows = Rows(open_store(store, made), 1024, "bos_bestfit", made.bos_token_id, made.pad_token_id)
    loader = Loader([rows], 256, 0)
    loader.batch(0)
    start = time.perf_counter()
    for step in range(20):
        loader.batch(step)
    found = {"tokens_per_s": 20 * 256 * 1024 / (time.perf_counter() - start), "utilisation": rows.plan.utilisation}
    rng, seeks = random.Random(0), []
    for _ in range(20):
        with (store / "tokens.ds").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        seek = Loader([rows], 32, 0)
        step = rng.randrange(10**6)
        start = time.perf_counter()
        seek.batch(step)
        seeks.append(1000 * (time.perf_counter() - start))
    return found | {"seek_ms": statistics.median(seeks), "worst_seek_ms": max(seeks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="MB of text")
    parser.add_argument("--repeats", type=int, default=None, help="of every arm; default 5, 3 and 1")
    parser.add_argument("--folder", type=Path, default=None, help="where text and tokenizer are kept; default: nowhere")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        run_arm(args.arm, args.text, args.tokenizer)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = compare(folder.resolve(), args.sizes, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def compare(folder: Path, sizes: list[int], repeats: int | None) -> dict:
    tokenizer = get_tokenizer(folder)
    results: dict = {"cores": CORES, "sizes": {}}
    print(f"{'MB':>6} {'arm':<10}{'s':>8}{'MB/s':>8}{'M tokens/s':>12}{'llmkit is':>11}{'peak MB':>9}")
    for size in sizes:
        text = folder / f"{size}.jsonl"
        if not text.exists():
            write_text(text, size * 1_000_000)
        runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
        for _ in range(repeats or {10: 5, 100: 3}.get(size, 1)):
            for arm in ARMS:
                runs[arm].append(measure(arm, text, tokenizer))
        rate = {arm: statistics.median(r["tokens"] / r["seconds"] for r in runs[arm]) for arm in ARMS}
        for arm in ARMS:
            seconds = statistics.median(r["seconds"] for r in runs[arm])
            peak = max(r["peak_bytes"] for r in runs[arm]) / 1e6
            mb = text.stat().st_size / 1e6
            ratio = f"{rate['llmkit'] / rate[arm]:.2f} x" if arm != "llmkit" else ""
            speed = f"{seconds:>8.1f}{mb / seconds:>8.1f}{rate[arm] / 1e6:>12.2f}"
            print(f"{size:>6} {arm:<10}{speed}{ratio:>11}{peak:>9.0f}", flush=True)
        results["sizes"][size] = runs
    results["cleaning"] = cleaning(folder / f"{sizes[min(1, len(sizes) - 1)]}.jsonl", folder)
    for name, speed in results["cleaning"].items():
        print(f"{name}: {speed:.1f} MB/s on one core")
    results["loader"] = found = loading((folder / f"{sizes[-1]}.jsonl").with_suffix(".store"), tokenizer)
    print(
        f"loader: {found['tokens_per_s'] / 1e6:.1f} M tokens/s on one core, rows {found['utilisation']:.2%} full; "
        f"first batch after a seek {found['seek_ms']:.1f} ms (worst of 20: {found['worst_seek_ms']:.1f})"
    )
    return results


if __name__ == "__main__":
    main()
