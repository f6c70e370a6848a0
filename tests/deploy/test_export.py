"""An export computes, splits and renders as its model does, in code that is not ours; else it is not there."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from exported import bpe, chat_model
from helpers import random_ids, redraw
from tiny import bpe_tokenizer, llama
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmkit import cli
from llmkit.data.tokenizer import train_char
from llmkit.deploy import gguf_export, gguf_file
from llmkit.evaluate.columns import fingerprint, lineage

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}


def export(model, folder, to="gguf", **options):
    argv = ["export", "--model_name_or_path", str(model), "--to", to, "--output_dir", str(folder)]
    return cli.main([*argv, *(f"--{key}={value}" for key, value in options.items())])


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    """What these tests claim does not hang on what is installed; test_llama_cpp.py asks the engine."""
    monkeypatch.setattr(gguf_export.llama_engine, "is_installed", lambda: False)


def refused(model, tmp_path, capsys, to="gguf", **options):
    """The one line; nothing was written."""
    assert export(model, tmp_path / "out", to, **options) == 2
    found = capsys.readouterr()
    assert found.err.startswith("llmkit: ") and found.err.count("\n") == 1 and "wrote" not in found.out, found
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))
    return found.err


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("to, options", [("qwen3", {}), ("llama", {"qk_norm": False, "tie_word_embeddings": True})])
def test_a_folder_keeps_logits_template_and_ends(to, options, tmp_path, capsys):
    source = chat_model(tmp_path / "m", **options)
    assert export(source, tmp_path / "out", to) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.py")) and "llmkit" not in (tmp_path / "out/config.json").read_text()
    model, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "out"))
    ids = random_ids(2, 40, model.config.vocab_size)
    assert plain.config.model_type == to and torch.equal(logits_of(model, ids), logits_of(plain, ids))
    assert plain.generation_config.eos_token_id == [4, 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == bpe().chat_template


def test_an_export_knows_what_it_was_made_of(tmp_path):
    """And its hash is that of what answers, not of when it was written."""
    chat_model(tmp_path / "run/model")
    told = {"stage": "sft", "documents_open_with_bos": True, "chat_template": "abc", "parent": "x"}
    (tmp_path / "run/manifest.json").write_text(json.dumps(told))
    hashes = set()
    for name in ("a", "b"):
        assert export(tmp_path / "run", tmp_path / name, "qwen3") == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert {key: manifest.get(key) for key in told} == told | {
            "stage": "export", "parent": str(tmp_path / "run/model"),
        }  # fmt: skip
        assert [path.name for path in lineage(tmp_path / name)] == [name, "run"]
        hashes.add(fingerprint(tmp_path / name))
    assert len(hashes) == 1


@pytest.mark.medium
def test_a_folder_loads_in_a_process_that_has_no_llmkit(tmp_path):
    source = chat_model(tmp_path / "m")
    assert export(source, tmp_path / "out", "qwen3") == 0
    ids = [[0, 7, 9, 300, 12]]
    code = (
        "import sys, json; sys.modules['llmkit'] = None\n"
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "import torch; m, t = M.from_pretrained('out'), T.from_pretrained('out')\n"
        f"print(json.dumps(m(torch.tensor({ids})).logits[0, -1].tolist()))"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    expected = AutoModelForCausalLM.from_pretrained(source)(torch.tensor(ids)).logits[0, -1]
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


SHAPES = [
    {},
    {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    {"rope_parameters": YARN},
    {"rope_parameters": LINEAR},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_gguf_in_f32_gives_equal_logits_through_transformers_reader(qk_norm, shape, tmp_path, capsys):
    source = chat_model(tmp_path / "m", qk_norm=qk_norm, **shape)
    assert export(source, tmp_path / "out", outtype="f32") == 0
    out = capsys.readouterr().out
    assert "differ by 0 at most" in out and "the same ids on 25 texts" in out and "8 conversations" in out
    path = tmp_path / "out/m-f32.gguf"
    model = AutoModelForCausalLM.from_pretrained(source)
    again, tokenizer = gguf_file.read(path)
    ids = random_ids(2, 60, model.config.vocab_size, seed=3)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert again.config.model_type == ("qwen3" if qk_norm else "llama")
    assert tokenizer("a")["input_ids"] == bpe()("a")["input_ids"] and tokenizer.bos_token == "<|bos|>"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "smollm"])
def test_other_pre_tokenizers_that_llama_cpp_knows_are_named(pre, tmp_path, capsys):
    source = chat_model(tmp_path / "m", bpe(pre=pre), qk_norm=False)
    assert export(source, tmp_path / "out", outtype="f32") == 0
    assert "the same ids on 25 texts" in capsys.readouterr().out
    assert gguf_file.metadata(tmp_path / "out/m-f32.gguf")["tokenizer.ggml.pre"] == pre


def test_gguf_says_what_llama_cpp_goes_by(tmp_path):
    import gguf

    export(chat_model(tmp_path / "m"), tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out/m-f16.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "qwen3" and said["general.name"] == "m"
    assert said["tokenizer.ggml.model"] == "gpt2" and said["tokenizer.ggml.pre"] == "qwen2"
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.add_bos_token"]) == (0, True)
    assert (said["tokenizer.ggml.eos_token_id"], said["tokenizer.ggml.eot_token_id"]) == (4, 1)
    tokenizer, types = bpe(), said["tokenizer.ggml.token_type"]
    assert types[:6] == [3, 3, 3, 3, 3, 1] and types[len(tokenizer) :] == [5, 5, 5]  # control, normal; unused rows
    assert said["tokenizer.ggml.tokens"][:5] == ["<|bos|>", "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert said["tokenizer.chat_template"] == tokenizer.chat_template
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_stock_llama_becomes_gguf_too(tmp_path):
    redraw(llama(vocab_size=424, hidden_size=64), std=0.2).save_pretrained(tmp_path / "m")
    bpe().save_pretrained(tmp_path / "m")
    assert export(tmp_path / "m", tmp_path / "out", outtype="q8_0") == 0
    assert (tmp_path / "out/Modelfile").read_text().startswith("FROM ./m-q8_0.gguf\n")


def test_q8_0_names_the_matrices_that_it_leaves_in_f16(tmp_path, capsys):
    source = chat_model(tmp_path / "m", hidden_size=64, head_dim=6)  # attention's output takes 4 x 6 numbers
    assert export(source, tmp_path / "out", outtype="q8_0") == 0
    note = next(line for line in capsys.readouterr().out.splitlines() if "f16 stays" in line)
    assert "model.layers.0.self_attn.o_proj.weight, model.layers.1.self_attn.o_proj.weight:" in note
    assert "down_proj" not in note


def test_commands_that_are_printed_can_be_pasted(tmp_path, capsys):
    """A blank in a path, and a name that Ollama does not take."""
    source = chat_model(tmp_path / "mein Modell é (1)")
    assert export(source, tmp_path / "a b") == 0
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    said = {first: rest for first, _, rest in lines}
    assert shlex.split(said["run"])[2:] == [str(tmp_path / "a b/mein Modell é (1)-f16.gguf")]
    assert said["ollama"].startswith(f"'{tmp_path}/a b' && ollama create mein-Modell-1 -f")
    assert export(source, tmp_path / "a c", "qwen3") == 0
    assert capsys.readouterr().out.endswith(f"--model_name_or_path '{tmp_path}/a c'\n")


# ---- faults of ours: each must be seen, and leave nothing behind


def test_rows_in_the_wrong_order_are_refused(tmp_path, monkeypatch, capsys):
    """A Llama whose query and key rows are not interleaved loads everywhere and talks nonsense."""
    source = chat_model(tmp_path / "m", qk_norm=False)
    monkeypatch.setattr(gguf_file, "_interleaved", lambda weight, heads: weight)
    assert "q_proj.weight is " in refused(source, tmp_path, capsys, outtype="q8_0")


@pytest.mark.parametrize("key, factor", [("add_rope_freq_base", 1.1), ("add_layer_norm_rms_eps", 10)])
def test_a_wrong_setting_is_refused_in_8_bit_too(key, factor, tmp_path, monkeypatch, capsys):
    """It moves logits less than 8 bit do (0.03 of their deviation), and passed with them."""
    import gguf

    right = getattr(gguf.GGUFWriter, key)
    monkeypatch.setattr(gguf.GGUFWriter, key, lambda self, value: right(self, value * factor))
    source = chat_model(tmp_path / "m", rms_norm_eps=1e-3)
    assert "logits of " in refused(source, tmp_path, capsys, outtype="q8_0")


@pytest.mark.parametrize(
    "fault, expected",
    [
        ({"pre": "gpt-2"}, " differ on 'tabs and indents': 'def f():\\n\\tif x:\\n\\t\\treturn 1"),
        ({"adds_bos": False}, " goes on after 0 with [0"),
        ({"template": "{{ messages[0]['content'] }}"}, "renders "),
        ({"template": None}, "lacks the chat template"),
    ],
    ids=str,
)
def test_a_tokenizer_written_wrongly_is_refused(fault, expected, tmp_path, monkeypatch, capsys):
    import dataclasses

    right = gguf_export.vocabulary_of
    monkeypatch.setattr(gguf_export, "vocabulary_of", lambda *a: dataclasses.replace(right(*a), **fault))
    assert expected in refused(chat_model(tmp_path / "m"), tmp_path, capsys)


def test_a_folder_that_computes_otherwise_is_refused(tmp_path, monkeypatch, capsys):
    from llmkit.deploy import export as verb

    right = verb.to_plain

    def wrong(model, target):
        plain = right(model, target)
        plain.model.norm.weight.data[0] += 1e-3
        return plain

    monkeypatch.setattr(verb, "to_plain", wrong)
    assert "logits of " in refused(chat_model(tmp_path / "m"), tmp_path, capsys, "qwen3")


# ---- what a target cannot say


def _with(key, value):
    """Our tokenizer with one part of tokenizer.json replaced."""
    tokenizer = bpe()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if key in state["model"]:
        state["model"][key] = value
    else:
        state["added_tokens"][3][key] = value
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)),
        bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>",
    )  # fmt: skip


def _lower():
    tokenizer = bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: train_char(["a text\n"]), "char-level model cannot become GGUF; train with tokenizer_type: bpe"),
        (lambda: bpe_tokenizer(bos=True), 'knows no pre-tokeniser Split({"Regex"'),
        (_lower, "llama.cpp has no normaliser Lowercase"),
        (lambda: _with("ignore_merges", True), "ignore_merges=True goes with no pre-tokeniser qwen2"),
        (lambda: _with("dropout", 0.1), "dropout=0.1"),
        (lambda: _with("lstrip", True), "lstrip of the added token '<|im_start|>'"),
    ],
)
def test_tokenizers_that_gguf_cannot_carry_are_refused_by_name(make, expected, tmp_path, capsys):
    assert expected in refused(chat_model(tmp_path / "m", make()), tmp_path, capsys)


@pytest.mark.parametrize(
    "options, to, expected",
    [
        ({"hidden_act": "relu2"}, "gguf", "hidden_act='relu2'"),
        ({"final_logit_softcapping": 15.0}, "gguf", "final_logit_softcapping=15.0"),
        ({"rope_parameters": YARN | {"rope_type": "dynamic"}}, "gguf", "rope_type='dynamic' is not written"),
        ({"rope_parameters": YARN | {"beta_fast": 16.0}}, "gguf", "beta_fast of rope_parameters"),
        ({"qk_norm": False}, "qwen3", "qk_norm=False has no qwen3 equivalent; use to=llama"),
    ],
    ids=str,
)
def test_options_that_a_target_lacks_are_refused_by_name(options, to, expected, tmp_path, capsys):
    assert expected in refused(chat_model(tmp_path / "m", **options), tmp_path, capsys, to)


def test_nfc_is_told_and_its_texts_are_left_out(tmp_path, capsys):
    """Stock Qwen tokenizers compose accents; llama.cpp does not, and runs them all the same."""
    tokenizer = bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert export(chat_model(tmp_path / "m", tokenizer), tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "llama.cpp has no NFC" in out and "the same ids on 24 texts" in out  # not the decomposed accents


def test_weights_beyond_f16_are_refused_by_name(tmp_path, capsys):
    source = chat_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.embed_tokens.weight.data[9] = 7e4
    model.save_pretrained(source)
    line = refused(source, tmp_path, capsys, outtype="f16")
    assert "model.embed_tokens.weight reaches 7e+04, and f16 ends at 65504; use --outtype f32" in line


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    """numpy tells it without the system's number."""
    import gguf

    def full(self):
        raise OSError("16384 requested and 12584 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    assert "the disk is full" in refused(chat_model(tmp_path / "m"), tmp_path, capsys)


def test_a_place_where_nothing_can_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    """A file where a folder should be; a read-only file system."""
    source = chat_model(tmp_path / "m")
    (tmp_path / "file").touch()
    assert export(source, tmp_path / "file/out") == 2
    assert capsys.readouterr().err == f"llmkit: {tmp_path}/file: File exists; make room or choose another folder\n"

    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system", "out")

    monkeypatch.setattr("llmkit.run.tempfile.mkdtemp", read_only)
    assert "out: Read-only file system; make room or choose another folder" in refused(source, tmp_path, capsys)


def test_the_folder_that_one_is_in_has_a_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(chat_model(tmp_path / "m"))
    assert export(".", "../out") == 0
    assert (tmp_path / "out/m-f16.gguf").is_file()


def test_models_that_are_no_plain_causal_lm_are_refused_in_one_line(tmp_path, capsys):
    from llmkit.model import LlmkitConfig, LlmkitForSequenceClassification

    source = chat_model(tmp_path / "m")
    LlmkitForSequenceClassification(LlmkitConfig(vocab_size=424, hidden_size=32)).save_pretrained(tmp_path / "reward")
    assert "is a LlmkitForSequenceClassification" in refused(tmp_path / "reward", tmp_path, capsys)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_8bit": True}}))
    assert "is stored in quantised form; export the model that it was made of" in refused(source, tmp_path, capsys)


@pytest.mark.parametrize("to", ["qwen3", "gguf"])
def test_an_adapter_is_merged_first_and_one_on_a_quantised_base_is_not(to, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    source = chat_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(source)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    redraw_lora(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted.eval(), random_ids(1, 20))
    base = logits_of(AutoModelForCausalLM.from_pretrained(source), random_ids(1, 20))
    assert export(tmp_path / "adapter", tmp_path / "out", to, **({"outtype": "f32"} if to == "gguf" else {})) == 0
    if to == "gguf":
        found = logits_of(gguf_file.read(tmp_path / "out/adapter-f32.gguf")[0], random_ids(1, 20))
    else:
        found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), random_ids(1, 20))
    assert (found - expected).abs().max() < 1e-4 < (found - base).abs().max()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "adapter/base_quantization.json").write_text('{"load_in_4bit": true}')
    capsys.readouterr()
    assert "--dequantize true --output_dir merged` first" in refused(tmp_path / "adapter", tmp_path, capsys, to)


