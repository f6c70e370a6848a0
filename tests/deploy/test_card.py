"""The card: only facts, each from the run's files; its metadata as the Hub reads it; licence and parent."""

import json
import re
import shutil

import pytest
import tiny
import yaml
from example_runs import write_family
from helpers import tiny_model
from huggingface_hub import ModelCard

from llmkit.config import UserError
from llmkit.deploy import card, push
from llmkit.deploy.facts import portable
from llmkit.deploy.licence import LICENCES, ancestors, find_licence, find_parent
from llmkit.evaluate.columns import fingerprint
from llmkit.run import Result, write_derived
from llmkit.verbs import PushConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny_model(vocab_size=420).save_pretrained(folder)
    tiny.bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def family(tmp_path, weights):
    """pretrain -> sft -> dpo -> grpo with an evaluation of these very weights of grpo."""
    root = tmp_path / "runs"
    write_family(root)
    for stage in ("pretrain", "sft", "dpo", "grpo"):
        shutil.copytree(weights, root / stage / "model")
    comparison = json.loads((root / "eval/comparison.json").read_text())
    for column in comparison["columns"]:
        column["fingerprint"] = fingerprint(weights) if column["name"] == "grpo" else "0"
    (root / "eval/comparison.json").write_text(json.dumps(comparison))
    return root


def written(root, stage="grpo", **given) -> str:
    out = root.parent / "out"
    how = dict(model_name_or_path=str(root / stage), hub_model_id="ann/toy", license="apache-2.0", output_dir=str(out))
    push.main(PushConfig(**how | given))
    return (out / "README.md").read_text()


def data_of(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", text, flags=re.S)[1])


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def refusal(call, *args, **given) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **given)
    return str(caught.value)


def test_the_hub_reads_the_metadata_back(family):
    text = written(family, language=["en", "de"])
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.language == ["en", "de"] and data.tags == ["llmkit", "grpo", "conversational"]
    comparison = json.loads((family / "eval/comparison.json").read_text())
    asked = [task for task in comparison["tasks"] if "grpo" in task["scores"]]
    found = {result.dataset_name: result for result in data.eval_results}
    assert {task["name"] for task in asked} <= set(found)
    for task in asked:
        score, result = task["scores"]["grpo"], found[task["name"]]
        assert result.metric_value == pytest.approx(score["value"], abs=1e-6)
        assert result.metric_args["stderr"] == score["stderr"] and f"{score['stderr']:.4f}" in result.metric_name
        assert result.verified is None


def test_every_number_of_the_table_is_the_evaluations(family):
    said = section(written(family), "Evaluation")
    comparison = json.loads((family / "eval/comparison.json").read_text())
    for task in comparison["tasks"]:
        score = task["scores"]["grpo"]
        row = next(line for line in said.splitlines() if line.startswith(f"| {task['name']} "))
        assert f"{score['value']:.4f} ± {score['stderr']:.4f}" in row and f" {task['num_items']:,} " in row
        pair = next(pair for pair in task["pairs"] if pair["column"] == "grpo" and pair["against"] == "dpo")
        assert f"{pair['difference']:+.4f}" in row


def test_an_evaluation_of_other_weights_is_not_quoted(family, capsys):
    path = family / "grpo/model/generation_config.json"
    path.write_text(path.read_text() + " ")
    said = section(written(family), "Evaluation")
    assert "± " not in said and "of other weights of 'grpo'" in said
    assert "WARNING   the card quotes no evaluation" in capsys.readouterr().out


def test_groups_were_asked_as_their_tasks_were_and_losses_are_better_low(family):
    """A group of chats was said to be plain text, and every metric but losses to be better high."""
    path = family / "eval/comparison.json"
    comparison = json.loads(path.read_text())
    comparison["tasks"][0] |= {"metric": "word_perplexity", "higher_is_better": False}
    path.write_text(json.dumps(comparison))
    said = section(written(family), "Evaluation")
    assert re.search(r"^\| toyworld \|.*\| its tasks together", said, flags=re.M)
    assert "| word_perplexity ↓ |" in said and "lower where there is a ↓" in said
    assert said.count("↓") == 2 + len(comparison["shards"])


