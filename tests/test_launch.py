"""Several processes: what is launched, what is refused before, and that ranks say a mistake once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llmkit import cli, launch
from llmkit.config import UserError
from llmkit.run import LOST, is_main
from llmkit.verbs import PretrainConfig

ROOT = Path(__file__).parent.parent
RECIPE = {
    "config_overrides": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "datasets": [{"path": "builtin/toyworld", "split": "train[:50]"}],
    "tokenizer_type": "char",
    "max_length": 64,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "sample_max_new_tokens": 4,
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def no_launch_variables(monkeypatch):
    for name in ("RANK", *launch.LAUNCHED, launch.ERROR_FILE):
        monkeypatch.delenv(name, raising=False)


def settings(**keys) -> PretrainConfig:
    return PretrainConfig(output_dir="x", **keys)


def config_file(folder: Path, **keys) -> str:
    path = folder / "acc.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_a_relaunch_happens_once_and_only_when_asked_for(monkeypatch):
    asked = [dict(accelerate_config="cpu"), dict(num_processes=2)]
    assert all(launch.is_wanted(settings(**keys)) for keys in asked)
    assert not any(launch.is_wanted(settings(**keys)) for keys in ({}, dict(num_processes=1)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert not any(launch.is_wanted(settings(**keys)) for keys in asked) and not is_main()


def test_the_relaunch_repeats_the_call(tmp_path):
    path, argv = tmp_path / "two.yaml", ["r.yaml", "--num_processes", "2"]
    verb = ["--log_dir", str(tmp_path), "-m", "llmkit", "pretrain", *argv]
    gpu = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), "--num_processes", "2"]
    assert launch.command(path, {}, 2, "pretrain", argv, tmp_path) == gpu + verb
    cpu = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert launch.command(path, {"use_cpu": True}, 2, "pretrain", argv, tmp_path) == cpu + verb


@pytest.mark.parametrize("num_processes, expected", [(None, 4), (2, 2)])
def test_threads_are_shared_by_the_processes_of_either_source(num_processes, expected, tmp_path, monkeypatch):
    """Four processes of the YAML once took every core each."""
    seen = {}

    def watch(command, environment, errors):
        seen.update(environment, command=command)
        return 7, False

    monkeypatch.setattr(launch, "_watch", watch)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    keys = settings(accelerate_config=config_file(tmp_path, use_cpu=True, num_processes=4), num_processes=num_processes)
    assert launch.relaunch(keys, "pretrain", []) == 7
    assert seen["OMP_NUM_THREADS"] == str(16 // expected) and str(expected) in seen["command"]


def test_the_default_is_what_the_machine_has(monkeypatch):
    for has_gpu, use_cpu, name in ((False, False, "cpu"), (True, True, "cpu"), (True, False, "multi_gpu")):
        monkeypatch.setattr(launch, "_has_gpu", lambda value=has_gpu: value)
        assert launch.read_config(settings(num_processes=2, use_cpu=use_cpu))[0].stem == name


@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu"])
def test_a_gpu_config_is_refused_without_a_gpu(name, monkeypatch, capsys):
    """It once trained on the CPU, or ended in a traceback of NCCL."""
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    assert cli.main(["pretrain", "--output_dir", "x", "--accelerate_config", name]) == 2
    expected = f"accelerate_config={name}: needs an NVIDIA GPU, this machine has none; allowed here: cpu"
    expected += ", or use_cpu: true to try the engine on CPU processes"
    assert capsys.readouterr().err == f"llmkit: {expected}\n"


def test_a_gpu_engine_can_be_tried_on_cpu_processes(monkeypatch):
    """accelerate would start one process there, or turn the engine into plain DDP; the ranks read these variables."""
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    for name, said in (
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        ("cpu", {}),
    ):
        path, values, count = launch.read_config(settings(accelerate_config=name, use_cpu=True))
        environment = launch.engine_environment(values)
        assert said.items() <= environment.items() and bool(environment) == bool(said)
        assert count == (1 if name == "cpu" else 2) and "torch.distributed.run" in launch.command(
            path, values, count, "pretrain", [], path
        )


@pytest.mark.parametrize("num_processes", [0, -3])
def test_fewer_than_one_process_is_refused(num_processes, tmp_path, capsys):
    """-3 processes once trained with one and said nothing."""
    asked = ["pretrain", "--output_dir", "x"]
    path = config_file(tmp_path, use_cpu=True, num_processes=num_processes)
    for words in (["--num_processes", str(num_processes)], ["--accelerate_config", path]):
        assert cli.main([*asked, *words]) == 2
        assert capsys.readouterr().err == f"llmkit: num_processes={num_processes}; allowed: 1 or more\n"


@pytest.mark.parametrize("text", ["", "a: [1\n", "- 1\n"], ids=["empty", "broken", "list"])
def test_a_broken_accelerate_config_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "acc.yaml"
    path.write_text(text)
    assert cli.main(["pretrain", "--output_dir", "x", "--accelerate_config", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"llmkit: {path}: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "keys, said",
    [
        (
            {"deepspeed_config": {"zero_stage": 2, "gradient_clipping": 1.0}},
            "deepspeed_config.gradient_clipping has no",
        ),
        ({"distributed_type": "DEEPSPEED"}, "distributed_type DEEPSPEED without deepspeed_config"),
        ({"mixed_precision": "fp16"}, "mixed_precision=fp16; allowed: no, bf16"),
    ],
)
def test_settings_of_the_yaml_that_would_be_ignored_are_refused(keys, said, tmp_path):
    with pytest.raises(UserError, match=said):
        launch.read_config(settings(accelerate_config=config_file(tmp_path, use_cpu=True, **keys)))


@pytest.mark.parametrize("path", sorted(launch.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_read(path, monkeypatch):
    monkeypatch.setattr(launch, "_has_gpu", lambda: True)
    assert launch.read_config(settings(accelerate_config=path.stem))[0] == path


def test_a_signal_reaches_a_child_whose_launcher_passes_nothing_on(tmp_path):
    """As accelerate's launcher of one process: the training went on, with nobody to stop it."""
    child = (
        "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(30)"
    )
    launcher = f"import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    errors = tmp_path / "error"
    errors.touch()
    watched = (
        f"import os, sys\nfrom pathlib import Path\nfrom llmkit import launch\n"
        f"print(launch._watch([sys.executable, '-c', {launcher!r}], dict(os.environ), Path({str(errors)!r})))"
    )
    command = [sys.executable, "-c", watched]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert out.strip().endswith("True)")


