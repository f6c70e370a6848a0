"""`llmkit push` against a server on this machine: what goes, ten faults, and that nothing stays half-published."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from deploy.fake_hub import CUT, LOST, READ_TOKEN, SLOW, TOKEN, WRONG_BYTES, Blob, FakeHub
from example_runs import write_run
from helpers import tiny_model
from huggingface_hub import close_session, constants
from transformers import AutoModelForCausalLM

from llmkit import config as configs
from llmkit.config import UserError
from llmkit.deploy import hub as calls
from llmkit.deploy import push
from llmkit.verbs import PushConfig

NAME = "ann/toy"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run folder with our own model, code and tokenizer, beside logs that must stay here."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    write_run(folder, "pretrain", [{"step": 1, "loss": 1.0}])
    net = tiny_model(vocab_size=420)
    net.save_pretrained(folder / "model")
    tiny.bpe_tokenizer(bos=True, chat=False).save_pretrained(folder / "model")
    for name in ("feedback.jsonl", "training_args.bin", ".hidden.json", "optimizer.pt"):
        (folder / "model" / name).write_text("{}")
    return folder


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The Hub of this process is the fake one; waits are left out."""
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        where = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", where)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(calls, "WAIT_S", 0)
        close_session()
        yield server
        close_session()


@pytest.fixture
def ready(model, tmp_path):
    """Settings of a push; a copy of the run, since a push leaves a record in it."""
    run = tmp_path / "pretrain"
    subprocess.run(["cp", "-r", str(model), str(run)], check=True)

    def make(**given):
        how = dict(model_name_or_path=str(run), hub_model_id=NAME, license="apache-2.0", dry_run=False)
        return PushConfig(**how | {"output_dir": str(tmp_path / "out")} | given)

    return make


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


