"""`llmkit data`: what comes out can be trained on, a cut run goes on, broken input is one line and leaves no store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from llmkit import cli
from llmkit.config import UserError
from llmkit.data import prepare, stages
from llmkit.data.shards import open_store
from llmkit.data.sources import Source, documents
from llmkit.data.tokenizer import load_tokenizer
from llmkit.run import Run
from llmkit.verbs import DataConfig

ROOT = Path(__file__).parents[2]
WORDS = "a cat sat on the mat while its dog ran past an old red barn and over two low hills to find some shade".split()


def sentence(i):
    """Twelve words that no other number gives in this order."""
    return " ".join(WORDS[(i * k + i // 7 + k) % len(WORDS)] for k in range(1, 12)) + f" number {i}"


def corpus(folder, texts, **keys):
    lines = [text if isinstance(text, bytes) else json.dumps({"text": text}).encode() for text in texts]
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    keys = {"vocab_size": 300, "num_workers": 1, "near_dedup": False} | keys
    datasets = [{"path": "json", "data_files": "train.jsonl"}]
    return DataConfig(**{"output_dir": str(folder / "corpus"), "data_dir": str(folder), "datasets": datasets} | keys)


def stored(folder, name="train"):
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    store = open_store(folder / name, tokenizer)
    return [
        tokenizer.decode(store.tokens[a : b - 1]) for a, b in zip(store.starts, store.ends.astype(int), strict=True)
    ]


def test_documents_come_out_as_they_went_in_and_in_order(tmp_path):
    texts = [sentence(i) + ("\n\tindented é 👩‍👩‍👧 \r\n" if i % 3 else "") for i in range(200)]
    figures = prepare.main(corpus(tmp_path, texts))
    assert stored(tmp_path / "corpus") == texts
    assert figures["flow"][-1]["documents"] == 200
    size = sum(len(text.encode()) for text in texts)
    assert figures["flow"][-1]["bytes"] == figures["stores"]["train"]["bytes"] == size
    assert not (tmp_path / "corpus/work").exists()


def test_two_workers_and_many_shares_make_the_same_store(tmp_path, monkeypatch):
    texts = [sentence(i) for i in range(300)] + [sentence(5), sentence(7).upper()]
    out = []
    for workers, share_bytes in ((1, 1 << 20), (2, 2000)):
        monkeypatch.setattr(prepare, "share_size", lambda *_, size=share_bytes: size)
        folder = tmp_path / str(workers)
        folder.mkdir()
        config = corpus(folder, texts, num_workers=workers, near_dedup=True, test_split_size=0.1)
        out.append(prepare.main(config))
        out[-1]["all"] = [stored(folder / "corpus"), stored(folder / "corpus", "validation")]
    assert out[0]["all"] == out[1]["all"] and len(out[0]["all"][0]) > 100
    assert out[0]["flow"] == out[1]["flow"] and out[0]["reasons"] == out[1]["reasons"]


def test_held_out_documents_depend_on_their_text_only(tmp_path):
    texts = [sentence(i) for i in range(400)]
    held = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).mkdir()
        prepare.main(corpus(tmp_path / name, order, test_split_size=0.1, decontaminate=False))
        held.append(stored(tmp_path / name / "corpus", "validation"))
    assert sorted(held[0]) == sorted(held[1]) and 20 < len(held[0]) < 60


def test_benchmarks_are_kept_out_of_training_only(tmp_path):
    question = sentence(3)
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": question, "answer": "42"}) + "\n")
    (tmp_path / "held.txt").write_text(question + "\n" + sentence(900))
    texts = [sentence(i) for i in range(50)] + [f"{sentence(60)} {question} {sentence(61)}", "42"]
    config = corpus(
        tmp_path,
        texts,
        benchmark_datasets=[{"path": "json", "data_files": "bench.jsonl"}],
        eval_datasets=[{"path": "text", "data_files": "held.txt", "sample_by": "line", "shard": "held"}],
    )
    prepare.main(config)
    lines = [json.loads(line) for line in (tmp_path / "corpus/contaminated.jsonl").read_text().splitlines()]
    assert [(line["where"], line["how"]) for line in lines] == [
        ("train.jsonl line 4", "whole text"),
        ("train.jsonl line 51", "1 runs of 13 words"),
        ("train.jsonl line 52", "whole text"),
    ]
    assert len(stored(tmp_path / "corpus")) == 49 and len(stored(tmp_path / "corpus", "held")) == 2


def test_boilerplate_condemns_nobody_and_is_listed(tmp_path):
    licence = "permission is hereby granted free of charge to any person obtaining a copy of this software"
    texts = [f"{licence} {i} {sentence(i)}" for i in range(30)]
    (tmp_path / "held.txt").write_text(f"{licence} 500 {sentence(500)}")
    shard = [{"path": "text", "data_files": "held.txt", "shard": "held"}]
    figures = prepare.main(corpus(tmp_path, texts, eval_datasets=shard))
    assert len(stored(tmp_path / "corpus")) == 30
    assert figures["boilerplate"] == ["held: held.txt"]


def test_the_tokenizer_sees_as_much_of_each_task_with_one_file_open(tmp_path, monkeypatch):
    """Sizes are of UTF-8: 10 bytes of the small task, so (100 - 10) / 2 of the others, up to their next document."""
    documents = {0: ["x" * 9] * 20, 1: ["é" * 5], 2: ["x" * 10, "gone", *["y" * 10] * 20]}
    (tmp_path / "docs").mkdir()
    for rank, texts in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"docs/{rank:05d}.jsonl").write_text(lines)
    fates = {rank: np.array([text == "gone" for text in documents[rank]], np.uint8) for rank in documents}
    monkeypatch.setattr(stages, "final_fates", lambda work, plan, rank: fates[rank])
    opened = []
    real = stages._documents
    monkeypatch.setattr(stages, "_documents", lambda work, rank: opened.append(rank) or real(work, rank))
    plan = SimpleNamespace(train_tasks=[0, 1, 2])
    seen = [(opened[-1], text) for text in stages.training_texts(str(tmp_path), plan, 100)]
    assert seen == [(1, "é" * 5), *[(0, "x" * 9)] * 5, (2, "x" * 10), *[(2, "y" * 10)] * 4]
    assert opened == [1, 0, 2]
    everything = list(stages.training_texts(str(tmp_path), plan, 1 << 62))
    assert len(everything) == 20 + 1 + 21


def test_filters_are_off_unless_asked_for_and_named_with_their_rule(tmp_path):
    prose = (
        "Number {} of the keepers walked down to the harbour that day and found the boats gone. The rope lay in two "
        "pieces, cut with something sharp. He sat on the wall, lit his pipe, and thought about who could have done it. "
        "Nobody on the island had any reason to, or so he believed until the sea gave back what it had taken."
    )
    texts = [prose.format(i) for i in range(5)] + ["The cat and the dog have been here. " * 20, "too short"]
    assert not any(r["fate"] == "dropped" for r in prepare.main(corpus(tmp_path, texts))["reasons"])
    config = corpus(tmp_path, texts, filters=[{"gopher_quality": {"min_doc_words": 3}}, "gopher_repetition"])
    figures = prepare.main(DataConfig(**vars(config) | {"output_dir": str(tmp_path / "filtered")}))
    assert {r["reason"]: r["count"] for r in figures["reasons"]} == {
        "gopher_repetition: top_3_gram": 1,
        "gopher_quality: gopher_short_doc": 1,
    }
    assert stored(tmp_path / "filtered") == texts[:5]


def test_encoding_is_mended_only_where_asked(tmp_path):
    texts = [sentence(1), f"{sentence(2)} cafÃ©", rb'{"text": "half \ud83d of a pair"}']
    config = corpus(tmp_path, texts, max_bad_rows=1)
    figures = prepare.main(config)
    assert {(r["fate"], r["reason"]) for r in figures["reasons"]} == {("bad", "lone-surrogate"), ("seen", "mojibake")}
    assert stored(tmp_path / "corpus")[1].endswith("cafÃ©")
    config = DataConfig(**vars(config) | {"output_dir": str(tmp_path / "mended"), "fix_encoding": True})
    figures = prepare.main(config)
    reasons = {("changed", "encoding-mended", 2), ("seen", "replacement-character", 1)}
    assert {(r["fate"], r["reason"], r["count"]) for r in figures["reasons"]} == reasons
    assert [text[-5:] for text in stored(tmp_path / "mended")[1:]] == [" café", " pair"]


def test_every_drop_is_counted_with_its_share_and_ten_examples(tmp_path):
    texts = [sentence(i) for i in range(30)] + [sentence(0)] * 25 + ["  "] * 5 + ["None"]
    figures = prepare.main(corpus(tmp_path, texts))
    found = {(r["fate"], r["reason"]): r for r in figures["reasons"]}
    assert {key: r["count"] for key, r in found.items()} == {
        ("dropped", "exact-duplicate"): 25, ("dropped", "empty"): 5, ("seen", "null-word"): 1,
    }  # fmt: skip
    exact = found["dropped", "exact-duplicate"]
    assert exact["share"] == 25 / 61 and len(exact["examples"]) == 10
    assert all(e["note"] == "same as train.jsonl line 1" for e in exact["examples"])


def test_figures_of_the_text_by_hand(tmp_path):
    texts = ["Ab 1\nsame line", "Жя.\nsame line", "漢"]
    figures = prepare.main(corpus(tmp_path, texts))
    assert figures["lines"] == [["same line", 2]]
    total = {
        "Latin": 2 + 8 + 8,
        "white space": 2 + 1 + 2,
        "digits": 1,
        "Cyrillic": 2,
        "punctuation and symbols": 1,
        "Cjk": 1,
    }
    assert {name: share * 28 for name, share in figures["scripts"].items()} == pytest.approx(total)
    (source,) = figures["sources"]
    assert (source["rows"], source["characters"], source["bytes"]) == (3, 28, 14 + 15 + 3)


def test_entries_with_fractions_get_a_store_each(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(20)))
    entries = [
        {"path": "json", "data_files": f"{n}.jsonl", "fraction": f, "shard": n} for n, f in (("a", 0.7), ("b", 0.3))
    ]
    figures = prepare.main(corpus(tmp_path, [], datasets=entries, exact_dedup=False))
    assert list(figures["stores"]) == ["a", "b"] and len(stored(tmp_path / "corpus", "b")) == 20


def test_toyworld_stores_keep_their_entropy(tmp_path):
    config = corpus(tmp_path, [], datasets=[{"path": "builtin/toyworld", "split": "train[:300]"}], exact_dedup=False)
    prepare.main(config)
    store = open_store(tmp_path / "corpus/train", load_tokenizer(str(tmp_path / "corpus/tokenizer")))
    docs = list(documents(Source("builtin/toyworld", split="train[:300]"), tmp_path))
    assert store.entropy == pytest.approx(-sum(doc.log_prob for doc in docs) / store.num_tokens)


def test_a_row_plan_is_made_and_its_padding_reported(tmp_path):
    figures = prepare.main(corpus(tmp_path, [sentence(i) for i in range(400)], max_length=64))
    assert (tmp_path / "corpus/train/rows-64.npz").exists()
    packing = figures["stores"]["train"]["packing"]
    assert packing["max_length"] == 64 and 0.9 < packing["utilisation"] <= 1 and packing["restarts"] == 0


def test_the_store_trains(tmp_path):
    """The stores are what the `pretrain` verb reads, named by their folders."""
    prepare.main(corpus(tmp_path, [sentence(i) for i in range(300)], test_split_size=0.1))
    recipe = {
        "output_dir": str(tmp_path / "run"), "data_dir": str(tmp_path / "corpus"),
        "tokenizer_name": str(tmp_path / "corpus/tokenizer"), "datasets": [{"path": "train"}],
        "eval_datasets": [{"path": "validation", "shard": "held"}], "max_length": 32, "max_steps": 2,
        "config_overrides": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "per_device_train_batch_size": 2, "use_cpu": True, "sample_prompts": [],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["pretrain", str(tmp_path / "recipe.yaml")]) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["shards"]["held"]["loss"] > 0


# what goes wrong

BAD_ROWS = {
    "not JSON": (b"{nonsense", "train.jsonl line 3: a line that is not a JSON object (bad-json: "),
    "missing column": (b'{"body": 1}', "train.jsonl line 3: a row without the text column"),
    "null": (b'{"text": null}', "train.jsonl line 3: a null where the text should be"),
    "nested null": (b'{"text": {"a": null}}', "train.jsonl line 3: a value that is no text"),
    "NUL": (rb'{"text": "a\u0000b"}', "train.jsonl line 3: a NUL character"),
    "no UTF-8": (b'{"text": "\xff"}', "train.jsonl line 3: bytes that are not UTF-8"),
    "too long": (b'{"text": "' + b"long " * 300 + b'"}', "train.jsonl line 3: a document above max_doc_bytes"),
}


@pytest.mark.parametrize("row, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_stops_or_is_counted(tmp_path, row, message):
    texts = [sentence(0), sentence(1), row, sentence(3)]
    config = corpus(tmp_path, texts, max_doc_bytes=1000)
    with pytest.raises(UserError) as error:
        prepare.main(config)
    assert str(error.value).startswith(message) and "max_bad_rows=0" in str(error.value)
    assert not list((tmp_path / "corpus").glob("*/tokens.ds")) and not (tmp_path / "corpus/result.json").exists()
    figures = prepare.main(DataConfig(**vars(config) | {"max_bad_rows": 1}))
    assert [(r["count"], r["bytes"]) for r in figures["reasons"] if r["fate"] == "bad"] == [(1, None)]
    assert stored(tmp_path / "corpus") == [sentence(0), sentence(1), sentence(3)]


def test_bad_rows_of_all_tasks_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "share_size", lambda *_: 600)
    texts = [b"{" if i % 10 == 0 else sentence(i) for i in range(60)]
    with pytest.raises(UserError, match="6 bad rows so far, max_bad_rows=5"):
        prepare.main(corpus(tmp_path, texts, max_bad_rows=5))
    assert prepare.main(corpus(tmp_path, texts, max_bad_rows=6))["flow"][-1]["documents"] == 54


WRONG = {
    "no datasets": ({"datasets": []}, "datasets is missing"),
    "file gone": ({"datasets": [{"path": "gone.jsonl"}]}, "data_files='gone.jsonl': no such file under"),
    "hub out of reach": ({"datasets": [{"path": "nobody/nothing"}]}, "path='nobody/nothing': could not be loaded"),
    "no tokenizer": ({"tokenizer_name": "nobody/nothing"}, "tokenizer_name='nobody/nothing': no tokenizer"),
    "filter": ({"filters": ["quality"]}, "filters: 'quality'; allowed: gopher_quality"),
    "filter option": (
        {"filters": [{"c4_quality": {"x": 1}}]},
        "filters: c4_quality.x is not known; allowed: split_para",
    ),
    "threshold": ({"near_dedup_threshold": 0.5}, "near_dedup_threshold=0.5; allowed: 0.7 to 1"),
    "test size": ({"test_split_size": 1.5}, "test_split_size=1.5"),
    "store name": ({"eval_datasets": [{"path": "train.jsonl", "shard": "train"}]}, "the store name 'train' is taken"),
    "shard of a training entry": (
        {"datasets": [{"path": "train.jsonl", "shard": "a"}]},
        "datasets[0]: shard='a' has no effect without `fraction`",
    ),
    "engine": ({"engine": "slurm"}, "engine: slurm needs engine_kwargs: {partition"),
    "unused benchmark": (
        {"decontaminate": False, "benchmark_datasets": [{"path": "train.jsonl"}]},
        "benchmark_datasets has no effect",
    ),
    "vocabulary": ({"vocab_size": 100}, "vocab_size=100 is too small"),
}


@pytest.mark.parametrize("keys, message", WRONG.values(), ids=WRONG)
def test_a_wrong_setting_is_one_line(tmp_path, keys, message):
    with pytest.raises(UserError) as error:
        prepare.main(corpus(tmp_path, [sentence(i) for i in range(5)], **keys))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("corpus/*/tokens.ds"))


@pytest.mark.parametrize("texts", [[], ["  ", ""]])
def test_a_corpus_without_text_is_one_line(tmp_path, texts):
    with pytest.raises(UserError, match="no document is left"):
        prepare.main(corpus(tmp_path, texts))


def test_a_tokenizer_without_eos_is_one_line(tmp_path, letters):
    folder = tmp_path / "tokenizer"
    letters.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no eos_token"):
        prepare.main(corpus(tmp_path, [sentence(1)], tokenizer_name=str(folder)))


def test_a_character_that_the_tokenizer_lacks_names_its_source(tmp_path, letters):
    letters.save_pretrained(tmp_path / "tokenizer")
    config = corpus(tmp_path, ["a cat", "a cat!"], tokenizer_name=str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"^json train.jsonl train: character '!' at position 5"):
        prepare.main(config)


def test_a_full_disk_leaves_no_store_and_the_run_goes_on_later(tmp_path, monkeypatch, capsys):
    config = corpus(tmp_path, [sentence(i) for i in range(30)])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llmkit.data.stages.StoreWriter.write", full)
        with pytest.raises(UserError, match="the disk is full"):
            prepare.main(config)
    assert not list(tmp_path.glob("corpus/*/tokens.ds"))
    monkeypatch.setattr(stages, "read_share", full)  # read is done and not done again
    prepare.main(config)
    assert "goes on" in capsys.readouterr().out and len(stored(tmp_path / "corpus")) == 30


def test_a_changed_recipe_or_text_starts_afresh(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "make_stages", lambda plan, work, make=prepare.make_stages: make(plan, work)[:1])
        with pytest.raises(FileNotFoundError):  # no report: the later steps were cut off
            prepare.main(corpus(tmp_path, [sentence(i) for i in range(9)]))
    prepare.main(corpus(tmp_path, [sentence(i) for i in range(10, 30)]))
    assert "an unfinished run of another recipe or text" in " ".join(capsys.readouterr().out.split())
    assert stored(tmp_path / "corpus") == [sentence(i) for i in range(10, 30)]


def test_the_work_of_a_run_that_is_still_going_is_left_alone(tmp_path):
    config = corpus(tmp_path, [sentence(i) for i in range(9)])
    run = Run.start(tmp_path / "corpus", "data", config, {})
    another = tmp_path / "corpus" / "work" / "another"
    another.mkdir(parents=True)
    with pytest.raises(UserError, match="another run is writing there"):
        prepare.main(config)
    assert another.is_dir()
    run.unlock()
    prepare.main(config)
    assert not (tmp_path / "corpus/work").exists()


def test_a_finished_corpus_is_never_overwritten(tmp_path):
    config = corpus(tmp_path, [sentence(i) for i in range(9)])
    prepare.main(config)
    with pytest.raises(UserError, match="holds a finished corpus"):
        prepare.main(config)


@pytest.mark.medium
def test_a_killed_run_goes_on_and_gives_the_same_stores(tmp_path):
    """SIGKILL at two moments of a run in its own process."""
    texts = [sentence(i) + " " + sentence(i * 31 + 7) for i in range(1500)]
    config = corpus(tmp_path, texts, near_dedup=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in vars(config).items() if v != getattr(DataConfig(), k)}))
    command = [sys.executable, "-m", "llmkit", "data", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for wanted in ("docs", "parts"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not list((tmp_path / "corpus").glob(f"work/*/{wanted}")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
    whole = DataConfig(**vars(config) | {"output_dir": str(tmp_path / "whole")})
    prepare.main(whole)
    for name in ("tokens.ds", "tokens.ds.index"):
        a, b = (np.fromfile(folder / "train" / name, np.uint8) for folder in (tmp_path / "corpus", tmp_path / "whole"))
        assert np.array_equal(a, b)


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_worker_or_an_interrupt_ends_the_run_with_one_line(tmp_path, number):
    """A pool of processes waits for ever for a worker that the system killed."""
    config = corpus(tmp_path, [sentence(i) + " " + sentence(i * 31 + 7) for i in range(20_000)], num_workers=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in vars(config).items() if v != getattr(DataConfig(), k)}))
    script = tmp_path / "slow.py"  # workers that never come to an end
    script.write_text(
        "import signal, sys, time\nfrom llmkit import cli\nfrom llmkit.data import stages, prepare\n"
        + "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" * (number == signal.SIGKILL)  # as `command &` has it
        + f"def slow(*args):\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n"
        "    time.sleep(100)\n"
        "prepare.make_stages = lambda plan, work: [stages.Stage('slow', [slow], 2)]\n"
        f"if __name__ == '__main__':\n    sys.exit(cli.main(['data', {str(path)!r}]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)
    if number == signal.SIGKILL:
        os.kill(int((tmp_path / "pid").read_text()), number)
    else:
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert err.count("\n") == 1, err
    assert (process.returncode, err[:30]) == (
        (2, "llmkit: a worker process was k") if number == signal.SIGKILL else (130, "llmkit: interrupted\n")
    )


# clusters


def test_the_slurm_scripts_are_shown_and_nothing_is_left(tmp_path, capsys):
    kwargs = {"partition": "cpu", "time": "02:00:00", "cpus_per_task": 2}
    config = corpus(tmp_path, [sentence(i) for i in range(9)], engine="slurm", engine_kwargs=kwargs, dry_run=True)
    prepare.main(DataConfig(**vars(config) | {"near_dedup": True}))
    out = capsys.readouterr().out
    assert out.count("#!/bin/bash") == 6 and out.count("launch_pickled_pipeline") == 6
    for line in ("#SBATCH --partition=cpu", "#SBATCH --time=02:00:00", "#SBATCH --array=0-49", "job-name=llmkit-read"):
        assert line in out
    assert not (tmp_path / "corpus").exists()


def test_a_wrong_executor_option_is_one_line(tmp_path):
    kwargs = {"partition": "cpu", "time": "1", "partitions": 3}
    config = corpus(tmp_path, [sentence(1)], engine="slurm", engine_kwargs=kwargs, dry_run=True)
    with pytest.raises(UserError, match=r"engine_kwargs: .*partitions"):
        prepare.main(config)


@pytest.mark.medium
def test_slurm_jobs_run_in_a_chain_and_make_the_same_store(tmp_path, monkeypatch):
    """A stand-in for Slurm: sbatch runs every task of the array at once, in the order of submission."""
    texts = [sentence(i) for i in range(40)]
    kwargs = {"partition": "cpu", "time": "1:00:00"}
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}", prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    commands = {
        "sbatch": f"""#!{sys.executable}
