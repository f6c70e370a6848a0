"""The front desk: `llmkit <verb> recipe.yaml --key value`; a verb has one word or two.

Owns the verb table, the checks before a training verb, and the exit codes: 0 done, 1 crashed, a check failed or a
stage got worse, 2 the user's mistake (one line), 3 a check could not run, 130 interrupted, 141 when nobody reads the
output any more (`llmkit help x | head -1`).
Leaves out everything heavy: a verb's module is imported when the verb runs.
"""

import dataclasses
import errno
import importlib
import os
import select
import sys
from pathlib import Path
from typing import Any

from . import __version__, config, launch, run, tuning, verbs

# verb -> (module, config class, what it does)
VERBS: dict[str, tuple[str, type, str]] = {
    "check": ("check.verb", verbs.CheckConfig, "find the silent bugs of a model, tokenizer, data set or trainer"),
    "data": (
        "data.prepare",
        verbs.DataConfig,
        "make token stores of text: clean, deduplicate, decontaminate, tokenise",
    ),
    "tokenizer train": ("data.tokenizer_train", verbs.TokenizerTrainConfig, "train a BPE or char-level tokenizer"),
    "tokenizer check": ("data.tokenizer_check", verbs.TokenizerCheckConfig, "check any tokenizer, also on your text"),
    "inspect": ("data.inspect_verb", verbs.InspectConfig, "show what the model will really see, token by token"),
    "pretrain": ("train.pretrain", verbs.PretrainConfig, "train a causal LM from scratch, or go on training one"),
    "sft": ("align.sft", tuning.SftConfig, "tune any causal LM on instructions: full, LoRA, QLoRA, DoRA"),
    "dpo": ("align.dpo", tuning.DpoConfig, "tune on preference pairs: DPO and its relatives"),
    "kto": ("align.kto", tuning.KtoConfig, "tune on answers marked good or bad"),
    "rrhf": ("align.rrhf", tuning.RrhfConfig, "tune on ranked answers"),
    "reward": ("align.reward_model", tuning.RewardConfig, "train a reward model on preference pairs"),
    "grpo": ("align.grpo", tuning.GrpoConfig, "tune on rewards, watched for reward hacking"),
    "eval": ("evaluate.verb", verbs.EvalConfig, "compare models side by side: tasks, perplexity, regression prompts"),
    "report": ("report.report", verbs.ReportConfig, "every stage on one page: gained, lost, curves, alarms, lineage"),
    "merge": ("align.merge", verbs.MergeConfig, "write adapter and base as one plain model, checked"),
    "generate": ("deploy.generate", verbs.GenerateConfig, "continue a prompt or a file of them, streaming"),
    "quantize": ("deploy.quantize", verbs.QuantizeConfig, "write a model in 8 or 4 bit, and measure what that cost"),
    "export": (
        "deploy.export",
        verbs.ExportConfig,
        "write a plain Qwen3 or Llama folder, or GGUF: no llmkit needed",
    ),
    "push": ("deploy.push", verbs.PushConfig, "publish a model with its card; first only say what would go"),
    "serve": ("deploy.serve", verbs.ServeConfig, "answer requests in OpenAI's API from a plain model folder"),
}
# verb -> the module whose `get_subject(settings, tier)` hands it to the checks
TUNING = ("sft", "dpo", "kto", "rrhf", "reward", "grpo")
PREFLIGHT = {"pretrain": "train.preflight"} | dict.fromkeys(TUNING, "align.preflight")


def usage() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, _, text) in VERBS.items())
    return (
        f"llmkit {__version__}: train small language models so that nothing goes silently wrong\n\n"
        "usage: llmkit <verb> [recipe.yaml] [--key value | --key=value | key=value ...]\n"
        f"       llmkit help <verb>        every key, what it allows, its default\n\n{rows}"
    )


