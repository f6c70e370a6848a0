"""Prompts with expectations: their mistakes, answers that depend on nothing else, judgement, and what was accepted."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from tokenizers import normalizers, processors

from llmkit.config import UserError
from llmkit.evaluate.answers import score_answers
from llmkit.evaluate.prompts import last_number
from llmkit.evaluate.regression import (
    Prompt,
    Reply,
    answer_prompts,
    judge,
    load_prompts,
    outcomes,
    record,
    recorded,
    show,
    word_diff,
)

ANY = {"regex": [""]}
CHAT = [{"role": "user", "content": "Tell me about the red cat."}]


def prompts_file(folder: Path, text: str) -> Path:
    path = folder / "regression.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- the file


def test_the_toy_file_loads_and_asks_every_way():
    prompts = load_prompts(Path(__file__).parent.parent.parent / "recipes/toy/regression.yaml")
    assert {kind for prompt in prompts for kind in prompt.expect} == {
        "exact", "contains", "not_contains", "regex", "numeric",
    }  # fmt: skip
    assert {prompt.messages is None for prompt in prompts} == {prompt.do_sample for prompt in prompts} == {True, False}
    assert any(len(prompt.messages or []) > 3 for prompt in prompts)


def test_what_is_not_given_is_greedy_and_a_list_of_texts_stays_one(tmp_path):
    text = """
- {name: a, prompt: Ada has, expect: {exact: [x, ''], regex: '\\d', numeric: {value: 3, tolerance: 0.5}}}
- name: b
  messages: [{role: system, content: Be brief.}, {role: user, content: Hi}]
  do_sample: true
  temperature: 1
  expect: {contains: é}