def test_an_unknown_accelerate_config_lists_the_shipped_ones(tmp_path, monkeypatch):
    (tmp_path / "zero2.yaml").write_text("a: 1")
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    assert launch.find_config("zero2") == tmp_path / "zero2.yaml"
    with pytest.raises(UserError, match=r"^accelerate_config='zeero': no such file; .* or zero2$"):
        launch.find_config("zeero")


def test_only_the_first_rank_says_an_error(monkeypatch, capsys, tmp_path):
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        launch.say_error(f"from {rank}")
    assert capsys.readouterr().err == "from 0\n"
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error"))
    launch.say_error("to the parent")
    assert (tmp_path / "error").read_text() == "to the parent\n" and not capsys.readouterr().err


def test_stderr_passes_until_a_rank_has_said_its_error(tmp_path, capsys):
    errors = tmp_path / "error"
    errors.touch()
    script = "import sys\nprint('before', file=sys.stderr, flush=True)\nsys.stdin.readline()\n{}\nsys.exit('after')"
    for said, expected in (("", "before\nafter\n"), (f"open({str(errors)!r}, 'w').write('x')", "before\n")):
        # stdin is at its end: the pause is the time that `before` needs
        code, is_asked = launch._watch(
            [sys.executable, "-c", script.format(f"import time; time.sleep(0.5)\n{said}")], dict(os.environ), errors
        )
        assert (code, is_asked) == (1, False) and capsys.readouterr().err == expected


@pytest.mark.medium
def test_a_mistake_in_two_processes_is_one_line_and_exit_2(tmp_path):
    """Every rank said it, torchrun added a report of 30 lines, and the exit code was 1."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "store_dir": str(tmp_path / "data")} | RECIPE))
    argv = [sys.executable, "-m", "llmkit", "pretrain", str(path), "--num_processes", "2"]
    argv += ["--config_overrides.vocab_size", "5"]
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)
    assert not list((tmp_path / "tmp").glob("torchelastic*"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("llmkit: vocab_size=5") and "# llmkit pretrain" in done.stdout


def test_a_crash_on_a_rank_is_shown_even_after_an_error(tmp_path, capsys):
    errors = tmp_path / "error"
    errors.write_text("x")
    script = "import sys; print('[rank1]: Traceback', file=sys.stderr); print('report', file=sys.stderr)"
    launch._watch([sys.executable, "-c", script], dict(os.environ), errors)
    assert capsys.readouterr().err == "[rank1]: Traceback\n"


@pytest.mark.parametrize(
    "status, is_asked, code", [("stopped", True, 0), ("stopped", False, 1), (None, True, 130), ("ok", True, 130)]
)
def test_exit_code_and_environment_of_a_relaunch(status, is_asked, code, tmp_path, monkeypatch):
    if status:
        (tmp_path / "result.json").write_text(json.dumps({"status": status}))
    seen = {}

    def watch(command, environment, errors):
        seen.update(environment)
        return 1, is_asked

    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    monkeypatch.setattr(launch, "_watch", watch)
    config = PretrainConfig(output_dir=str(tmp_path), accelerate_config="zero2", use_cpu=True)
    assert launch.relaunch(config, "pretrain", []) == code
    assert seen["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2" and int(seen["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 60


@pytest.mark.parametrize(
    "lines, code, said", [(["llmkit: rank 0 " + LOST, "llmkit: a mistake"], 2, "llmkit: a mistake"), ([LOST], 1, LOST)]
)
def test_of_the_ranks_lines_the_cause_is_said(lines, code, said, tmp_path, monkeypatch, capsys):
    """A rank that lost the others does not know why; it may be the first to say so."""

    def watch(command, environment, errors):
        errors.write_text("\n".join(lines))
        return 1, False

    monkeypatch.setattr(launch, "_watch", watch)
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    assert launch.relaunch(PretrainConfig(output_dir=str(tmp_path), num_processes=2), "pretrain", []) == code
    assert capsys.readouterr().err == said + "\n"


def test_a_child_that_outlives_the_launcher_keeps_nobody_waiting(tmp_path):
    """torch's compile workers held the pipe open, and a run that was done did not end."""
    errors = tmp_path / "error"
    errors.touch()
    script = "import subprocess; subprocess.Popen(['sleep', '20'])"
    started = time.perf_counter()
    assert launch._watch([sys.executable, "-c", script], dict(os.environ), errors) == (0, False)
    assert time.perf_counter() - started < 15