import os, re, subprocess, sys
with open({str(tmp_path / "calls")!r}, "a") as calls:
    print(*sys.argv[1:-1], file=calls)
script = open(sys.argv[-1]).read()
last = int(re.search("--array=0-([0-9]+)", script)[1]) if "--array" in script else 0
for task in range(last + 1):
    job = dict(SLURM_ARRAY_TASK_ID=str(task), RUN_OFFSET="0", SLURM_NODELIST="a", SLURM_NODEID="0", SLURM_JOB_ID="7")
    if "launch_pickled_pipeline" in script:
        subprocess.run(["bash", sys.argv[-1]], env={{**os.environ, **job}}, check=True, stdout=2)
print("Submitted batch job", sum(1 for _ in open({str(tmp_path / "calls")!r})))
""",
        "srun": '#!/bin/sh\nexec launch_pickled_pipeline "$5"\n',
        "scontrol": "#!/bin/sh\necho localhost\n",
    }
    for name, script in commands.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    config = corpus(tmp_path, texts, engine="slurm", engine_kwargs=kwargs)
    prepare.main(DataConfig(**vars(config) | {"output_dir": "corpus", "data_dir": "."}))
    jobs = [call for call in (tmp_path / "calls").read_text().splitlines() if "RUN_OFFSET" in call]
    assert len(jobs) == 5 and "--dependency" not in jobs[0]
    assert all("--dependency=afterok:" in call for call in jobs[1:])
    assert stored(tmp_path / "corpus") == texts


def test_ray_pipelines_are_listed(tmp_path, capsys):
    prepare.main(corpus(tmp_path, [sentence(1)], engine="ray", dry_run=True))
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["read", "duplicates", "tokenizer", "tokenise", "finish"]