"""
    a, b = load_prompts(prompts_file(tmp_path, text))
    assert a == Prompt("a", {"exact": ["x", ""], "regex": [r"\d"], "numeric": (3.0, 0.5)}, prompt="Ada has")
    assert a.question == "Ada has" and a.decoding == {"repetition_penalty": 1.0}
    assert b.question == "Hi" and b.decoding == {
        "repetition_penalty": 1.0, "do_sample": True, "temperature": 1, "top_p": 1.0, "top_k": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("prompt: x, temprature: 1", "unknown key 'temprature'; nearest: 'temperature'"),
        ("prompt: x, zzz: 1", "unknown key 'zzz'; allowed: name, expect, prompt, "),
        ("expect: {exact: x}", "neither prompt nor messages; give one"),
        ("prompt: x, messages: [{role: user, content: x}]", "both prompt and messages; give one"),
        ("prompt: ''", "prompt='' is empty"),
        ("prompt: 3", "prompt=3 is int; allowed: str | null"),
        ("messages: hello", "messages='hello' is str; allowed: list | null"),
        ("messages: []", "messages end with nothing"),
        ("messages: [hi]", "messages[0]='hi'; expected {role: user, content: text}"),
        ("messages: [{role: user, contents: x}]", "unknown key 'messages[0].contents'; nearest: 'content'"),
        ("messages: [{role: user, content: 3}]", "messages[0].content=3; expected a text"),
        ("messages: [{role: user, content: x}, {role: assistant, content: y}]", "messages end with assistant"),
        ("prompt: x, max_new_tokens: 0", "max_new_tokens=0; allowed: 1 or more"),
        ("prompt: x, max_new_tokens: many", "max_new_tokens='many' is str; allowed: int"),
        ("prompt: x, do_sample: true, temperature: 0", "temperature=0; allowed: above 0; `do_sample: false` is greedy"),
        ("prompt: x, do_sample: true, temperature: .nan", "temperature=nan; allowed: above 0"),
        ("prompt: x, do_sample: true, top_p: 1.5", "top_p=1.5; allowed: above 0, at most 1"),
        ("prompt: x, do_sample: true, top_k: -1", "top_k=-1; allowed: 1 or more, or 0"),
        ("prompt: x, do_sample: true, seed: -1", "seed=-1; allowed: 0 or more"),
        ("prompt: x, repetition_penalty: 0", "repetition_penalty=0; allowed: above 0"),
        ("prompt: x, temperature: 0.5", "temperature=0.5 has no effect on greedy decoding; add `do_sample: true`"),
        ("prompt: x, seed: 1", "seed=1 has no effect on greedy decoding"),
        ("prompt: x, expect: {}", "expect={}; expected one or several of exact, contains, "),
        ("prompt: x, expect: red", "expect='red'; expected one or several of"),
        ("prompt: x, expect: {exactly: red}", "unknown key 'expect.exactly'; nearest: 'exact'"),
        ("prompt: x, expect: {exact: yes}", "expect.exact=True is bool; allowed: a text; put it in quotes"),
        ("prompt: x, expect: {contains: [a, 9]}", "expect.contains=9 is int; allowed: a text"),
        ("prompt: x, expect: {contains: ''}", "expect.contains='' is in every answer"),
        ("prompt: x, expect: {not_contains: []}", "expect.not_contains=[] expects nothing"),
        ("prompt: x, expect: {regex: '('}", "expect.regex='(' is no regular expression (missing )"),
        ("prompt: x, expect: {numeric: '3'}", "expect.numeric='3'; allowed: a number, or {value: number, tolerance:"),
        ("prompt: x, expect: {numeric: .inf}", "expect.numeric=inf; allowed: a number"),
        ("prompt: x, expect: {numeric: {value: 3, tolerance: -1}}", "allowed: a number, or {value"),
        ("prompt: x, expect: {numeric: {tolerance: 1}}", "allowed: a number, or {value"),
        ("prompt: x, expect: {numeric: {value: 3, toleranz: 1}}", "unknown key 'expect.numeric.toleranz'; nearest"),
    ],
)
def test_a_mistake_is_one_line_with_file_prompt_and_key(entry, said, tmp_path):
    expect = "" if "expect" in entry else ", expect: {exact: x}"
    path = prompts_file(tmp_path, f"- {{name: first, prompt: x, expect: {{exact: x}}}}\n- {{name: ä, {entry}{expect}}}")
    with pytest.raises(UserError) as error:
        load_prompts(path)
    message = str(error.value)
    assert message.startswith(f"{path}: prompt 'ä': {said}") or ("allowed" in said and said in message)
    assert "\n" not in message


def test_a_prompt_without_expectations_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"prompt 'a': expect=None; expected one or several of exact"):
        load_prompts(prompts_file(tmp_path, "- {name: a, prompt: x}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing; expected a list of prompts"),
        ("[]", "holds nothing; expected a list"),
        ("prompts: []", "holds dict; expected a list"),
        ("- hello", "prompt 1: 'hello'; give it a name"),
        ("- {prompt: x}", "prompt 1: name=None; give it a name"),
        ("- {name: 3, prompt: x}", "prompt 1: name=3; give it a name"),
        ("- {name: a, prompt: x, expect: {exact: x}}\n" * 2, "prompt 'a': the name is given twice"),
        ("- {name: a, name: b}", "key 'name' is given twice (line 1)"),
        ("- {name: a", "is not valid YAML"),
    ],
)
def test_a_file_of_another_shape_is_refused(text, said, tmp_path):
    path = prompts_file(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_prompts(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml: cannot be read \(.*No such file"):
        load_prompts(tmp_path / "no.yaml")


# ---- the answers


def sharp_model(**options):
    """Random, with logits far enough apart that greedy answers have no ties, and near enough that samples differ."""
    model = tiny.llama(**options).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def some_prompts() -> list[Prompt]:
    sampled = dict(do_sample=True, max_new_tokens=8)
    return [
        Prompt("greedy", ANY, prompt="The red cat", max_new_tokens=8),
        Prompt("sampled", ANY, prompt="The red cat", **sampled),
        Prompt("chat", ANY, messages=CHAT, **sampled),
        Prompt("other-seed", ANY, messages=CHAT, seed=1, **sampled),
        Prompt("few", ANY, messages=CHAT, temperature=0.7, top_k=3, top_p=0.9, **sampled),
    ]


def test_an_answer_depends_on_no_other_prompt_and_on_no_earlier_draw():
    model, tokenizer, prompts = sharp_model(attention_dropout=0.5), tiny.bpe_tokenizer(), some_prompts()
    together = answer_prompts(model, tokenizer, prompts)
    torch.manual_seed(99)
    model.train()  # nor on dropout
    assert answer_prompts(model, tokenizer, prompts[::-1]) == together
    assert {p.name: answer_prompts(model, tokenizer, [p])[p.name] for p in prompts} == together
    assert together["chat"] != together["other-seed"] and together["greedy"] != together["sampled"]


def test_asking_leaves_the_model_and_the_random_state_as_they_were():
    model, tokenizer = sharp_model().train(), tiny.bpe_tokenizer()
    model.config.use_cache = False
    state = torch.get_rng_state()
    answer_prompts(model, tokenizer, some_prompts())
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.config.use_cache is False


def naive(model, ids: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Greedy without a cache; the penalty of Keskar et al. 2019 as transformers has it."""
    ids = list(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1]
        for i in set(ids):
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
        ids.append(int(logits.argmax()))
    return ids[-count:]


