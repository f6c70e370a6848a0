"""`llmkit generate`: prompts from the command line and from files, what people see, and what is refused."""

import ast
import json
import math
import re

import pytest
from helpers import tiny_model
from tiny import bpe_tokenizer, llama, sentencepiece_tokenizer

from llmkit import cli
from llmkit.deploy import generate
from llmkit.model.modeling_llmkit import LlmkitForSequenceClassification


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders: ours with and without a template, somebody's Llama."""
    root = tmp_path_factory.mktemp("models")
    for name, model, chat in [
        ("ours", tiny_model(vocab_size=424, eos_token_id=4), False),
        ("chat", tiny_model(vocab_size=424, eos_token_id=4), True),
        ("llama", llama(max_position_embeddings=64), True),
    ]:
        model.save_pretrained(root / name)
        bpe_tokenizer(chat=chat).save_pretrained(root / name)
    return root


@pytest.fixture
def run(folders, tmp_path, monkeypatch, capsys):
    """(exit code, stdout, stderr) of the verb in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *flags: str) -> tuple[int, str, str]:
        code = cli.main(["generate", "--model_name_or_path", str(folders / name), *flags])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_a_prompt_is_shown_with_its_continuation_and_why_it_ended(run, name):
    code, out, err = run(name, "--prompt", "The red", "--temperature", "0", "--max_new_tokens", "5")
    assert code == 0 and out.startswith("The red") and out.endswith("\n")
    assert "5 tokens" in err and err.strip().endswith("max_new_tokens=5 reached")


def test_both_decoders_write_the_same_text(run):
    for flags in (["--temperature", "0"], ["--seed", "5", "--top_p", "0.9", "--repetition_penalty", "1.3"]):
        outs = [run("ours", "--prompt", "old", *flags, "--decoder", way)[1] for way in ("lean", "transformers", "auto")]
        assert outs[0] == outs[1] == outs[2] and len(outs[0]) > len("old\n")


def test_the_end_of_the_context_is_said(run):
    code, _, err = run("ours", "--temperature", "0", "--max_new_tokens", "1000")
    assert code == 0 and "63 tokens" in err and "the context of 64 is full: the text stops here" in err


def test_a_stop_string_is_said_and_kept(run):
    free = run("ours", "--prompt", "The red", "--temperature", "0", "--max_new_tokens", "20")[1]
    stop = free[12:14]
    code, out, err = run("ours", "--prompt", "The red", "--temperature", "0", "--stop_strings", json.dumps([stop]))
    assert code == 0 and stop in out[len("The red") :] and free.startswith(out.rstrip("\n")) and "stop string" in err


def test_a_chat_is_asked_in_the_template(run, monkeypatch):
    asked = []
    real = generate.write

    def spy(decoder, tokenizer, ids, *rest):
        asked.append(tokenizer.decode(ids))
        return real(decoder, tokenizer, ids, *rest)

    monkeypatch.setattr(generate, "write", spy)
    flags = ["--temperature", "0", "--max_new_tokens", "4"]
    code, out, err = run("chat", "--prompt", "Hi", "--apply_chat_template", "--system_instruction", "Be kind", *flags)
    assert code == 0 and "Hi" not in out and "a model for chats" not in err
    system, user = "<|im_start|>system\nBe kind<|im_end|>\n", "<|im_start|>user\nHi<|im_end|>\n"
    assert asked == [f"{system}{user}<|im_start|>assistant\n"]
    assert "(a model for chats: --apply_chat_template asks it as one)" in run("chat", "--prompt", "Hi", *flags)[2]


def test_probabilities_are_a_table_where_there_is_no_colour(run):
    argv = ["--prompt", "The", "--temperature", "0", "--max_new_tokens", "6", "--show_probs"]
    code, out, _ = run("ours", *argv)
    head, *rows = out.rstrip("\n").split("\n")
    assert code == 0 and head == "The" and len(rows) == 6
    table = [row.split("  ", 1) for row in rows]
    assert all(0 < float(prob) <= 1 for prob, _ in table)
    text = run("ours", *argv[:-1])[1]
    assert "The" + "".join(ast.literal_eval(token) for _, token in table) == text.rstrip("\n")
    assert run("ours", *argv, "--decoder", "transformers")[1] == out


def test_a_terminal_gets_colours_and_a_legend(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, err = run("ours", "--prompt", "The", "--temperature", "0", "--max_new_tokens", "3", "--show_probs")
    assert "\x1b[3" in out and "probability of each token: green from 0.9" in err


@pytest.mark.parametrize("setting", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_gets_the_table(run, monkeypatch, setting):
    """It was shown bare text, and a legend of colours that were not there."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv(*setting)
    _, out, err = run("ours", "--prompt", "The", "--temperature", "0", "--max_new_tokens", "3", "--show_probs")
    assert len(out.splitlines()) == 4 and "\x1b" not in out and "green" not in err


TEXT = " red cat é 日本語 😀😀\tone\n  two"


