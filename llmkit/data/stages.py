"""The steps from text to token stores, as functions that any of datatrove's executors runs task by task.

Owns the work folder. The text is written once, by `read`; every later step writes only decisions about documents:

    work/plan.json          what is to be done, and the shares of the sources that each task reads
    work/docs/00000.jsonl   the documents that a task kept: {"text", "where", "log_prob"}; .npy: where each begins
    work/hashes/00000.npy   (num_docs, 2) uint64 of the normalised text
    work/notes/STEP-00000.json   what was counted, with examples
    work/fates/STEP/00000.npy    (num_docs,) uint8, one of FATES
    work/parts/STORE/00000/      tokens

A step is `step(work, data, rank, world_size)`. A task that is run again writes the same files. Leaves out in which
order the steps run (`prepare.py`) and where (`executor.py`). Light imports: this runs in many processes.
"""

import dataclasses
import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from ..config import UserError
from ..run import write_json
from ..verbs import DataConfig
from . import clean, dedup
from .decontaminate import Index, judge
from .encode import BATCH_BYTES, MAX_BYTES, StoreWriter, num_utf8_bytes
from .read import EVERY, PROBLEMS, Row, Share, plan_shares, read_share
from .sources import Source, describe
from .words import RUN, ngrams, pieces, text_hash, word_hashes, words

FATES = ("kept", "exact-duplicate", "near-duplicate", "held-out", "contaminated")
KEPT, EXACT, NEAR, HELD_OUT, CONTAMINATED = range(len(FATES))
HELD_OUT_SHARD = "validation"
SHOWN = 300  # characters of a text in the lists of what was removed


class Stage(NamedTuple):
    """A pipeline of steps and the number of its tasks."""

    name: str
    steps: list[Any]
    tasks: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process reads in one go: shares of one source, small files together."""

    source: int
    shares: list[Share]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a task must know; plain JSON, so that a cluster's nodes can read it."""

    config: DataConfig
    output: str  # folder of the stores
    sources: list[Source]  # training sources, then validation shards
    stores: list[str]  # the store that each source goes to
    num_train: int  # of the sources
    rows: list[int]  # of each source, where a slice needs to know; else 0
    tasks: list[Task]
    benchmarks: list[Source]

    def save(self, work: Path) -> None:
        write_json(work / "plan.json", dataclasses.asdict(self))
        _load_plan.cache_clear()

    @staticmethod
    def load(work: str) -> "Plan":
        return _load_plan(work)

    @property
    def train_tasks(self) -> list[int]:
        return [rank for rank, task in enumerate(self.tasks) if task.source < self.num_train]

    @property
    def store_names(self) -> list[str]:
        held_out = [HELD_OUT_SHARD] if self.config.test_split_size else []
        return list(dict.fromkeys([*self.stores[: self.num_train], *held_out, *self.stores[self.num_train :]]))

    @property
    def has_reference(self) -> bool:
        """There is something that must not be trained on."""
        c = self.config
        return c.decontaminate and bool(c.test_split_size or self.benchmarks or len(self.sources) > self.num_train)


@lru_cache(4)
def _load_plan(work: str) -> Plan:
    found = json.loads((Path(work) / "plan.json").read_text(encoding="utf-8"))
    found["config"] = DataConfig(**found["config"])
    for key in ("sources", "benchmarks"):
        found[key] = [Source(**source) for source in found[key]]
    found["tasks"] = [Task(task["source"], [Share(**share) for share in task["shares"]]) for task in found["tasks"]]
    return Plan(**found)


def load_array(work: str, folder: str, rank: int) -> NDArray:
    return np.load(Path(work, folder, f"{rank:05d}.npy"))