@pytest.mark.parametrize("penalty", [1.0, 3.0])
@torch.no_grad()
def test_greedy_is_the_likeliest_token_whatever_the_models_own_settings_say(penalty):
    model, tokenizer = sharp_model(seed=7), tiny.bpe_tokenizer(chat=False)  # seed 7 repeats itself
    ids = tokenizer("The red cat")["input_ids"]
    expected = naive(model, ids, 8, penalty)
    assert expected != naive(model, ids, 8, 4.0 - penalty)  # a penalty does something here
    vars(model.generation_config).update(do_sample=True, temperature=9.0, repetition_penalty=2.0, num_beams=2, top_k=2)
    asked = Prompt("a", ANY, prompt="The red cat", max_new_tokens=8, repetition_penalty=penalty)
    reply = answer_prompts(model, tokenizer, [asked])["a"]
    assert reply == Reply(tokenizer.decode(expected, skip_special_tokens=True), "cut after 8 tokens")


def test_a_chat_is_asked_as_the_scores_of_sft_are():
    model, tokenizer = sharp_model(), tiny.bpe_tokenizer()
    row = {"messages": [*CHAT, {"role": "assistant", "content": "x"}]}
    (scored,) = score_answers(model, tokenizer, [row], 1, 8).answers
    reply = answer_prompts(model, tokenizer, [Prompt("a", ANY, messages=CHAT, max_new_tokens=8)])["a"]
    assert reply.text == scored.given


def always(token_id: int):
    """A model whose next token is always this one."""
    model = tiny.llama().eval()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[token_id] = 1e6
    return model


def test_the_template_says_where_an_answer_ends_and_a_plain_text_has_no_turns():
    """Also for a pretrained model that borrowed its child's template: its own end is that of a text."""
    tokenizer = tiny.bpe_tokenizer(eos_token="</s>")
    model = always(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    chat = Prompt("chat", ANY, messages=CHAT, max_new_tokens=3)
    plain = Prompt("plain", ANY, prompt="The", max_new_tokens=3)
    assert answer_prompts(model, tokenizer, [chat, plain]) == {
        "chat": Reply(""),
        "plain": Reply("", "cut after 3 tokens"),  # three special tokens, of which nothing is left
    }


def test_a_prompt_longer_than_the_context_is_marked_and_not_cut():
    tokenizer = tiny.bpe_tokenizer(chat=False)
    num_tokens = len(tokenizer("The red cat sings")["input_ids"])
    word = tokenizer(" dog")["input_ids"][0]
    asked = [Prompt("a", ANY, prompt="The red cat sings", max_new_tokens=9)]
    for limit, expected in (
        (num_tokens, Reply("", f"not asked: {num_tokens} tokens, the context holds {num_tokens}", is_asked=False)),
        (num_tokens + 1, Reply(" dog", f"cut: the context of {num_tokens + 1} is full")),
        (num_tokens + 9, Reply(" dog" * 9, "cut after 9 tokens")),
    ):
        model = always(word)
        model.config.max_position_embeddings = limit
        assert answer_prompts(model, tokenizer, asked) == {"a": expected}


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    tokenizer, closing = tiny.bpe_tokenizer(chat=False), tiny.bpe_tokenizer(chat=False)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", closing.eos_token_id)]
    )
    assert closing("The")["input_ids"][-1] == closing.eos_token_id
    nothing = Prompt("blank", ANY, prompt="\u200b")
    closing.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(UserError, match=r"prompt 'blank': '\\u200b' has no token in this vocabulary"):
        answer_prompts(tiny.llama(), closing, [nothing])
    asked = [Prompt("a", ANY, prompt="The red cat", max_new_tokens=6)]
    model = sharp_model()
    assert answer_prompts(model, closing, asked) == answer_prompts(model, tokenizer, asked)