def redraw_lora(model):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2


# ---- llama.cpp's own converter


def _fake_checkout(folder, script):
    folder.mkdir()
    (folder / gguf_export.CONVERTER).write_text(
        "import shutil, sys\nout = sys.argv[sys.argv.index('--outfile') + 1]\n" + script
    )
    return folder


def test_others_go_through_llama_cpps_converter_and_are_compared_all_the_same(tmp_path, capsys):
    """The file is what our writer makes of the same weights; a converter that takes other weights is found out."""
    redraw(llama(vocab_size=424, hidden_size=64, rope_parameters=YARN | {"beta_fast": 32.0}), std=0.2).save_pretrained(
        tmp_path / "m"
    )
    redraw(llama(vocab_size=424, hidden_size=64, rope_parameters=YARN), std=0.2).save_pretrained(tmp_path / "same")
    redraw(llama(vocab_size=424, hidden_size=64, rope_parameters=YARN), seed=1, std=0.2).save_pretrained(
        tmp_path / "other"
    )
    tokenizer = bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as stock Qwen's
    for name in ("m", "same", "other"):
        tokenizer.save_pretrained(tmp_path / name)
    assert "--llama_cpp_dir CHECKOUT_OF_LLAMA_CPP" in refused(tmp_path / "m", tmp_path, capsys)
    for name in ("same", "other"):
        assert export(tmp_path / name, tmp_path / f"made_{name}") == 0
        _fake_checkout(
            tmp_path / f"cpp_{name}", f"shutil.copy({str(tmp_path / f'made_{name}/{name}-f16.gguf')!r}, out)"
        )
    capsys.readouterr()
    assert export(tmp_path / "m", tmp_path / "good", llama_cpp_dir=tmp_path / "cpp_same") == 0
    out = capsys.readouterr().out
    assert "by llama.cpp's convert_hf_to_gguf.py" in out and "llama.cpp has no NFC" in out
    assert " is " in refused(tmp_path / "m", tmp_path, capsys, llama_cpp_dir=tmp_path / "cpp_other")


def test_a_converter_that_fails_is_heard(tmp_path, capsys):
    llama(hidden_size=64, attention_bias=True).save_pretrained(tmp_path / "m")
    bpe().save_pretrained(tmp_path / "m")
    cpp = _fake_checkout(tmp_path / "cpp", "raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    assert export(tmp_path / "m", tmp_path / "out", llama_cpp_dir=cpp) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith(
        "llmkit: convert_hf_to_gguf.py failed (NotImplementedError: BPE pre-tokenizer was not recognized)"
    )
    assert not (tmp_path / "out").exists()