def test_without_a_parent_there_is_no_column_for_it(family):
    path = family / "eval/comparison.json"
    comparison = json.loads(path.read_text())
    for row in comparison["tasks"] + comparison["groups"] + comparison["shards"]:
        row["pairs"] = []
    path.write_text(json.dumps(comparison))
    said = section(written(family), "Evaluation")
    assert "against" not in said and "paired" not in said and "| task | metric | value ± standard error | items" in said


def test_an_error_of_0_is_explained(family):
    path = family / "eval/comparison.json"
    comparison = json.loads(path.read_text())
    assert "An error of 0" not in section(written(family), "Evaluation")
    comparison["tasks"][0]["scores"]["grpo"] |= {"value": 1.0, "stderr": 0.0}
    path.write_text(json.dumps(comparison))
    assert "An error of 0 means that all items came out the same" in section(written(family), "Evaluation")


def test_compute_of_an_adapter_is_not_that_of_all_weights(family):
    recipe = family / "pretrain/recipe.yaml"
    row = lambda: next(x for x in written(family).splitlines() if x.startswith("| pretrain |")).split(" | ")  # noqa: E731
    assert "e+" in row()[4]
    recipe.write_text(recipe.read_text() + "use_peft: true\n")
    assert row()[4] == "unknown"


def test_a_reward_model_scores_and_does_not_answer(family):
    config = family / "grpo/model/config.json"
    architectures = {"architectures": ["LlmkitForSequenceClassification"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | architectures))
    text = written(family)
    assert "It scores the last answer of a chat" in text and "expect scores without meaning" in text
    assert "It answers in a chat" not in text and "conversational" not in data_of(text)["tags"]


def test_what_was_made_of_a_model_keeps_its_lineage_and_trained_on_nothing(family, weights):
    """The card of an export said that no run was known, and asked for its licence."""
    plain = family.parent / "plain"
    shutil.copytree(weights, plain)
    result = Result(
        "export", "ok", str(plain), str(family / "sft/model"), 1.0, 1.0, 0, {}, {"max_logit_difference": 0.0}
    )
    write_derived(plain, result, json.loads((family / "sft/manifest.json").read_text()))
    (family / "sft/published.json").write_text(json.dumps({"ann/sft": {"license": "mit", "finished": True}}))
    push.main(PushConfig(model_name_or_path=str(plain), hub_model_id="ann/p", output_dir=str(plain.parent / "out")))
    text = (plain.parent / "out/README.md").read_text()
    assert data_of(text)["license"] == "mit" and data_of(text)["base_model"] == "ann/sft"
    assert "base_model_relation" not in data_of(text)  # the very weights: no finetune, nor quantised
    (family / "sft/published.json").rename(family / "pretrain/published.json")  # a stage lies between
    push.main(PushConfig(model_name_or_path=str(plain), hub_model_id="ann/p", output_dir=str(plain.parent / "o")))
    assert data_of((plain.parent / "o/README.md").read_text())["base_model_relation"] == "finetune"
    assert "→ sft (sft) → plain (export)." in text and "converted with llmkit from [ann/sft]" in text
    assert "| plain |" not in text and "plain: from" not in text and "not compared with its parent" not in text


def test_how_it_was_made_names_every_stage(family):
    said = section(written(family), "How it was made")
    assert "Lineage: new weights → pretrain (pretrain) → sft (sft) → dpo (dpo) → grpo (grpo)." in said
    assert said.count("<details>") == 4 and "| pretrain | 50,000 | " in said and "seed 0" in said
    assert "6 × parameters" in said and f"{6 * 810_560 * 50_000:.1e}" in said
    assert "llmkit at commit 4b1087a3f067" in said and "transformers 5.23.0" in said


def test_limits_are_facts(family):
    said = section(written(family), "Limits")
    comparison = json.loads((family / "eval/comparison.json").read_text())
    lost = [t["name"] for t in comparison["tasks"] for p in t["pairs"]
            if p["column"] == "grpo" and p["against"] == "dpo" and p["flag"] == "lost" and not t["group"]]  # fmt: skip
    for name in lost:
        assert f"It lost against dpo: {name}" in said
    assert "grpo raised 2 × length-hacking, first at step 310: answers grow" in said
    assert "A check before sft: pad-trained (warn): Padding is trained." in said
    assert "at most 64 tokens" in said and "language of its text" not in said  # toyworld is English