def test_a_chat_without_template_or_against_it_is_refused_before_anything_is_asked(monkeypatch):
    model, prompts = tiny.llama(), [Prompt("plain", ANY, prompt="x"), Prompt("talk", ANY, messages=CHAT)]
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(UserError, match=r"prompt 'talk' is a chat .* has no chat template; ask a model"):
        answer_prompts(model, tiny.bpe_tokenizer(chat=False), prompts)
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('No users here') }}"
    with pytest.raises(UserError, match=r"prompt 'talk': the chat template refuses it \(No users here\)"):
        answer_prompts(model, tokenizer, prompts)


# ---- the judgement


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so now she has 9.", 9),
        ("1,234.5", 1234.5),
        ("12,345,678 in all", 12345678),
        ("7, 8", 8),
        ("1,2", 2),
        ("1,2345", 2345),
        ("-3", -3),
        ("it is −3", -3),  # U+2212
        ("10-3", 3),
        ("10 - 3", 3),
        ("well-3", 3),
        ("3/4", 0.75),
        ("-3/4", -0.75),
        ("1/0", float("nan")),
        ("on 3/4/2020", 2020),
        (".5", 0.5),
        ("1.5e-3 m", 0.0015),
        ("$5", 5),
        ("50%", 50),
        ("5kg", 5),
        ("two", None),
        ("H2O", None),
        ("version 1.2.3", None),  # not 3, and not 2.3
        ("", None),
        ("٣", 3),
    ],
)
def test_the_last_number(text, expected):
    assert last_number(text) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("expect", "answer", "failed"),
    [
        ({"exact": ["red"]}, " red\n", []),
        ({"exact": ["red"]}, "Red", ["exact: red"]),
        ({"exact": ["red", "it is red"]}, "it is red", []),
        ({"exact": ["red", "it is red"]}, "reddish", ["exact: red | it is red"]),
        ({"exact": [""]}, " ", []),
        ({"contains": ["é", "b"]}, "éa", ["contains: b"]),
        ({"not_contains": ["a", "b"]}, "abc", ["not_contains: a", "not_contains: b"]),
        ({"regex": ["^a.c$", "(?i)B"]}, "abc", []),
        ({"regex": ["^b"]}, "ab", ["regex: ^b"]),
        ({"numeric": (9.0, 0.0)}, "8 and 9", []),
        ({"numeric": (9.0, 0.0)}, "9 and 8", ["numeric: 9 (found 8)"]),
        ({"numeric": (3.0, 0.5)}, "3.5", []),
        ({"numeric": (3.0, 0.5)}, "3.51", ["numeric: 3 ± 0.5 (found 3.51)"]),
        ({"numeric": (0.3, 0.1)}, "2/5", []),
        ({"numeric": (9.0, 0.0)}, "nine", ["numeric: 9 (found none)"]),
        ({"numeric": (0.0, 1.0)}, "1/0", ["numeric: 0 ± 1 (found nan)"]),
        ({"exact": ["a"], "contains": ["a", "b"]}, "b", ["exact: a", "contains: a"]),
    ],
)  # fmt: skip
def test_an_answer_is_judged(expect, answer, failed):
    assert judge(Prompt("a", expect, prompt="x"), answer) == failed