SENT = [
    "README.md", "config.json", "configuration_llmkit.py", "generation_config.json", "model.safetensors",
    "modeling_llmkit.py", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def test_a_dry_run_lists_what_would_go_and_asks_nobody(ready, capsys, tmp_path):
    """Sockets are closed and there is no token: it must not matter."""
    result = push.main(ready(dry_run=True))
    out = capsys.readouterr().out
    assert re.findall(r"^(?:goes| {4}) +(\S+)", out, flags=re.M) == SENT
    assert "feedback.jsonl" in next(line for line in out.splitlines() if line.startswith("stays"))
    assert str(tmp_path) not in re.sub(r"^(push|dry run).*", "", out, flags=re.M)
    assert result.metrics["is_dry_run"] and (tmp_path / "out/README.md").read_text().startswith("---\n")
    told = json.loads((tmp_path / "out/push.json").read_text())
    assert [file["path"] for file in told["files"]] == [*SENT[1:], SENT[0]] and told["metrics"]["commit"] is None
    assert not (tmp_path / "pretrain/published.json").exists()


def test_a_push_puts_there_what_lies_here_and_it_is_private(ready, fake, tmp_path):
    push.main(ready())
    repo = fake.repos[NAME]
    assert sorted(repo.files) == SENT and repo.private and len(repo.commits) == 2
    for path, blob in repo.files.items():
        here = tmp_path / ("out" if path == "README.md" else "pretrain/model") / path
        assert blob.content == here.read_bytes(), path
    assert {path for path, blob in repo.files.items() if blob.is_lfs} == {
        "model.safetensors", "modeling_llmkit.py"
    } | {"tokenizer.json"}  # fmt: skip
    record = json.loads((tmp_path / "pretrain/published.json").read_text())[NAME]
    assert record["finished"] and record["license"] == "apache-2.0" and record["commit"] == repo.head


def test_the_repository_is_there_before_anything_long(ready, fake, monkeypatch):
    seen = []
    monkeypatch.setattr("llmkit.deploy.files.Item.hashes", lambda item: seen.append(fake.calls.copy()) or ("", ""))
    refusal(push.main, ready())
    assert seen[0][:2] == ["whoami", "create"] and "commit" not in seen[0]


def test_a_public_push_is_public_only_when_all_of_it_is_there(ready, fake, capsys):
    push.main(ready(hub_private_repo=False))
    assert not fake.repos[NAME].private
    assert fake.calls.index("settings") > max(n for n, call in enumerate(fake.calls) if call in ("commit", "tree"))
    assert "public" in capsys.readouterr().out.splitlines()[-1]


# ten faults: (endpoint, fault, how often), what the line says, and whether a rerun is needed
FAULTS = {
    "401": ("whoami", 401, 9, "token is not valid"),
    "403": ("create", 403, 9, "no write access to 'ann' (403)"),
    "404": ("commit", 404, 9, "is not there"),
    "409": ("commit", 409, 9, "is being changed by somebody"),
    "429": ("whoami", 429, 9, "asks for a pause"),
    "500": ("commit", 500, 9, "a fault of its own (500)"),
    "500 while weights go": ("put", 500, 99, "a fault of its own (500)"),
    "cut in the weights": ("put", CUT, 99, "the connection was cut"),
    "cut in the commit": ("commit", CUT, 9, "the connection was cut"),
    "slow": ("commit", SLOW, 9, "no answer for"),
    "wrong hash": ("put", WRONG_BYTES, 1, "did not arrive as it lies here"),
    "wrong bytes in a small file": ("commit", WRONG_BYTES, 1, "did not arrive as it lies here"),
    "disk full there": ("commit", 507, 9, "no room for it"),
    "card refused": (
        "validate",
        WRONG_BYTES,
        9,
        'the Hub refused it (400): Invalid metadata in README.md. - "license" must be one',
    ),
    "cannot be made public": ("settings", 500, 9, "a fault of its own (500)"),
    "cannot be listed": ("tree", 500, 99, "a fault of its own (500)"),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_nothing_is_half_published_and_a_rerun_finishes(name, ready, fake, monkeypatch):
    monkeypatch.setattr(calls, "TIMEOUT_S", 0.3)
    endpoint, fault, times, said = FAULTS[name]
    fake.fail(endpoint, fault, times)
    assert said in refusal(push.main, ready(hub_private_repo=False))
    repo = fake.repos.get(NAME)
    assert repo is None or repo.private
    if repo and name not in ("cannot be made public", "cannot be listed"):  # there all of it arrived, and is private
        assert repo.files == {}
    fake.faults.clear()
    fake.large.clear()
    push.main(ready(hub_private_repo=False))
    assert sorted(fake.repos[NAME].files) == SENT and not fake.repos[NAME].private


@pytest.mark.parametrize(
    "endpoint, fault", [("whoami", 429), ("create", 500), ("put", 500), ("commit", 503), ("put", CUT), ("commit", CUT)]
)
def test_one_passing_fault_is_survived_and_said(endpoint, fault, ready, fake, capsys):
    fake.fail(endpoint, fault)
    push.main(ready())
    assert sorted(fake.repos[NAME].files) == SENT
    out = capsys.readouterr().out
    assert len(re.findall(r"^hub  .*asking again$", out, flags=re.M)) == 1 and fake.url not in out


def test_a_commit_whose_answer_was_lost_is_not_made_twice(ready, fake):
    fake.fail("commit", LOST)
    push.main(ready())
    assert len(fake.repos[NAME].commits) == 2 and sorted(fake.repos[NAME].files) == SENT


def test_nor_is_an_update_that_deletes(ready, fake, tmp_path):
    """The second try would delete what the first has deleted, and the Hub refuses that."""
    template = tmp_path / "pretrain/model/chat_template.jinja"
    template.write_text("{{ messages }}")
    push.main(ready())
    template.unlink()
    fake.fail("commit", LOST)
    push.main(ready(update=True))
    assert len(fake.repos[NAME].commits) == 3 and sorted(fake.repos[NAME].files) == SENT


def test_a_full_disk_here_sends_nothing(ready, fake, monkeypatch):
    def full(path, content):
        raise UserError(f"{path}: the disk is full, this file was not written; make room")

    with monkeypatch.context() as patched:
        patched.setattr("llmkit.run.write_bytes", full)
        assert "the disk is full" in refusal(push.main, ready())
        assert fake.repos[NAME].files == {}
    push.main(ready())
    assert sorted(fake.repos[NAME].files) == SENT


def test_weights_that_change_on_the_way_are_taken_back(ready, fake, tmp_path):
    weights = tmp_path / "pretrain/model/model.safetensors"

    def train_on():
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    real = calls.commit
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calls, "commit", lambda *args: (train_on(), real(*args))[1])
        assert "model.safetensors did not arrive as it lies here" in refusal(push.main, ready())
    assert fake.repos[NAME].files == {} and fake.repos[NAME].private


def test_what_cannot_be_taken_back_is_said_and_a_rerun_goes_on(ready, fake):
    fake.fail("put", WRONG_BYTES)
    real = calls.remove
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calls, "remove", lambda *args: (fake.fail("commit", 500, 2), real(*args)))
        assert "could not be taken back" in refusal(push.main, ready())
    assert fake.repos[NAME].private and fake.repos[NAME].files
    fake.large.clear()
    push.main(ready())
    assert calls.differing({}, {}) == [] and sorted(fake.repos[NAME].files) == SENT