def test_what_is_not_known_is_said_to_be_unknown(tmp_path, weights):
    push.main(
        PushConfig(model_name_or_path=str(weights), hub_model_id="ann/x", license="mit", output_dir=str(tmp_path / "o"))
    )
    text = (tmp_path / "o/README.md").read_text()
    assert "Not known: no run of llmkit belongs to this folder." in text and "model-index" not in text
    assert "The language of its text was not recorded." in text and "No checks before training are on record." in text
    assert "base_model" not in data_of(text) and "datasets" not in data_of(text)


def test_no_path_of_this_machine_gets_into_a_card(family, tmp_path):
    manifest = json.loads((family / "grpo/manifest.json").read_text())
    manifest["command"] = [
        str(tmp_path / "bin/llmkit"),
        "grpo",
        str(tmp_path / "recipes/my.yaml"),
        "--data_dir=/home/ann/d",
    ]
    (family / "grpo/manifest.json").write_text(json.dumps(manifest))
    rows = f"datasets:\n- {{path: json, data_files: {tmp_path}/private/rows.jsonl}}\n- {{path: org/set}}\n"
    (family / "grpo/recipe.yaml").write_text(f"output_dir: {tmp_path}/x\n{rows}")
    text = written(family)
    assert str(tmp_path) not in text and "/home/" not in text
    assert "…/my.yaml" in text and "…/rows.jsonl" in text and "output_dir:" not in text
    assert data_of(text)["datasets"] == ["org/set"]


def test_a_token_in_a_command_is_an_error(family):
    manifest = json.loads((family / "grpo/manifest.json").read_text())
    manifest["command"] += ["--hub_token", "hf_" + "q" * 34]
    (family / "grpo/manifest.json").write_text(json.dumps(manifest))
    line = refusal(written, family)
    assert line.startswith("README.md: line ") and "something like a Hub token" in line and "q" * 34 not in line


def test_paths_are_shortened_and_addresses_are_not():
    assert portable("llmkit sft /a/b/c.yaml --x=/d/e/ https://a.b/c/d and/or runs/toy") == (
        "llmkit sft …/c.yaml --x=…/e https://a.b/c/d and/or runs/toy"
    )


def test_it_is_loaded_in_three_ways(family):
    said = section(written(family), "How to load it")
    assert '--apply_chat_template --prompt "Hello"' in said
    assert 'from_pretrained("ann/toy", trust_remote_code=True)' in said
    assert (
        "llmkit generate --model_name_or_path ann/toy" in said and "llmkit export --model_name_or_path ann/toy" in said
    )


def test_the_ways_of_variants_and_other_kinds(family, tmp_path):
    gguf = tmp_path / "q8"
    gguf.mkdir()
    (gguf / "toy.gguf").write_bytes(b"GGUF")
    text = written(family, variants=[str(gguf)])
    assert "The folder `q8` holds it as GGUF." in text and "llama-cli -m model/q8/toy.gguf" in text
    push.main(
        PushConfig(
            model_name_or_path=str(gguf), hub_model_id="ann/g", license="mit", base_model="ann/toy",
            output_dir=str(tmp_path / "o"),
        )
    )  # fmt: skip
    text = (tmp_path / "o/README.md").read_text()
    assert data_of(text)["base_model_relation"] == "quantized" and "ollama run hf.co/ann/g" in text
    assert "library_name" not in data_of(text)