# ---- what was accepted


def test_accepting_replaces_one_column_and_leaves_the_others(tmp_path):
    path = tmp_path / "my.prompts.yaml"
    assert recorded(path, "sft") == {}
    record(path, "base", {"a": Reply("né\ud800")})
    record(path, "sft", {"a": Reply("x"), "gone": Reply("y")})
    file = record(path, "sft", {"a": Reply(" z\n", "cut after 2 tokens"), "long": Reply("", "not asked", False)})
    assert recorded(path, "sft") == {"a": " z\n"} and recorded(path, "base") == {"a": "né\ud800"}
    assert file == tmp_path / "my.prompts.accepted.json" and [*tmp_path.iterdir()] == [file]
    assert "né" in file.read_text(encoding="utf-8")  # for a reader, and for a diff


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"columns": {"a": {"b": 3}}}', '{"columns": {"a": "b"}}', "\xff"])
def test_a_broken_file_of_accepted_answers_is_named_and_not_overwritten(text, tmp_path):
    file = tmp_path / "a.accepted.json"
    file.write_bytes(text.encode("latin-1"))
    for use in (lambda: recorded(tmp_path / "a.yaml", "x"), lambda: record(tmp_path / "a.yaml", "x", {})):
        with pytest.raises(UserError, match=r"a\.accepted\.json: is no file of accepted answers; restore it"):
            use()
    assert file.read_bytes() == text.encode("latin-1")


def test_a_crash_while_accepting_leaves_the_old_answers(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    record(path, "sft", {"a": Reply("old")})
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"a\.accepted\.json: cannot be written \(Permission denied\)"):
        record(path, "sft", {"a": Reply("new")})
    assert recorded(path, "sft") == {"a": "old"} and len([*tmp_path.iterdir()]) == 1


PROMPTS = [
    Prompt("where", {"exact": ["in the west"]}, messages=[*CHAT, {"role": "user", "content": "Where is\nAlda?"}]),
    Prompt("sum", {"numeric": (5.0, 0.0)}, prompt="2 + 3 ="),
    Prompt("long", {"contains": ["x"]}, prompt="y"),
]
NOT_ASKED = Reply("", "not asked: 9 tokens, the context holds 8", is_asked=False)
REPLIES = {
    "sft": {"where": Reply("in the west"), "sum": Reply(" 6", "cut after 2 tokens"), "long": Reply("x")},
    "base": {"where": Reply(""), "sum": Reply(" 5"), "long": NOT_ASKED},
}  # fmt: skip


def accepted(path: Path) -> dict:
    record(path, "sft", {"where": Reply("in the far east"), "sum": Reply(" 6"), "old": Reply("")})
    record(path, "base", {"long": Reply("x")})
    return outcomes(path, PROMPTS, REPLIES)


def test_outcomes_say_what_passed_and_what_changed(tmp_path):
    found = accepted(tmp_path / "r.yaml")
    assert json.loads(json.dumps(found)) == found and found["num_unused"] == 1
    where, total, long = found["prompts"]
    assert (where["name"], where["prompt"], where["expect"]) == ("where", "Where is\nAlda?", "exact: in the west")
    assert where["answers"]["sft"] == {
        "answer": "in the west", "passed": True, "recorded": "in the far east", "changed": True,
        "failed": [], "note": "",
    }  # fmt: skip
    assert where["answers"]["base"]["recorded"] is None and where["answers"]["base"]["changed"] is False
    assert total["answers"]["sft"] == {
        "answer": " 6", "passed": False, "recorded": " 6", "changed": False,
        "failed": ["numeric: 5 (found 6)"], "note": "cut after 2 tokens",
    }  # fmt: skip
    assert total["answers"]["base"]["passed"] is True
    base = long["answers"]["base"]  # no answer is no pass, and is a change from an answer
    assert (base["passed"], base["changed"], base["failed"]) == (False, True, [base["note"]])


