"""Recipes and overrides: what a user may write, and that every mistake is named in one line."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from llmkit.cli import VERBS
from llmkit.config import RENAMED, UserError, describe, dump, load, option
from llmkit.tuning import DpoConfig, GrpoConfig, KtoConfig, RewardConfig, RrhfConfig, SftConfig
from llmkit.verbs import ExportConfig, GenerateConfig, PretrainConfig

FILES = (Path(__file__).parent.parent / "recipes").glob("*/*.yaml")
RECIPES = sorted(path for path in FILES if path.name != "regression.yaml")  # a list of prompts: tests/evaluate
# keys of PretrainConfig that TrainingArguments and TRL lack; everything else must be spelled as they spell it
OURS = {
    "model_type", "config_overrides", "tokenizer_name", "tokenizer_type", "vocab_size", "datasets", "eval_datasets",
    "data_dir", "store_dir", "document_isolation", "muon_learning_rate", "muon_momentum", "ngram_order",
    "sample_prompts", "sample_max_new_tokens", "accelerate_config", "num_processes",
    "skip_checks", "check_ignore", "overfit", "eval_tasks", "eval_tasks_limit", "license",
}  # fmt: skip
OURS_IN_TUNING = {
    "datasets", "eval_datasets", "data_dir", "test_split_size", "max_bad_rows", "skip_checks", "check_ignore",
    "accelerate_config", "num_processes", "passed_on", "eval_tasks", "eval_tasks_limit", "license",
}  # fmt: skip
# and of each verb; all else must be spelled as TRL spells it, here or in another of its configs
OURS_ALONE = {
    SftConfig: {"overfit", "eval_answers", "max_new_tokens"},
    DpoConfig: {"eval_samples", "max_new_tokens", "ref_model_name_or_path"},
    KtoConfig: {"eval_samples", "max_new_tokens", "ref_model_name_or_path"},
    RrhfConfig: {"eval_samples", "max_new_tokens", "rank_weight"},
    RewardConfig: set(),
    GrpoConfig: {"reward_funcs", "gold_verifier", "gold_prompts", "canary_datasets", "stop_on_alarm"},
}


def recipe(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*argv: str, cls: type = PretrainConfig, verb: str = "pretrain") -> str:
    with pytest.raises(UserError) as error:
        load(cls, list(argv), verb)
    return str(error.value)


@pytest.mark.parametrize("words", ["--max_steps 7", "--max_steps=7", "max_steps=7", "--max-steps 7"])
@pytest.mark.parametrize("by", [[], ["--config"]], ids=["recipe", "--config recipe"])
def test_every_way_to_override_wins_over_the_recipe(words, by, tmp_path):
    config = load(PretrainConfig, [*words.split(), *by, recipe(tmp_path, "max_steps: 3\nseed: 5\n")])
    assert (config.max_steps, config.seed, config.max_length) == (7, 5, 256)


def test_config_equals_recipe_is_read_too(tmp_path):
    path = recipe(tmp_path, "seed: 5")
    assert load(PretrainConfig, [f"--config={path}"]).seed == load(PretrainConfig, [f"config={path}"]).seed == 5


def test_key_equals_value_may_end_in_yaml():
    """`accelerate_config=my.yaml` was once taken for the recipe."""
    assert load(PretrainConfig, ["accelerate_config=my.yaml"]).accelerate_config == "my.yaml"


def test_a_recipe_may_have_an_equals_sign_in_its_path(tmp_path):
    (tmp_path / "lr=3").mkdir()
    assert load(PretrainConfig, [recipe(tmp_path / "lr=3", "seed: 5")]).seed == 5


def test_dotted_keys_reach_into_mappings_and_lists(tmp_path):
    path = recipe(tmp_path, "config_overrides: {hidden_size: 1, head_dim: 2}\ndatasets: [{path: a}, {path: b}]\n")
    words = ["--config_overrides.hidden_size=64", "config_overrides.rope_parameters.rope_theta=5e5"]
    config = load(PretrainConfig, [path, *words, "--datasets.1.path", "c"])
    assert config.config_overrides == {"hidden_size": 64, "head_dim": 2, "rope_parameters": {"rope_theta": 5e5}}
    assert config.datasets == [{"path": "a"}, {"path": "c"}]
    assert load(PretrainConfig, words[:1]).config_overrides == {"hidden_size": 64}  # without a recipe, too
    assert "'2' is no item of a list of 2" in refusal(path, "--datasets.2.path", "c")
    assert "no part 'x'" in refusal(path, "--config_overrides.head_dim.x", "c")


def test_defaults_are_never_shared_between_configs():
    load(PretrainConfig, []).config_overrides["x"] = 1
    assert load(PretrainConfig, []).config_overrides == {}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "+1e-3", ".1e-2"])
def test_scientific_notation_is_a_number(text, tmp_path):
    assert load(PretrainConfig, ["--learning_rate", text]).learning_rate == 0.001
    assert load(PretrainConfig, [recipe(tmp_path, f"learning_rate: {text}")]).learning_rate == 0.001


def test_values_take_the_type_of_their_key():
    config = load(PretrainConfig, ["--learning_rate", "1", "--warmup_steps=-1", "--use_cpu", "--eval_steps", "null"])
    assert repr((config.learning_rate, config.warmup_steps)) == "(1.0, -1.0)"
    assert config.use_cpu is True and config.eval_steps is None
    assert load(PretrainConfig, ["--sample_prompts", '["", "Lumo is"]']).sample_prompts == ["", "Lumo is"]
    assert load(PretrainConfig, ["--lora_target_modules", "[q_proj]"]).lora_target_modules == ["q_proj"]


@pytest.mark.parametrize(
    "text", ["123", "yes", "null", "1e-3", "2024-01-01", "2024-13-45", "a: b", "[x", "{", "x=1", "0x_", ""]
)
def test_a_prompt_stays_the_text_it_is(text):
    """2024-13-45 looks like a date that does not exist, and once ended in a traceback."""
    assert load(GenerateConfig, ["--prompt", text], "generate").prompt == text


def test_an_unknown_key_names_the_nearest(tmp_path):
    assert "unknown key 'learning_rat'; nearest: 'learning_rate'" in refusal("--learning_rat", "1")
    path = recipe(tmp_path, "max_step: 3")
    assert refusal(path).startswith(f"{path}: unknown key 'max_step'; nearest: 'max_steps'")
    assert "help generate" in refusal("--zzz", "1", cls=GenerateConfig, verb="generate")


@pytest.mark.parametrize("key", ["label_smoothing_factor", "fsdp", "hub_token"])
def test_a_training_argument_that_we_lack_is_called_that(key):
    assert f"{key!r} is one of TrainingArguments that `llmkit pretrain` does not implement" in refusal(f"--{key}", "1")


@pytest.mark.parametrize("key", RENAMED)
def test_a_renamed_key_names_todays(key):
    assert refusal(f"--{key}", "1") == f"--{key}: key {key!r} has another name here; write {RENAMED[key]}"


def test_renamed_keys_are_no_keys_and_point_at_keys():
    keys = {field.name for field in dataclasses.fields(PretrainConfig)}
    assert not keys & set(RENAMED)
    for old, new in RENAMED.items():
        assert new.startswith("`llmkit ") or re.split(r"\W", new)[0] in keys, old


@pytest.mark.parametrize(
    "key, value, shown, allowed",
    [
        ("max_steps", "ten", "'ten' is str", "int"),
        ("max_steps", "1.5", "1.5 is float", "int"),
        ("max_steps", "true", "True is bool", "int"),
        ("seed", "null", "None is NoneType", "int"),
        ("learning_rate", "fast", "'fast' is str", "float"),
        ("learning_rate", "true", "True is bool", "float"),
        ("use_cpu", "1", "1 is int", "bool"),
        ("eval_steps", "x", "'x' is str", "int | null"),
        ("datasets", "{a: 1}", "{'a': 1} is dict", "list"),
        ("config_overrides", "[1]", "[1] is list", "dict"),
        ("optim", "adam", "'adam' is str", "adamw_torch | adamw_torch_fused | muon"),
        ("tokenizer_type", "null", "None is NoneType", "bpe | char"),
        ("lora_target_modules", "3", "'3' is str", None),  # text is allowed there, so 3 is a name
    ],
)
def test_a_wrong_type_names_key_value_and_allowed(key, value, shown, allowed, tmp_path):
    if allowed is None:
        assert getattr(load(PretrainConfig, [f"--{key}", value]), key) == value
        return
    assert refusal(f"--{key}", value) == f"--{key}: {key}={shown}; allowed: {allowed}"
    path = recipe(tmp_path, f"{key}: {value}")
    assert refusal(path) == f"{path}: {key}={shown}; allowed: {allowed}"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "key 'seed' is given twice (line 3); keep one"),
        ("config_overrides:\n  a: 1\n  a: 2\n", "key 'a' is given twice (line 3); keep one"),
        ("seed: 1\ndatasets: [1,\nmax_steps: 2\n", "line 4 is not valid YAML"),
        ("seed: 1\n\tmax_steps: 2\n", "line 2 is not valid YAML"),
        ("seed: 1\n[a]: 2\n", "line 2 is not valid YAML"),  # a list as a key once crashed
        ("{a: 1}: 2\n", "line 1 is not valid YAML"),
        ("seed: \0\n", "is not valid YAML"),
        ("run_name: 2024-13-45\n", "is not valid YAML (month must be in 1..12)"),
        ("max_steps: !!python/object:os.system 1\n", "line 1 is not valid YAML"),
        ("", "holds NoneType, expected `key: value` lines"),
        ("- a\n- b\n", "holds list, expected `key: value` lines"),
    ],
)
def test_a_broken_recipe_names_file_and_line(text, expected, tmp_path):
    path = recipe(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and expected in message


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    assert refusal(str(tmp_path / "no.yaml")).startswith(f"{tmp_path}/no.yaml: no such recipe")
    assert refusal(str(tmp_path)).startswith(f"{tmp_path}: cannot be read")
    (tmp_path / "latin.yaml").write_bytes("project: caf\xe9".encode("latin-1"))
    assert refusal(str(tmp_path / "latin.yaml")).startswith(f"{tmp_path}/latin.yaml: cannot be read")


def test_a_value_given_twice_is_refused(tmp_path):
    path = recipe(tmp_path, "seed: 1")
    assert refusal("--seed", "1", "seed=2") == "--seed is given twice; keep one"
    assert "two recipes" in refusal(path, "--config", path)
    assert "unexpected word" in refusal(path, path)
    assert refusal("--config_overrides", "{a: 1, a: 2}").startswith("--config_overrides: key 'a' is given twice")


@pytest.mark.parametrize("cls", [cls for _, cls, _ in VERBS.values()], ids=VERBS)
def test_a_dumped_config_loads_as_itself(cls, tmp_path):
    assert load(cls, [recipe(tmp_path, dump(cls()))]) == cls()


@pytest.mark.parametrize(
    "text", ["", " ", "123", "1e-3", "1e5", "yes", "null", "a: b", "x\ny\n", "\t", "é\u2028🙂", "#", "2024-01-01"]
)
def test_text_survives_the_dump(text, tmp_path):
    """PyYAML writes the text "1e-3" without quotes, and our loader then read a number."""
    config = PretrainConfig(run_name=text, sample_prompts=[text], config_overrides={"x": text, "y": 1e-3, "z": 1e-30})
    assert load(PretrainConfig, [recipe(tmp_path, dump(config))]) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipes_load_and_survive_the_dump(path, tmp_path):
    word = path.stem.split("_")[0]  # <verb>.yaml or <verb>_<variant>.yaml; of two words the first
    config = load(next(cls for verb, (_, cls, _) in VERBS.items() if verb.split()[0] == word), [str(path)])
    assert load(type(config), [recipe(tmp_path, dump(config))]) == config
    assert config.output_dir.startswith("runs/")


def names(*classes: type) -> set[str]:
    return {field.name for cls in classes for field in dataclasses.fields(cls)}


def test_keys_are_spelled_as_in_training_arguments_and_trl():
    import trl
    from transformers import TrainingArguments

    own = [getattr(trl, cls.PASSES_ON, TrainingArguments) for cls in OURS_ALONE]
    assert len({*own}) == 6 and {cls for _, cls, _ in VERBS.values() if hasattr(cls, "PASSES_ON")} == {*OURS_ALONE}
    theirs = names(TrainingArguments, trl.ModelConfig, *own)
    assert names(PretrainConfig) - names(TrainingArguments, trl.ModelConfig, trl.SFTConfig) == OURS
    for cls, ours in OURS_ALONE.items():
        assert names(cls) - theirs == OURS_IN_TUNING | ours, cls


@pytest.mark.parametrize("cls", [cls for _, cls, _ in VERBS.values()], ids=VERBS)
def test_help_lists_every_key_with_its_default(cls):
    lines = describe(cls).splitlines()
    fields = [field for field in dataclasses.fields(cls) if field.name != "passed_on"]  # has keys of TRL's, not one
    assert [line.split()[0] for line in lines[::2]] == [field.name for field in fields]
    for field, meaning, values in zip(fields, lines[::2], lines[1::2], strict=True):
        assert field.metadata["help"] in meaning
        if isinstance(field.default, (int, float)) and field.default is not False:
            assert yaml.safe_load(values.rsplit("default ", 1)[1].rstrip("]")) == field.default


def test_help_says_required_only_of_what_is():
    def required(cls: type) -> list[str]:
        lines = describe(cls).splitlines()
        return [name.split()[0] for name, values in zip(lines[::2], lines[1::2], strict=True) if "required" in values]

    assert required(PretrainConfig) == ["output_dir"]
    assert required(GenerateConfig) == ["model_name_or_path"]  # an empty prompt is a prompt
    assert required(ExportConfig) == ["model_name_or_path", "output_dir"]


@dataclasses.dataclass(frozen=True)
class TakesWords:
    WORDS: typing.ClassVar[str] = "runs"

    runs: list = option([], "folders")
    is_strict: bool = option(False, "a switch")
    name: str = option("", "a text")


def test_a_verb_may_take_any_number_of_plain_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    (tmp_path / "r.yaml").write_text("name: x\nruns: [old]\n")
    for argv, expected in (
        (["a", "b/c"], TakesWords(["a", "b/c"])),
        (["--is_strict", "a", "--name", "n", "b"], TakesWords(["a", "b"], True, "n")),
        (["--is-strict", "false", "a"], TakesWords(["a"])),
        (["r.yaml", "a"], TakesWords(["a"], name="x")),
        (["a", "--config", "r.yaml"], TakesWords(["a"], name="x")),
        (["r.yaml"], TakesWords(["old"], name="x")),
        (["a=b", "name=n"], TakesWords(["a=b"], name="n")),
        (["1", "é 😀", 'q"'], TakesWords(["1", "é 😀", 'q"'])),
        (["--runs", "[a, b]"], TakesWords(["a", "b"])),
    ):
        assert load(TakesWords, argv) == expected
    with pytest.raises(UserError, match="--runs and the word 'b'"):
        load(TakesWords, ["--runs", "[a]", "b"])