# validation


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.replace("---\n", "", 1), "has no metadata"),
        (lambda t: t.replace("license: apache-2.0", "license: [", 1), "is no YAML"),
        (lambda t: t.replace("license: apache-2.0", "license: mine", 1), "license='mine'"),
        (lambda t: t.replace("license: apache-2.0\n", "", 1), "license=None"),
        (lambda t: t.replace("---\n", "---\nbase_model: a/b/c\n", 1), "base_model='a/b/c'"),
        (lambda t: t.replace("---\n", "---\nbase_model_relation: finetune\n", 1), "base_model_relation"),
        (lambda t: t.replace("value:", "wert:"), "does not hold together"),
    ],
)
def test_a_card_that_does_not_validate_is_one_line(change, said, family):
    text = written(family)
    card.validate(text)
    line = refusal(card.validate, change(text))
    assert line.startswith("README.md: ") and said in line and "\n" not in line


# licence and parent


def run(folder, parent=None, license=None, hub_id=None, finished=True):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"stage": "sft", "parent": parent and str(parent)}))
    if license and not hub_id:
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    if hub_id:
        record = {hub_id: {"license": license, "finished": finished}}
        (folder / "published.json").write_text(json.dumps(record))
    return folder


def found(folder, given=None, base_model=None, own=None):
    parent = find_parent(*ancestors(folder), base_model)
    return parent, find_licence(given, parent, own)


def test_licence_and_base_model_come_from_the_parent(tmp_path):
    base = run(tmp_path / "base", license="cc-by-4.0", hub_id="ann/base")
    middle = run(tmp_path / "middle", base)
    parent, (licence, whence, warning) = found(run(tmp_path / "sft", middle))
    assert (parent.hub_id, parent.is_direct, licence, whence, warning) == (
        "ann/base", False, "cc-by-4.0", "from base", None,
    )  # fmt: skip
    assert found(run(tmp_path / "direct", base))[0].is_direct


def test_a_downloaded_parent_speaks_by_its_card_and_an_id_of_the_hub_is_the_base(tmp_path):
    downloaded = tmp_path / "qwen"
    downloaded.mkdir()
    (downloaded / "README.md").write_text("---\nlicense: gemma\n---\nhello")
    assert found(run(tmp_path / "a", downloaded))[1][:2] == ("gemma", "from qwen")
    parent, _ = found(run(tmp_path / "b", "qwen/Qwen3-0.6B"), given="apache-2.0")
    assert parent.hub_id == "qwen/Qwen3-0.6B"


def test_a_push_that_was_cut_makes_no_parent(tmp_path):
    base = run(tmp_path / "base", license="mit", hub_id="ann/base", finished=False)
    assert found(run(tmp_path / "sft", base), given="mit")[0].hub_id is None


def test_an_adapter_of_a_run_is_no_parent_of_the_next(tmp_path):
    """The same run was pushed merged, then as an adapter: the next stage began with the merged weights."""
    both = run(tmp_path / "both")
    records = {"ann/merged": {"finished": True, "kind": "model"}, "ann/lora": {"finished": True, "kind": "adapter"}}
    (both / "published.json").write_text(json.dumps(records))
    assert found(run(tmp_path / "dpo", both), given="mit")[0].hub_id == "ann/merged"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_parent_is_looked_for_where_its_run_was_started(is_there, tmp_path, monkeypatch):
    """From another folder, runs/base was taken for a repository of somebody called runs."""
    project = tmp_path / "project"
    base = run(project / "runs/base", license="mit", hub_id="ann/base")
    child = run(project / "runs/sft", "runs/base")
    (child / "recipe.yaml").write_text("output_dir: runs/sft\n")
    run(tmp_path / "elsewhere/runs/base", hub_id="bob/base")
    monkeypatch.chdir(tmp_path / "elsewhere")
    if not is_there:
        shutil.rmtree(base)
        shutil.rmtree(tmp_path / "elsewhere/runs")
    assert found(child, given="mit")[0].hub_id == ("ann/base" if is_there else None)