def help_for(words: list[str]) -> str:
    """Of the verb that the words begin with; of all verbs of a first word that needs a second."""
    verbs = _second_words(words[0]) if len(words) == 1 else []
    shown = [(verb, VERBS[verb][1]) for verb in verbs or [_verb(words)[0]]]
    return "\n\n\n".join(f"llmkit {v}: {(cls.__doc__ or '').strip()}\n\n{config.describe(cls)}" for v, cls in shown)


def _second_words(word: str) -> list[str]:
    return [verb for verb in VERBS if verb.startswith(f"{word} ")]


def _verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb that the words begin with, and the rest."""
    for count in (2, 1):
        if (verb := " ".join(words[:count])) in VERBS:
            return verb, words[count:]
    if verbs := _second_words(words[0]):
        raise config.UserError(
            f"{' '.join(words[:2])!r}: {words[0]!r} needs a second word; allowed: {', '.join(verbs)}"
        )
    raise config.UserError(f"unknown verb {words[0]!r}; allowed: {', '.join(VERBS)}; `llmkit --help` says what they do")


def run_verb(verb: str, words: list[str]) -> int:
    settings: Any = config.load(VERBS[verb][1], words, verb)
    pushes = verb in PREFLIGHT and settings.push_to_hub and not launch.is_relaunched() and run.is_main()
    if pushes:
        _import("deploy.push").check_access(settings)
    code = _run_verb(verb, words, settings)
    if pushes and not code:
        _import("deploy.push").after(settings)
    return code


def _run_verb(verb: str, words: list[str], settings: Any) -> int:
    if verb in PREFLIGHT:
        if launch.is_wanted(settings):
            return launch.relaunch(settings, verb, words)
        if run.is_main():
            print(f"# llmkit {verb}\n{config.dump(settings)}", flush=True)
            if not settings.skip_checks and (code := preflight(verb, settings)):
                return code
    code = _import(VERBS[verb][0]).main(settings)
    return code if isinstance(code, int) else 0  # the verbs that check something give one


def preflight(verb: str, settings: Any) -> int:
    """Tier 0 before a training verb: seconds. The report goes into the folder of the run; 1 when a check failed."""
    selection = _import("check.attach").selection(0, (), (), settings.check_ignore)
    report = _import("check.runner").run(_import(PREFLIGHT[verb]).get_subject(settings, 0, is_start=True), selection)
    if report.count("fail"):
        _import("check.verb").show(report, verbs.CheckConfig())
        launch.say_error(f"llmkit: {verb} was not started; mend what failed, or add --skip_checks")
        return 1
    run.HANDED_OVER[run.CHECK] = report.to_json()
    print(f"checks    {report.summary()}", flush=True)
    return 0


def check(words: list[str]) -> int:
    """`llmkit check` of a folder, of a recipe, or of the trainer that a command after `--` builds."""
    settings, stage, command = _settings_and_stage("check", words)
    subject: Any = None
    if stage is not None:
        settings = dataclasses.replace(settings, check_ignore=stage.settings.check_ignore)
        subject = stage.get_subject(settings.tier)
    return _import("check.verb").main(settings, subject, command)


def inspect(words: list[str]) -> int:
    """`llmkit inspect` of a recipe, of the trainer that a command after `--` builds, or of a data set."""
    settings, stage, command = _settings_and_stage("inspect", words)

    def get_subject() -> Any:
        assert stage is not None
        subject = stage.get_subject(1, is_data_only=True)
        subject.target = str(config.parse_args(words)[0])
        return subject

    return _import("data.inspect_verb").main(settings, get_subject if stage is not None else None, command)


@dataclasses.dataclass
class Stage:
    """A training verb and the settings that a recipe gives it."""

    verb: str
    settings: Any

    def get_subject(self, tier: int, **options: Any) -> Any:
        return _import(PREFLIGHT[self.verb]).get_subject(self.settings, tier, **options)


def _verb_of(recipe: Path, keys: set[str]) -> str:
    """The training verb that a recipe is for: by its keys, else by its name: sft.yaml, sft_qlora.yaml.

    Raises UserError where neither decides.
    """
    fits = [verb for verb in PREFLIGHT if keys <= _keys(VERBS[verb][1])]
    named = [verb for verb in PREFLIGHT if recipe.stem.split("_")[0] == verb]
    if len(fits) == 1 or not named:
        if len(fits) > 1:
            raise config.UserError(
                f"{recipe}: may be a recipe of {' or '.join(fits)}; name the file so, e.g. {fits[0]}_{recipe.name}"
            )
        return fits[0] if fits else "pretrain"  # whose error names the unknown key
    return named[0]


def _settings_and_stage(verb: str, words: list[str]) -> tuple[Any, Stage | None, list[str] | None]:
    """The verb's own settings; those of the recipe that it looks at, if one is given; the command after `--`."""
    command = None
    if "--" in words:
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    recipe, raw = config.parse_args(words)
    cls = VERBS[verb][1]
    own = _keys(cls)
    if recipe is None or (given := set(config.read_recipe(recipe))) <= own:
        return config.load(cls, words, verb), None, command
    trained = _verb_of(recipe, given)
    their_cls = VERBS[trained][1]
    theirs = _keys(their_cls)
    # what a training verb would run; keys that both know are the recipe's
    flags = {key: f"--{key}={value}" for key, value in raw.items()}
    for_recipe = [flag for key, flag in flags.items() if key.split(".")[0] in theirs or key not in own]
    stage = Stage(trained, config.load(their_cls, [str(recipe), *for_recipe], trained))
    settings: Any = config.load(cls, [f for f in flags.values() if f not in for_recipe], verb)
    if command is not None:
        raise config.UserError(f"{recipe} and a command after `--`; give one of them")
    return settings, stage, command