@pytest.mark.parametrize(
    "token, said", [(None, "there is no token"), ("hf_wrong", "not valid"), (READ_TOKEN, "only read")]
)
def test_without_a_token_that_may_write_one_line_says_so(token, said, ready, fake, monkeypatch):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(push.main, ready())
    assert said in line and (token is None or token not in line) and fake.repos == {}


def test_the_name_of_another_is_refused(ready, fake):
    assert "no write access to 'bob' (403)" in refusal(push.main, ready(hub_model_id="bob/toy"))


def test_a_token_that_the_hub_repeats_is_not_shown(ready, fake, monkeypatch):
    """Neither one's own, of whatever form, nor any that looks like one."""
    other = "hf_" + "o" * 34
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    said = calls.hide(f"bad token secret-of-mine, nor {other}\nhere")
    assert said == "bad token hf_***, nor hf_*** here"


def test_what_must_not_go_makes_no_repository(ready, fake, tmp_path):
    config = tmp_path / "pretrain/model/tokenizer_config.json"
    config.write_text('{"name_or_path": "/home/ann/tok"}')
    assert "name_or_path holds '/home/ann'" in refusal(push.main, ready()) and fake.calls == []


def test_a_card_that_does_not_validate_is_not_sent(ready, fake, monkeypatch):
    monkeypatch.setattr("llmkit.deploy.card.write", lambda known: "no metadata")
    assert "has no metadata" in refusal(push.main, ready()) and fake.repos[NAME].files == {}


def test_a_time_out_is_not_waited_for_twice(ready, fake, monkeypatch):
    monkeypatch.setattr(calls, "TIMEOUT_S", 0.3)
    fake.fail("commit", SLOW, 9)
    refusal(push.main, ready())
    assert fake.count()["commit"] == 1


def test_offline_is_said_to_be_offline(ready, fake, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1" in refusal(push.main, ready())


@pytest.mark.parametrize("name", ["", "toy", "ann/", "ann/to y", "ann/a--b", "a/b/c", "https://hub/ann/toy"])
def test_a_name_that_the_hub_would_refuse_is_refused_here(name, ready):
    assert "e.g. ann/toy-sft" in refusal(push.main, ready(hub_model_id=name, dry_run=True))


# a name that is taken


def test_a_name_that_is_taken_is_refused_until_asked_to_update(ready, fake, capsys):
    repo = fake.fill(NAME, {"README.md": b"mine", "model.safetensors": b"old", "notes.txt": b"keep"})
    with pytest.MonkeyPatch.context() as patched:  # known by names and sizes: nothing is hashed for it
        patched.setattr("llmkit.deploy.files.Item.hashes", None)
        assert "is taken: it holds 3 files" in refusal(push.main, ready())
    assert len(repo.commits) == 1
    push.main(ready(update=True))
    assert sorted(repo.files) == sorted([*SENT, "notes.txt"]) and repo.files["notes.txt"].content == b"keep"
    assert "untouched 1 that this push does not hold: notes.txt" in capsys.readouterr().out


def test_other_weights_of_the_same_size_are_not_the_same(ready, fake, tmp_path):
    push.main(ready())
    weights = tmp_path / "pretrain/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "is taken" in refusal(push.main, ready()) and len(fake.repos[NAME].commits) == 2


def test_an_update_makes_nothing_public_that_was_private(ready, fake, capsys):
    push.main(ready())
    push.main(ready(update=True, hub_private_repo=False))
    assert fake.repos[NAME].private and "was private before and stays so" in capsys.readouterr().out


def test_an_update_deletes_what_an_earlier_push_put_there(ready, fake, tmp_path, capsys):
    template = tmp_path / "pretrain/model/chat_template.jinja"
    template.write_text("{{ messages }}")
    push.main(ready())
    assert "chat_template.jinja" in fake.repos[NAME].files
    template.unlink()
    push.main(ready(update=True))
    assert sorted(fake.repos[NAME].files) == SENT
    assert "deleted   1 that this push does not hold: chat_template.jinja" in capsys.readouterr().out


def test_the_same_again_sends_nothing(ready, fake, capsys):
    push.main(ready())
    push.main(ready())
    assert len(fake.repos[NAME].commits) == 2 and "as here already" in capsys.readouterr().out


def test_an_empty_repository_is_gone_on_with(ready, fake):
    fake.fill(NAME, {})
    push.main(ready(hub_private_repo=False))
    assert sorted(fake.repos[NAME].files) == SENT and not fake.repos[NAME].private


def test_a_public_repository_gets_nothing_private(ready, fake):
    fake.fill(NAME, {}, private=False)
    assert "is there and public, and hub_private_repo=true" in refusal(push.main, ready())


def test_an_update_that_arrives_wrong_leaves_what_was_there_before(ready, fake, tmp_path):
    """Others load it meanwhile: once its weights were deleted, and the new files beside them stayed."""
    push.main(ready())
    before = fake.repos[NAME].files
    weights = tmp_path / "pretrain/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "pretrain/model/chat_template.jinja").write_text("{{ messages }}")
    fake.fail("put", WRONG_BYTES)
    assert "what was there before is back" in refusal(push.main, ready(update=True))
    assert fake.repos[NAME].files == before
    fake.large.clear()
    push.main(ready(update=True))
    assert fake.repos[NAME].files["model.safetensors"].content == weights.read_bytes()


def test_an_update_that_cannot_be_taken_back_names_the_version_before(ready, fake, monkeypatch):
    before = fake.fill(NAME, {"config.json": b"{}", "notes.txt": b"keep"}).head
    fake.fail("put", WRONG_BYTES)
    fake.fail("paths", 500, 9)
    line = refusal(push.main, ready(update=True))
    assert "could not be taken back" in line and f"revision={before[:12]}" in line


def test_what_others_put_beside_a_push_that_was_cut_is_theirs(ready, fake):
    fake.fail("commit", 500, 9)
    refusal(push.main, ready())
    fake.faults.clear()
    repo = fake.repos[NAME]
    repo.commit({**repo.commits[-1][1], "notes.txt": Blob(b"keep")})
    push.main(ready())
    assert sorted(repo.files) == sorted([*SENT, "notes.txt"])


def test_somebody_who_commits_meanwhile_is_not_overwritten(ready, fake):
    fake.on_commit = lambda: setattr(fake, "on_commit", lambda: None) or fake.repos[NAME].commit({})
    assert "somebody else changed" in refusal(push.main, ready())


def test_a_run_of_overfit_is_not_pushed(ready, tmp_path):
    """The card would show its rows, learnt by heart, as 100 % right."""
    path = tmp_path / "pretrain/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overfit": 5}))
    assert "never pushed" in refusal(push.main, ready(dry_run=True))