def _save(value: NDArray, work: str, folder: str, rank: int) -> None:
    path = Path(work, folder, f"{rank:05d}.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, value)


def _documents(work: str, rank: int) -> Iterator[dict[str, Any]]:
    with Path(work, "docs", f"{rank:05d}.jsonl").open("rb") as file:
        yield from map(orjson.loads, file)


class Texts:
    """Any document by its place (task, number), for evidence and verification."""

    def __init__(self, work: str):
        self.work = work
        self._index: dict[int, NDArray[np.uint64]] = {}
        self.bags = lru_cache(2048)(lambda place: dedup.bags(self.get(place)["text"]))

    def get(self, place: tuple[int, int]) -> dict[str, Any]:
        rank, number = place
        if rank not in self._index:
            self._index[rank] = load_array(self.work, "docs", rank)
        with Path(self.work, "docs", f"{rank:05d}.jsonl").open("rb") as file:
            file.seek(int(self._index[rank][number]))
            return orjson.loads(file.readline())


def timed(step: Callable, work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Runs a step and leaves how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    step(work, data, rank, world_size)
    spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    Path(work, "times").mkdir(exist_ok=True)
    write_json(Path(work, "times", f"{step.__name__}-{rank:05d}.json"), spent)


def seconds(work: str) -> dict[str, dict[str, float]]:
    """step -> wall and CPU seconds of all its tasks together; the step that asks is not among them."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(Path(work, "times").glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        spent = found.setdefault(path.stem.rsplit("-", 1)[0], {"wall_s": 0.0, "cpu_s": 0.0})
        for key, value in json.loads(path.read_text(encoding="utf-8")).items():
            spent[key] += value
    return found


# 1. read and clean


def read(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Rows -> documents that are text, with what was found, mended or filtered on the way."""
    plan = Plan.load(work)
    task = plan.tasks[rank]
    is_train = task.source < plan.num_train
    notes, measures = clean.Notes(), clean.Measures()
    keep = clean.make_filters(plan.config.filters) if is_train and plan.config.filters else None
    documents = _cleaned(plan, task, keep, notes)
    Path(work, "docs").mkdir(exist_ok=True)
    hashes: list[tuple[int, int]] = []
    starts: list[int] = []

    def written(file: IO[bytes]) -> Iterator[Any]:
        from datatrove.data import Document

        for row in documents:
            starts.append(file.tell())
            record: dict[str, Any] = {"text": row.text, "where": row.where}
            if row.log_prob is not None:
                record["log_prob"] = row.log_prob
            file.write(orjson.dumps(record) + b"\n")
            hashes.append(text_hash(row.text))
            measures.add(row.text)
            yield Document(text=row.text, id="")

    with Path(work, "docs", f"{rank:05d}.jsonl").open("wb") as file:
        if is_train and plan.config.near_dedup:
            dedup.signature_step(Path(work, "signatures")).run(written(file), rank)
        else:
            deque(written(file), maxlen=0)
    measures.flush()
    _save(np.array(hashes, np.uint64).reshape(-1, 2), work, "hashes", rank)
    _save(np.array(starts, np.uint64), work, "docs", rank)
    _save(np.array(measures.lengths, np.int64), work, "lengths", rank)
    points = np.flatnonzero(measures.code_points)
    _save(np.stack([points, measures.code_points[points]]), work, "code_points", rank)
    lines = measures.lines.most_common(200)
    found = {"notes": notes.to_list(), "characters": measures.characters, "lines": lines}
    _save_notes(found, work, "read", rank)


def _cleaned(plan: Plan, task: Task, keep: Callable | None, notes: clean.Notes) -> Iterator[Row]:
    """Rows that are documents; what was wrong with the others, or was changed, goes to the notes."""
    config, source = plan.config, plan.sources[task.source]
    for share in task.shares:
        for row in read_share(source, share, config.max_doc_bytes, plan.rows[task.source]):
            if config.fix_encoding and (row.problem == "lone-surrogate" or not row.problem):
                mended = clean.mend(row.text)
                if mended != row.text:
                    notes.add("changed", "encoding-mended", row.where, mended, clean.mojibake(row.text) or row.note)
                    row = Row(row.where, mended)
            if row.problem:
                notes.add("bad", row.problem, row.where, row.note)
                check_bad_rows(notes, config.max_bad_rows)
                continue
            if not row.text.strip():
                notes.add("dropped", "empty", row.where, row.text)
                continue
            for kind, note in clean.faults(row.text).items():
                notes.add("seen", kind, row.where, row.text, note)
            if keep is not None:
                text, rule = keep(row.text)
                if text is None:
                    notes.add("dropped", rule, row.where, row.text)
                    continue
                if text != row.text:
                    notes.add("changed", "c4_quality: lines left out", row.where, row.text)
                    row = Row(row.where, text)
            yield row


def check_bad_rows(notes: clean.Notes, max_bad_rows: int) -> None:
    """Raises UserError that shows one of them when there are more bad ones than allowed."""
    count = notes.count("bad")
    if count <= max_bad_rows:
        return
    (_, kind), entry = next((key, entry) for key, entry in notes.found.items() if key[0] == "bad")
    _, where, note, _ = entry["examples"][0]
    raise UserError(
        f"{where}: {PROBLEMS[kind]} ({kind}: {note.strip()}); {count} bad row{'s' * (count > 1)} so far, "
        f"max_bad_rows={max_bad_rows}; mend the file, or raise max_bad_rows to count and leave such rows out"
    )


def _save_notes(value: dict[str, Any], work: str, step: str, rank: int) -> None:
    Path(work, "notes").mkdir(exist_ok=True)
    write_json(Path(work, "notes", f"{step}-{rank:05d}.json"), value)


def load_notes(work: str, step: str, ranks: list[int]) -> list[dict[str, Any]]:
    return [json.loads(Path(work, "notes", f"{step}-{rank:05d}.json").read_text(encoding="utf-8")) for rank in ranks]


# 2. duplicates, and what is held out


def duplicates(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Which training documents repeat an earlier one; of the others, which are held out for validation."""
    plan = Plan.load(work)
    config, ranks = plan.config, plan.train_tasks
    every = clean.Notes()
    for found in load_notes(work, "read", list(range(len(plan.tasks)))):
        every.merge(found["notes"])
    check_bad_rows(every, config.max_bad_rows)
    hashes = [load_array(work, "hashes", r) for r in ranks]
    fates = [np.zeros(len(h), np.uint8) for h in hashes]
    texts, notes = Texts(work), clean.Notes()
    ends = np.cumsum([0, *map(len, hashes)])
    fate_of = dict(zip(ranks, fates, strict=True))

    def place_of(number: int) -> tuple[int, int]:
        k = int(np.searchsorted(ends, number, side="right")) - 1
        return ranks[k], number - int(ends[k])

    with Path(work, "duplicates.jsonl").open("wb") as file:

        def drop(place: tuple[int, int], of: tuple[int, int], fate: int, alike: float) -> None:
            fate_of[place[0]][place[1]] = fate
            removed, kept = texts.get(place), texts.get(of)
            line = {"fate": FATES[fate], "where": removed["where"], "same_as": kept["where"]}
            line |= {"similarity": round(alike, 3), "text": removed["text"][:SHOWN]}
            if fate == NEAR:
                line["other_text"] = kept["text"][:SHOWN]
            file.write(orjson.dumps(line) + b"\n")
            note = f"same as {kept['where']}" + (f", similarity {alike:.2f}" if fate == NEAR else "")
            notes.add("dropped", FATES[fate], removed["where"], removed["text"], note)

        if config.exact_dedup:
            for k, first in enumerate(dedup.exact_duplicates(hashes)):
                for number in np.flatnonzero(first != np.arange(ends[k], ends[k + 1])).tolist():
                    drop((ranks[k], number), place_of(int(first[number])), EXACT, 1.0)
        if config.near_dedup:
            pairs = dedup.candidates(Path(work, "buckets"))
            is_open = [all(fate_of[t][d] == KEPT for t, d in pair) for pair in pairs.tolist()]
            near = dedup.near_duplicates(pairs[np.array(is_open, bool)], texts.bags, config.near_dedup_threshold)
            for place, (of, alike) in sorted(near.items()):
                drop(place, of, NEAR, alike)
    for r, h, fate in zip(ranks, hashes, fates, strict=True):
        draw = ((h[:, 0] ^ np.uint64(config.seed)) >> np.uint64(11)) / 2.0**53  # uniform in [0, 1), by the text alone
        fate[(draw < config.test_split_size) & (fate == KEPT)] = HELD_OUT
        _save(fate, work, "fates/duplicates", r)
    _save_notes({"notes": notes.to_list()}, work, "duplicates", 0)


# 3. contamination


def reference(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """The index of everything that must not be trained on: held-out documents, validation shards, benchmarks."""
    plan = Plan.load(work)
    labels: list[str] = []

    def texts() -> Iterator[str]:
        for r, task in enumerate(plan.tasks):
            is_train = task.source < plan.num_train
            fates = load_array(work, "fates/duplicates", r) if is_train else None
            shard = HELD_OUT_SHARD if is_train else plan.stores[task.source]
            for number, document in enumerate(_documents(work, r)):
                if fates is None or fates[number] == HELD_OUT:
                    labels.append(f"{shard}: {document['where']}")
                    yield document["text"]
        for source in plan.benchmarks:
            shares, rows = plan_shares(source, Path(plan.config.data_dir))
            for share in shares:
                for row in read_share(source, share, plan.config.max_doc_bytes, rows):
                    if row.problem:
                        raise UserError(f"benchmark_datasets: {row.where}: {row.problem} ({row.note}); mend that file")
                    for text in filter(str.strip, row.text.split(EVERY)):
                        labels.append(f"benchmark: {row.where}")
                        yield text

    Index.build(texts()).save(Path(work, "reference.npz"))
    write_json(Path(work, "reference.json"), labels)


def find_hits(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Which runs of the reference stand in which training documents of a task."""
    plan = Plan.load(work)
    task = plan.train_tasks[rank]
    index = Index.load(Path(work, "reference.npz"))
    fates = load_array(work, "fates/duplicates", task)
    whole = index.whole(load_array(work, "hashes", task))
    whole[fates != KEPT] = -1
    pairs: list[NDArray] = [np.empty((0, 2), np.int64)]
    for number, document in enumerate(_documents(work, task)):
        if fates[number] == KEPT and len(runs := index.hits(document["text"])):
            pairs.append(np.stack([np.full(len(runs), number), runs], 1))
    _save(np.concatenate(pairs), work, "hits", task)
    _save(whole, work, "whole", task)


def contamination(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Removes from the training data what holds a text of the reference, or 13 words in a row of one."""
    plan = Plan.load(work)
    labels = json.loads(Path(work, "reference.json").read_text(encoding="utf-8"))
    index, texts, notes = Index.load(Path(work, "reference.npz")), Texts(work), clean.Notes()
    hits = {r: load_array(work, "hits", r) for r in plan.train_tasks}
    every = np.concatenate([pairs for pairs in hits.values()] or [np.empty((0, 2), np.int64)])
    condemns, boilerplate = judge(every[:, 1])
    with Path(work, "contaminated.jsonl").open("wb") as file:
        at = 0
        for r, pairs in hits.items():
            fates, whole = load_array(work, "fates/duplicates", r), load_array(work, "whole", r)
            guilty = pairs[condemns[at : at + len(pairs)]]
            at += len(pairs)
            for number in sorted({*np.flatnonzero(whole >= 0).tolist(), *guilty[:, 0].tolist()}):
                fates[number] = CONTAMINATED
                runs = guilty[guilty[:, 0] == number, 1]
                owner = int(whole[number]) if whole[number] >= 0 else int(index.owners[runs[0]])
                document = texts.get((r, number))
                shown = document["text"] if whole[number] >= 0 else _run_text(document["text"], index.runs[runs])
                how = "whole text" if whole[number] >= 0 else f"{len(runs)} runs of {RUN} words"
                line = {"where": document["where"], "found_in": labels[owner], "how": how, "text": shown[:SHOWN]}
                file.write(orjson.dumps(line) + b"\n")
                notes.add(
                    "dropped", FATES[CONTAMINATED], document["where"], document["text"], f"{how}: {labels[owner]}"
                )
            _save(fates, work, "fates/final", r)
    common = [int(index.owners[run]) for run in boilerplate.tolist()]
    _save_notes(
        {"notes": notes.to_list(), "boilerplate": sorted({labels[o] for o in common})}, work, "contamination", 0
    )


def _run_text(text: str, runs: NDArray[np.uint64]) -> str:
    """The first 13 words of a text that are one of the runs."""
    at = np.flatnonzero(np.isin(ngrams(word_hashes(text), RUN), runs))
    return " ".join(itertools.islice(words(text), int(at[0]), int(at[0]) + RUN)) if len(at) else ""


# 4. tokens


def final_fates(work: str, plan: Plan, rank: int) -> NDArray[np.uint8]:
    return load_array(work, f"fates/{'final' if plan.has_reference else 'duplicates'}", rank)


def training_texts(work: str, plan: Plan, num_bytes: int) -> Iterator[str]:
    """Kept training documents, long ones in parts, about `num_bytes` of them, as many of each task until it ends.

    The smallest task comes first, so that what it lacks is shared among the others, and one file is open at a time.
    """

    def kept(rank: int) -> Iterator[str]:
        fates = final_fates(work, plan, rank)
        for document, fate in zip(_documents(work, rank), fates, strict=True):
            if fate == KEPT:
                yield from pieces(document["text"], MAX_BYTES)

    tasks = sorted(plan.train_tasks, key=lambda rank: Path(work, "docs", f"{rank:05d}.jsonl").stat().st_size)
    for number, rank in enumerate(tasks):
        quota = num_bytes // (len(tasks) - number)
        for text in kept(rank):
            if quota <= 0:
                break
            yield text
            size = num_utf8_bytes(text)
            quota, num_bytes = quota - size, num_bytes - size


def _batched(documents: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Documents of about BATCH_BYTES together, so that long ones are not held side by side."""
    batch: list[dict[str, Any]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document["text"])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(1)
def _core(work: str) -> Any:
    """One tokenizer for each process: what it has learnt about words stays for the next task."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(work, "tokenizer", "tokenizer.json")))


def tokenise(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """The documents of a task as tokens, one part for each store that they go to."""
    plan = Plan.load(work)
    task = plan.tasks[rank]
    source = plan.sources[task.source]
    ids = json.loads(Path(work, "ids.json").read_text(encoding="utf-8"))
    is_train = task.source < plan.num_train
    fates = final_fates(work, plan, rank) if is_train else None
    notes = clean.Notes()
    for fate, store in ((KEPT, plan.stores[task.source]), (HELD_OUT, HELD_OUT_SHARD)):
        if fate == HELD_OUT and (fates is None or not (fates == HELD_OUT).any()):
            continue
        part = Path(work, "parts", store, f"{rank:05d}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        wanted = (d for n, d in enumerate(_documents(work, rank)) if fates is None or fates[n] == fate)
        writer, seen = StoreWriter(part, _core(work), ids["eos"], ids["unk"], where=describe(source)), 0
        for batch in _batched(wanted):
            known = len(writer.refused)
            writer.write([d["text"] for d in batch], [d.get("log_prob") for d in batch])
            for position, size in writer.refused[known:]:
                document = batch[position - seen]
                note = f"{size:,} bytes without a place where a cut keeps the ids"
                notes.add("dropped", "not-cuttable", document["where"], document["text"], note)
            seen += len(batch)
        writer.close()
    _save_notes({"notes": notes.to_list()}, work, "tokenise", rank)