@pytest.mark.parametrize("make", [bpe_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("is_coloured", [False, True])
def test_what_is_streamed_is_the_text_in_whole_characters(make, is_coloured, capsys, monkeypatch):
    """SentencePiece drops the space of what it decodes alone, and rich made spaces of tabs."""
    monkeypatch.setenv("FORCE_COLOR", "1" * is_coloured)
    tokenizer = make()
    prompt, ids = (tokenizer(text)["input_ids"] for text in ("old one", f"old one{TEXT}"))
    assert ids[: len(prompt)] == prompt
    screen, pieces = generate._Screen(tokenizer, is_coloured, prompt), []
    for token in [*ids[len(prompt) :], tokenizer.eos_token_id]:
        screen.tell(token, -0.1)
        pieces.append(re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out))
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == " red" and sum(map(bool, pieces)) > 12  # as they come
    screen.end()
    assert capsys.readouterr().out == "\n"


def test_half_a_character_is_shown_at_the_end_and_does_not_hold_the_rest_up(capsys):
    tokenizer = bpe_tokenizer()
    screen, half = generate._Screen(tokenizer, False, []), tokenizer("😀")["input_ids"][0]
    for _ in range(generate.PATIENCE + 1):
        screen.tell(half, None)
    assert set(capsys.readouterr().out) == {"\ufffd"}
    for token in [*tokenizer("old")["input_ids"], half]:
        screen.tell(token, None)
    screen.end()
    assert capsys.readouterr().out == "old\ufffd\n"


def test_a_character_of_several_tokens_has_the_product_of_their_probabilities(capsys, monkeypatch):
    """It had the colour of its last byte, which is nearly certain once the others are there."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    tokenizer = bpe_tokenizer()
    screen = generate._Screen(tokenizer, True, [])
    for token, prob in zip(tokenizer("é")["input_ids"], (0.6, 0.7), strict=True):
        screen.tell(token, math.log(prob))
    assert capsys.readouterr().out == "\x1b[33mé\x1b[0m"  # yellow: 0.42


@pytest.mark.parametrize("name", ["chat", "llama"])
def test_a_file_of_prompts_becomes_a_file_of_continuations(run, tmp_path, name):
    rows = [{"prompt": "The red cat"}, {"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "old " * 40}]
    (tmp_path / "in.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    flags = ["--temperature", "0", "--max_new_tokens", "30", "--show_probs"]
    code, out, err = run(name, "--prompts_file", "in.jsonl", "--output_file", "out.jsonl", *flags)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 0 and out == "" and "3 prompts" in err
    assert [row["prompt"] for row in found] == ["The red cat", "Hi", "old " * 40]
    count = len(bpe_tokenizer()("old " * 40)["input_ids"])
    assert found[2]["ended"] == "context" and found[2]["num_tokens"] == 64 - count < 30
    for row in found:
        assert len(row["tokens"]) == row["num_tokens"] > 0
    alone = run(name, "--prompt", "The red cat", *flags[:-1])[1]
    assert alone == f"The red cat{found[0]['text']}\n"


def test_lines_of_text_are_prompts_and_go_to_the_console(run, tmp_path):
    (tmp_path / "in.txt").write_text("The red\n\nold\n")
    code, out, err = run("llama", "--prompts_file", "in.txt", "--temperature", "0", "--max_new_tokens", "3")
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["The red", "old"]
    assert "2 prompts, 6 tokens" in err and "ended: 2 max_new_tokens" in err


def test_files_of_other_systems_are_read_as_they_are_meant(run, tmp_path):
    """The mark that Windows opens a file with became part of the first prompt."""
    (tmp_path / "in.txt").write_bytes("\ufeffThe red\r\n\r\na\u2028b\r\n".encode())
    (tmp_path / "in.JSONL").write_bytes(b'\xef\xbb\xbf{"prompt": "The red"}\r\n{"prompt": "a\xe2\x80\xa8b"}\r\n')
    for name in ("in.txt", "in.JSONL"):
        out = run("ours", "--prompts_file", name, "--temperature", "0", "--max_new_tokens", "3")[1]
        assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == ["The red", "a\u2028b"]


def test_a_continuation_keeps_its_first_space():
    tokenizer = sentencepiece_tokenizer()
    prompt, ids = (tokenizer(text)["input_ids"] for text in ("old one", "old one red cat"))
    written = generate.Continuation(ids[len(prompt) :], None, "context")
    assert generate._row(tokenizer, generate.Prompt("old one", prompt), written)["text"] == " red cat"


def test_a_penalty_counts_no_padding(run, tmp_path):
    """Padding of a batch would be penalised as if it had been said."""
    (tmp_path / "in.txt").write_text("The red cat runs\nold\n")
    flags = ["--temperature", "0", "--max_new_tokens", "12", "--repetition_penalty", "2"]
    rows = [json.loads(line) for line in run("llama", "--prompts_file", "in.txt", *flags)[1].splitlines()]
    for row in rows:
        assert run("llama", "--prompt", row["prompt"], *flags)[1] == f"{row['prompt']}{row['text']}\n"


def test_a_foreign_prompt_opens_as_its_tokenizer_opens_texts(folders):
    assert not generate.opens_with_bos(str(folders / "llama"), bpe_tokenizer())
    assert generate.opens_with_bos(str(folders / "llama"), bpe_tokenizer(bos=True))


def test_a_prompt_opens_as_the_model_was_trained():
    tokenizer, config = bpe_tokenizer(bos=True), generate.GenerateConfig("m")
    ids = tokenizer("The red", add_special_tokens=False)["input_ids"]
    assert generate._encode(config, tokenizer, True, "The red").ids == [1, *ids]
    assert generate._encode(config, tokenizer, False, "The red").ids == ids
    assert generate._encode(config, tokenizer, False, "").ids == [1]  # something has to be there


def test_a_prompt_that_fills_the_context_to_the_last_token_is_too_long(run):
    flags = ["--temperature", "0", "--max_new_tokens", "4"]
    text = "red" + " old" * 60
    while len(bpe_tokenizer()(text)["input_ids"]) < 64:
        text += " old"
    assert len(bpe_tokenizer()(text)["input_ids"]) == 64
    code, _, err = run("ours", "--prompt", text, *flags)
    assert code == 2 and "prompt has 64 tokens, the model's context is 64" in err
    code, _, err = run("ours", "--prompt", text.removesuffix(" old"), *flags)
    assert code == 0 and "1 tokens" in err and "a model for chats" not in err


REFUSED = [
    (["--num_beams", "2"], "num_beams=2 does not go with temperature=1: set it to 0"),
    (["--num_beams", "2", "--temperature", "0", "--decoder", "lean"], "num_beams=2 does not go with decoder=lean"),
    (["--num_beams", "2", "--temperature", "0", "--show_probs"], "num_beams=2 does not go with show_probs"),
    (["--min_p", "1.5"], "min_p=1.5; allowed: 0 to 1"),
    (["--temperature", "0", "--min_p", "0.1"], "temperature=0 is greedy and ignores min_p"),
    (["--repetition_penalty", "0"], "repetition_penalty=0.0; allowed: above 0"),
    (["--stop_strings", "['']"], "stop_strings=['']; allowed: a list of texts that are not empty"),
    (["--batch_size", "0"], "batch_size=0; allowed: 1 or more"),
    (["--output_file", "out.jsonl"], "output_file='out.jsonl' has no effect without prompts_file"),
    (["--prompt", "x", "--prompts_file", "in.txt"], "prompt='x' has no effect with prompts_file"),
    (["--system_instruction", "x"], "system_instruction='x' has no effect without apply_chat_template"),
    (["--prompts_file", "in.txt", "--output_file", "in.txt"], "output_file='in.txt': exists already"),
    (["--prompts_file", "in.txt", "--output_file", "no/out.jsonl"], "'no/out.jsonl': its folder does not exist"),
    (["--prompts_file", "in.json"], "prompts_file='in.json': its name ends in .json; allowed: .txt, .jsonl"),
    (["--temperature", "1e-42"], "allowed: 0 (greedy), or 0.000001 or more"),
    (["--seed", str(2**64)], "seed=18446744073709551616; allowed: 0 to 2^63 - 1"),
    (["--prompts_file", "gone.txt"], "prompts_file='gone.txt': cannot be read"),
    (["--prompts_file", "empty.txt"], "prompts_file='empty.txt': holds no prompt"),
    (["--prompts_file", "bad.jsonl"], "bad.jsonl line 2: '{\"text\": 3}'; a line is {prompt: text}"),
    (["--prompts_file", "long.txt"], "long.txt line 1: prompt has"),
    (["--prompt", "old " * 80], "the model's context is 64; shorten the prompt"),
    (["--apply_chat_template", "--prompt", "x"], "the tokenizer has no chat template; ask in plain text"),
    (["--apply_chat_template"], "the prompt is empty; with apply_chat_template it is what a user says"),
]


@pytest.mark.parametrize("flags, expected", REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(run, tmp_path, flags, expected):
    (tmp_path / "in.txt").write_text("The red\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "long.txt").write_text("old " * 80 + "\nshort\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": 3}\n')
    code, out, err = run("ours", *flags)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert err.startswith("llmkit: ") and expected in err


def test_the_lean_decoder_is_refused_for_others_with_the_reason(run):
    code, _, err = run("llama", "--decoder", "lean")
    assert code == 2 and "decoder=lean: cannot decode this model, it is a LlamaForCausalLM, not our own" in err


def test_a_reward_model_writes_nothing(run, folders):
    """transformers draws the head that is not there, and the model wrote nonsense with exit code 0."""
    config = tiny_model(vocab_size=424).config
    LlmkitForSequenceClassification(config).save_pretrained(folders / "reward")
    bpe_tokenizer().save_pretrained(folders / "reward")
    code, out, err = run("reward", "--prompt", "The")
    assert code == 2 and out == ""
    assert "holds no weights for lm_head.weight; allowed: models that continue text" in err


def test_a_folder_without_a_model_is_refused(run, folders):
    (folders / "nothing").mkdir(exist_ok=True)
    code, _, err = run("nothing")
    assert code == 2 and "holds no config.json, model/ or adapter/; name a run folder" in err
