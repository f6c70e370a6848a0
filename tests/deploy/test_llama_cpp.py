"""In the real llama.cpp: 20 prompts, greedy, 64 tokens, the same text as ours. Needs the package llama-cpp-python."""

import pytest
import torch
from exported import TEXTS, bpe, chat_model
from transformers import AutoModelForCausalLM

from llmkit import cli
from llmkit.deploy import gguf_file, llama_engine
from llmkit.deploy.gguf_tokenizer import ends_of_generation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not llama_engine.is_installed(), reason="the package llama_cpp (llama-cpp-python) is not there"),
]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
SHAPES = [
    {},
    {"qk_norm": False},
    {"qk_norm": False, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    {"rope_parameters": LINEAR},
    {"qk_norm": False, "rope_parameters": YARN},
    {"rope_parameters": YARN},
]


def greedy(model, ids, count, ends):
    """By hand, no cache; up to and without the end."""
    new = []
    while len(new) < count:
        with torch.no_grad():
            best = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if best in ends:
            break
        new.append(best)
    return new


def greedy_in_llama_cpp(engine, ids, count):
    """Up to and without the token that llama.cpp ends at."""
    llama, new = engine.model, []
    llama.reset()
    llama.eval(ids)
    while len(new) < count:
        best = int(llama.scores[llama.n_tokens - 1].argmax())
        if engine.ends(best):
            break
        new.append(best)
        if len(new) < count:
            llama.eval([best])
    return new


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "smollm"])
def test_ids_are_the_same_behind_every_pre_tokenizer_that_we_name(pre, tmp_path):
    tokenizer = bpe(pre=pre)
    source = chat_model(tmp_path / "m", tokenizer, qk_norm=False)
    argv = ["export", "--model_name_or_path", str(source), "--to", "gguf", "--output_dir", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    with llama_engine.opened(tmp_path / "out/m-f16.gguf", 128) as engine:
        for text in [*TEXTS[:50], "In 2026, 12345 cats; x=3.14\n\n\n  y\t'LL it's", "naïve – ½ ²³ ٣٤٥ 你好"]:
            assert engine.encode(text, True) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_20_prompts_give_the_same_text_in_f32(shape, tmp_path, capsys):
    source, tokenizer = chat_model(tmp_path / "m", **shape), bpe()
    argv = ["export", "--model_name_or_path", str(source), "--to", "gguf", "--outtype", "f32"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0  # ids and logits were compared there already
    assert "logits    in llama.cpp differ by" in capsys.readouterr().out
    path = tmp_path / "out/m-f32.gguf"
    model = AutoModelForCausalLM.from_pretrained(source)
    again, _ = gguf_file.read(path)
    ends = set(ends_of_generation(model, tokenizer))
    prompts = [tokenizer(TEXTS[k * 17][: 5 + 2 * k])["input_ids"] for k in range(10)]
    prompts += [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": TEXTS[k * 19][: 4 + k]}], add_generation_prompt=True
        )["input_ids"]
        for k in range(10)
    ]
    ours = [greedy(model, ids, 64, ends) for ids in prompts]
    assert sum(map(len, ours)) > 400  # they do go on
    with llama_engine.opened(path, 128) as engine:
        assert {i for i in range(len(tokenizer)) if engine.ends(i)} == ends
        assert [greedy_in_llama_cpp(engine, ids, 64) for ids in prompts] == ours
    assert [greedy(again, ids, 64, ends) for ids in prompts] == ours


def test_a_chat_is_rendered_from_the_file_and_opens_with_one_bos(tmp_path):
    """By messages, as people ask it: template and BOS are llama.cpp's business then."""
    source, tokenizer = chat_model(tmp_path / "m"), bpe()
    argv = ["export", "--model_name_or_path", str(source), "--to", "gguf", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, "--outtype", "f32"]) == 0
    model = AutoModelForCausalLM.from_pretrained(source)
    chat = [("system", "be brief"), ("user", "Where is the cat?"), ("assistant", "In the house"), ("user", "Is it?")]
    with llama_engine.opened(tmp_path / "out/m-f32.gguf", 128) as engine:
        for turns in (chat[1:2], chat[:2], chat[1:], chat):
            messages = [{"role": role, "content": content} for role, content in turns]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            found = engine.model.create_chat_completion(messages, temperature=0, max_tokens=8)
            assert found["usage"]["prompt_tokens"] == len(ids)
            new = greedy(model, ids, 8, set(ends_of_generation(model, tokenizer)))
            whole = b"".join(engine.model.detokenize([i]) for i in new)
            assert found["choices"][0]["message"]["content"] == whole.decode(errors="ignore")