def test_a_prompt_that_no_longer_fits_is_a_change_even_from_an_empty_answer(tmp_path):
    record(tmp_path / "r.yaml", "sft", {"long": Reply("")})
    (found,) = outcomes(tmp_path / "r.yaml", PROMPTS[2:], {"sft": {"long": NOT_ASKED}})["prompts"]
    assert found["answers"]["sft"]["recorded"] == "" and found["answers"]["sft"]["changed"]


def shown(found: dict, **options) -> str:
    console = Console(width=60, record=True, file=open("/dev/null", "w"), **options)  # noqa: SIM115
    show(found, console)
    return console.export_text()


def test_a_terminal_without_colour_tells_everything(tmp_path):
    found = accepted(tmp_path / "r.yaml") | {"file": "r.yaml"}
    expected = """\
regression  r.yaml, 3 prompts
         sft          base
  where  ok, changed  FAIL, new
  sum    FAIL         ok, new
  long   ok, new      FAIL, changed

where, sft
  asked     Where is\\nAlda?
  old       in the far east
  new       in the west
  words     in the [-far east-]{+west+}

sum, sft
  asked     2 + 3 =
  note      cut after 2 tokens
  expected  numeric: 5 (found 6)
  answer    ·6

where, base
  asked     Where is\\nAlda?
  expected  exact: in the west
  answer    (nothing)

long, base
  asked     y
  note      not asked: 9 tokens, the context holds 8
  old       x
  new       (nothing)
  words     [-x-]

sft: 2 of 3 as expected, 1 of 2 accepted answers changed
base: 1 of 3 as expected, 1 of 1 accepted answers changed
1 accepted answers belong to no prompt; accepting anew drops them
"""
    assert shown(found) == expected


def test_brackets_and_escape_codes_of_an_answer_are_shown_and_not_obeyed(tmp_path):
    replies = {"sft": {"a": Reply("[bold]x[/bold] \x1b[31m")}}
    found = outcomes(tmp_path / "r.yaml", [Prompt("a", {"exact": ["[b]"]}, prompt="[i]p")], replies)
    text = shown(found)
    assert text.splitlines()[2] == "  a  FAIL, new"
    assert "[bold]x[/bold] \\x1b[31m" in text and "exact: [b]" in text and "[i]p" in text
    assert "none accepted yet (--accept)" in text


def test_columns_stand_below_one_another_also_behind_wide_letters(tmp_path):
    prompts = [Prompt(name, {"exact": ["x"]}, prompt="p") for name in ("東京", "abc\x1b")]
    replies = {"sft": {prompt.name: Reply("x") for prompt in prompts}}
    assert shown(outcomes(tmp_path / "r.yaml", prompts, replies)).splitlines()[1:4] == [
        "           sft",
        "  東京     ok, new",
        "  abc\\x1b  ok, new",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("a b c", "a b c", "a b c"),
        ("a b c", "a x c", "a [-b-]{+x+} c"),
        ("", "a", "{+a+}"),
        ("a b", "a  b", "a[-·-]{+··+}b"),
        ("a\nb", "a b", "a[-\\n-]{+·+}b"),
        ("1 2 3 4 5 6 7 8 9 x", "1 2 3 4 5 6 7 8 9 y", "… 4 5 6 7 8 9 [-x-]{+y+}"),
        ("x 1 2 3 4 5 6 7 8 9", "y 1 2 3 4 5 6 7 8 9", "[-x-]{+y+} 1 2 3 4 5 6 …"),
        (
            "x " + " ".join(map(str, range(20))) + " x", "y " + " ".join(map(str, range(20))) + " y",
            "[-x-]{+y+} 0 1 2 3 4 5 … 14 15 16 17 18 19 [-x-]{+y+}",
        ),
    ],
)  # fmt: skip
def test_words_that_differ(old, new, expected):
    assert word_diff(old, new).plain.strip() == expected