def _keys(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _import(module: str) -> Any:
    return importlib.import_module(f".{module}", __package__)


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help") or argv == ["help"]:
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] == "help":
        print(help_for(argv[1:]))
        return 0
    flags = argv[: argv.index("--")] if "--" in argv else argv  # a command's own flags are not ours
    if "-h" in flags or "--help" in flags:
        print(help_for([word for word in flags if word not in ("-h", "--help")]))
        return 0
    verb, rest = _verb(argv)
    run.quiet_loggers()
    try:
        looking = {"check": check, "inspect": inspect}  # verbs that look at what another verb would run
        return looking[verb](rest) if verb in looking else run_verb(verb, rest)
    except ImportError as error:
        if error.name and error.name.startswith("llmkit"):
            raise
        what = repr(error.name) if error.name else f"a package: {error}"  # transformers and accelerate give no name
        raise config.UserError(
            f"llmkit {verb} needs {what}; run `make setup-all` or `pip install -e '.[all]'`"
        ) from None


def _is_stdout_closed() -> bool:
    """The reader of our output is gone; a BrokenPipeError may also come from a socket, and that is a crash."""
    poll = select.poll()
    poll.register(1, 0)  # errors and hang-ups are reported unasked
    return bool(poll.poll(0))


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, since at exit nobody could catch what it raises
        return code
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return 141
    except config.UserError as error:
        launch.say_error(" ".join(["llmkit:", *str(error).split("\n")]))  # one line, whatever a library put into it
        return 2
    except OSError as error:
        cannot_write = isinstance(error, (NotADirectoryError, FileExistsError, PermissionError))
        if not (run.is_disk_full(error) or cannot_write or error.errno == errno.EROFS):
            raise
        reason = "the disk is full" if run.is_disk_full(error) else error.strerror
        launch.say_error(f"llmkit: {error.filename or 'writing'}: {reason}; make room or choose another folder")
        return 2
    except KeyboardInterrupt:
        launch.say_error("llmkit: interrupted")
        return 130