def test_a_home_is_spelled_with_a_tilde_too(ready, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    push.main(ready(model_name_or_path="~/pretrain", output_dir="~/told", dry_run=True))
    assert (tmp_path / "told/README.md").is_file()


def test_a_file_where_the_card_should_go_is_one_line(ready, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "cannot be written" in refusal(push.main, ready(output_dir=str(tmp_path / "taken"), dry_run=True))


# the whole way, from the command line


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, code = sys.argv[1], sys.argv[2] == "code"
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=code).eval()
assert "llmkit" not in sys.modules and len(AutoTokenizer.from_pretrained(name, trust_remote_code=code)) > 0
print(type(model).__name__, model(torch.tensor([[5, 6, 7, 8]])).logits.double().sum().item())
"""


@pytest.mark.slow
def test_a_fresh_process_loads_what_the_command_pushed(tmp_path, model):
    """Our own model with its code, and the same weights as a Qwen3 folder, which needs none."""
    home, here = tmp_path / "home", Path(__file__).parents[2]
    plain = tmp_path / "qwen3"
    from llmkit.model.convert import to_plain

    to_plain(AutoModelForCausalLM.from_pretrained(model / "model"), "qwen3").save_pretrained(plain)
    tiny.bpe_tokenizer(bos=True, chat=False).save_pretrained(plain)
    expected = AutoModelForCausalLM.from_pretrained(plain).eval()(torch.tensor([[5, 6, 7, 8]])).logits.double().sum()
    with FakeHub() as server:
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        env = {key: value for key, value in os.environ.items() if key not in offline}
        env |= {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        for folder, name, code in ((model, "ann/toy", "code"), (plain, "ann/plain", "plain")):
            words = [
                "--model_name_or_path",
                str(folder),
                "--hub_model_id",
                name,
                "--license",
                "mit",
                "--dry_run",
                "false",
            ]
            words += ["--output_dir", str(tmp_path / "out")]
            pushed = subprocess.run(
                [sys.executable, "-m", "llmkit", "push", *words], cwd=here, env=env, capture_output=True, text=True
            )
            assert pushed.returncode == 0, pushed.stderr
            assert TOKEN not in pushed.stdout + pushed.stderr
            loaded = subprocess.run(
                [sys.executable, "-c", SCRIPT, name, code], cwd=tmp_path, env=env, capture_output=True, text=True
            )
            assert loaded.returncode == 0, loaded.stderr
            kind, total = loaded.stdout.split()
            assert kind == {"code": "LlmkitForCausalLM", "plain": "Qwen3ForCausalLM"}[code]
            assert float(total) == pytest.approx(expected.item(), abs=1e-3)
    stored = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and TOKEN in path.read_text()]
    assert stored == []


# push_to_hub of a training recipe


def recipe(tmp_path, **more) -> list[str]:
    given = dict(output_dir=str(tmp_path / "run"), push_to_hub="true", hub_model_id=NAME, license="mit") | more
    return [f"--{key}={value}" for key, value in given.items() if value is not None]


@pytest.fixture
def trained(monkeypatch, ready, tmp_path):
    """`llmkit pretrain` whose training is a folder that appears, and the calls made until then."""
    from llmkit import cli

    seen: dict = {"status": "ok"}

    def train(verb, words, settings):
        seen["ran"] = True
        if seen.get("code"):
            return seen["code"]
        (tmp_path / "pretrain").rename(tmp_path / "run")
        result = tmp_path / "run/result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"status": seen["status"]}))
        return 0

    monkeypatch.setattr(cli, "_run_verb", train)
    seen["call"] = lambda **more: cli.run_verb("pretrain", recipe(tmp_path, **more))
    return seen


def test_a_recipe_that_asks_for_it_is_pushed_after_the_run(trained, fake):
    assert trained["call"]() == 0
    assert sorted(fake.repos[NAME].files) == SENT and fake.repos[NAME].private


@pytest.mark.parametrize(
    "more, said",
    [
        ({"hub_model_id": None}, "e.g. ann/toy-sft"),
        ({"license": None}, "license is unknown"),
        ({"license": "other"}, "license=other (given): the Hub asks for its name"),
        ({"hub_model_id": "bob/toy"}, "no write access"),
        ({"overfit": 5}, "never pushed"),
    ],
)
def test_what_could_not_be_pushed_stops_before_step_1(more, said, trained, fake):
    assert said in refusal(lambda: trained["call"](**more)) and "ran" not in trained


def test_a_taken_name_stops_before_step_1(trained, fake):
    fake.fill(NAME, {"config.json": b"{}"})
    line = refusal(trained["call"])  # --update is no key of a training verb
    assert "is taken" in line and "or push after the run: llmkit push --update true" in line and "ran" not in trained


@pytest.mark.parametrize("name", ["LLMKIT_LAUNCHED", "RANK"])
def test_a_rank_of_a_launch_neither_asks_nor_pushes(name, trained, fake, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert trained["call"]() == 0 and fake.calls == []


def test_a_verb_that_failed_pushes_nothing(trained, fake, capsys):
    trained["code"] = 1
    assert trained["call"]() == 1
    assert "commit" not in fake.calls and "not done" not in capsys.readouterr().out


def test_a_stopped_run_is_not_pushed_and_that_is_said(trained, fake, capsys):
    trained["status"] = "stopped"
    trained["call"]()
    assert fake.repos[NAME].files == {}
    assert "not done: the run is stopped; once it has ended: llmkit push --model" in capsys.readouterr().out


def test_a_push_that_fails_keeps_the_run_and_names_the_command(trained, fake, tmp_path):
    fake.fail("commit", 500, 9)
    line = refusal(lambda: trained["call"](hub_private_repo="false"))
    assert "a fault of its own (500)" in line and "again: llmkit push --model_name_or_path" in line
    words = line.split("again: llmkit push ")[1].split()
    assert (tmp_path / "run/model/config.json").exists()
    fake.faults.clear()
    push.main(configs.load(PushConfig, [*words, "--output_dir", str(tmp_path / "out")], "push"))
    assert sorted(fake.repos[NAME].files) == SENT and not fake.repos[NAME].private


@pytest.mark.parametrize("key, value", [("hub_model_id", "ann/x"), ("hub_private_repo", "false"), ("license", "mit")])
@pytest.mark.parametrize("verb", ["pretrain", "sft"])
def test_settings_of_the_hub_without_push_to_hub_are_errors(verb, key, value, tmp_path):
    from llmkit import cli
    from llmkit.align import build as tuned
    from llmkit.train import build as trained_

    words = ["--output_dir", str(tmp_path), "--datasets", "[{path: text, data_files: a.txt}]", f"--{key}={value}"]
    words += ["--model_name_or_path", "x"] if verb == "sft" else []
    check = {"pretrain": trained_, "sft": tuned}[verb].check_config
    line = refusal(check, configs.load(cli.VERBS[verb][1], words, verb))
    assert key in line and "has no effect without push_to_hub: true" in line