def test_an_adapter_beside_its_base_names_this_repository(family, tmp_path, weights):
    """It named the parent of the base: loaded, and wrong."""
    import numpy as np
    from safetensors.numpy import save_file

    record = {"ann/before": {"license": "mit", "finished": True}}
    (family / "sft/published.json").write_text(json.dumps(record))
    lora = run(family / "lora", family / "dpo") / "adapter"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(family / "dpo/model")}))
    save_file({"w": np.ones(3)}, lora / "adapter_model.safetensors")
    config = PushConfig(model_name_or_path=str(family / "dpo"), hub_model_id="ann/toy", variants=[str(lora)])
    parent = find_parent(*ancestors(family / "dpo"), None)
    items, _ = push._items(config, family / "dpo/model", "model", parent, print)
    (item,) = [item for item in items if item.path == "lora/adapter_config.json"]
    assert parent.hub_id == "ann/before" and json.loads(item.read())["base_model_name_or_path"] == "ann/toy"
    other = PushConfig(model_name_or_path=str(family / "grpo"), hub_model_id="ann/toy", variants=[str(lora)])
    line = refusal(push._items, other, family / "grpo/model", "model", parent, print)  # dpo itself is not on the Hub
    assert "lora/adapter_config.json" in line and "push that model first" in line


def test_an_unknown_licence_is_refused_and_a_contradiction_is_said(tmp_path):
    base = run(tmp_path / "base")
    assert "neither the run nor its parents state one" in refusal(found, run(tmp_path / "x", base))
    assert "qwen/q states none, or the Hub is not in reach" in refusal(found, run(tmp_path / "q", "qwen/q"))
    assert "allowed: an identifier of the Hub" in refusal(found, base, given="my-own")
    llama = run(tmp_path / "llama", license="llama3.1")
    licence, _, warning = found(run(tmp_path / "y", llama), given="mit")[1]
    assert licence == "mit" and "the parent is under llama3.1" in warning
    assert "its parent states 'strange'" in refusal(found, run(tmp_path / "z", run(tmp_path / "s", license="strange")))
    own = run(tmp_path / "own", license="mit", hub_id="ann/own")
    assert found(own, own=own)[1] == ("mit", "from its earlier card", None)
    assert "a Hub id" in refusal(found, base, base_model="/home/x")


def test_an_adapter_takes_only_the_very_base_that_it_was_trained_on(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    base = run(tmp_path / "base", license="mit", hub_id="ann/base")
    middle = run(tmp_path / "middle", base)
    for parent, is_fine in ((base, True), (middle, False)):
        tuned = run(tmp_path / f"on_{parent.name}", parent)
        folder = tuned / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(parent)}))
        save_file({"w": np.ones(3)}, folder / "adapter_model.safetensors")
        out = tmp_path / "o"
        config = PushConfig(model_name_or_path=str(tuned), hub_model_id="ann/lora", license="mit", output_dir=str(out))
        if not is_fine:
            assert "push that model first, or name its Hub id" in refusal(push.main, config)
            continue
        push.main(config)
        data = data_of((out / "README.md").read_text())
        assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (
            "ann/base",
            "adapter",
            "peft",
        )


def test_a_licence_that_the_hub_does_not_know_has_a_name(family):
    text = written(family, license="other", license_name="toy-licence", license_link="https://example.org/toy")
    assert {k: v for k, v in data_of(text).items() if k.startswith("license")} == {
        "license": "other", "license_name": "toy-licence", "license_link": "https://example.org/toy",
    }  # fmt: skip
    assert section(text, "Licence").startswith("\ntoy-licence (other): <https://example.org/toy>.")
    assert "the Hub asks what it is called: --license_name NAME" in refusal(written, family, license="other")
    assert "license_name='x' has no effect with license=apache-2.0" in refusal(written, family, license_name="x")
    assert "license_name=None; allowed: the name of license=other" in refusal(
        card.validate, text.replace("license_name: toy-licence\n", "")
    )


def test_the_list_of_licences_is_in_the_hubs_spelling():
    assert {"apache-2.0", "mit", "other", "llama3.3", "cc-by-nc-4.0", "gemma"} <= LICENCES
    assert "unknown" not in LICENCES and all(re.fullmatch(r"[a-z0-9.+-]+", licence) for licence in LICENCES)


@pytest.mark.parametrize("code", ["english", "EN", ["en", "x"]])
def test_a_language_is_a_code(code, family):
    assert "codes of ISO 639" in refusal(written, family, language=code)


def test_an_eval_dir_that_holds_none_is_refused(family, tmp_path):
    assert "holds no comparison.json" in refusal(written, family, eval_dir=str(tmp_path))
