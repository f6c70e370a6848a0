"""Checks of tokenizers: clean but unusual ones do not fail, and the helpers say what was altered."""

import json
import string

import pytest
from tiny import CHATML, CORPUS, arguments, bpe_tokenizer, chat_rows, completion_rows, llama, lm_trainer, text_rows
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from llmkit.check import runner
from llmkit.check.attach import from_parts
from llmkit.check.torture import TORTURE, alterations, difference, nature
from llmkit.data.tokenizer import train_bpe, train_char


def result(check, **parts):
    return runner.run_one(runner.get_check(check), from_parts(**parts))


def statuses(**parts):
    report = runner.run(from_parts(**parts), runner.Selection(only=("tokenizer",)))
    assert not [c for c in report.checks if "crashed" in c.measured], report.checks
    return {c.id: c for c in report.checks}


def fast(tokenizer, **names):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def char_level():
    vocabulary = {c: i for i, c in enumerate(["<unk>", "<eos>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return fast(tokenizer, unk_token="<unk>", eos_token="<eos>")


def char_level_without_unknown():
    """Characters outside vanish silently."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(string.ascii_lowercase + " \n.<>|_")}, []))
    tokenizer.decoder = decoders.Fuse()
    return fast(tokenizer, eos_token="<|eos|>")


def byte_level(prefix=False, normalizer=None, digits=False):
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    name = "<|endoftext|>"
    return fast(tokenizer, eos_token=name, bos_token=name, unk_token=name)


def metaspace(model="unigram", scheme="always", collapse=False, splits=False):
    """SentencePiece's kinds: Llama's BPE with byte fallback by normalisers, Unigram by Metaspace, or split on white."""
    special = ["<unk>", "<s>", "</s>"]
    if model == "llama":
        bytes_ = [f"<0x{b:02X}>" for b in range(256)]
        words = ["\u2581", *string.ascii_letters, *string.punctuation, "th", "\u2581t", "\u2581th"]
        vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*special, *bytes_, *words]))}
        merges = [("t", "h"), ("\u2581", "t"), ("\u2581t", "h")]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        letters = sorted({c for text in CORPUS for c in text if c not in " \n"} | {"\u2581"})
        pieces = [(t, 0.0) for t in special] + [(c, -4.0) for c in letters]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
        space = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space]) if splits else space
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        steps = [normalizers.Nmt(), normalizers.NFKC()]
        steps += [normalizers.Replace(Regex(" {2,}"), " ")] if collapse else []
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [*CORPUS, *TORTURE.values()]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return fast(tokenizer, eos_token="[SEP]", **names)


def word_level():
    """The tutorial's: no decoder, so that tokens come back joined by blanks."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    )
    return fast(tokenizer, unk_token="[UNK]", eos_token="[EOS]")


def bpe_on_words():
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [*CORPUS, *TORTURE.values()], trainers.BpeTrainer(special_tokens=["[UNK]"], show_progress=False, vocab_size=500)
    )
    return fast(tokenizer, unk_token="[UNK]", eos_token="[UNK]")


def with_added_tokens():
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["<tool>", "hello", AddedToken("<pad2>", rstrip=True)])
    return tokenizer


def with_one_sided_strip():
    """Phi-3 declares its turn tokens with rstrip."""
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    return tokenizer


CLEAN = {
    "char level": char_level,
    "char level without unknown": char_level_without_unknown,
    "byte level": byte_level,
    "byte level, prefix space": lambda: byte_level(prefix=True),
    "byte level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte level, digits": lambda: byte_level(digits=True),
    "byte level, lower-cased": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "byte level, BOS": lambda: bpe_tokenizer(bos=True),
    "byte level, no BOS": bpe_tokenizer,
    "metaspace": metaspace,
    "metaspace, first": lambda: metaspace(scheme="first"),
    "metaspace, never": lambda: metaspace(scheme="never"),
    "metaspace, blanks collapsed": lambda: metaspace(collapse=True),
    "metaspace, split on white space": lambda: metaspace(splits=True),
    "llama": lambda: metaspace("llama"),
    "word piece, lower-cased": word_piece,
    "word level": word_level,
    "BPE on words": bpe_on_words,
    "added tokens": with_added_tokens,
    "one-sided strip": with_one_sided_strip,
    "ours, BPE": lambda: train_bpe(CORPUS, 400),
    "ours, char": lambda: train_char(CORPUS),
}
ROWS = {
    "no rows": None,
    "texts": [{"text": "def f(x):\n    return  x\n\n# Größe 你好\n"}] * 4,
    "chat": chat_rows(4, turns=2),
}


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_tokenizers_do_not_fail(name, rows):
    tokenizer = CLEAN[name]()
    if rows == "chat" and not tokenizer.chat_template:
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    found = statuses(tokenizer=tokenizer, dataset=ROWS[rows])
    assert not [(c.id, c.measured, c.evidence) for c in found.values() if c.status == "fail"]


@pytest.mark.parametrize("name", ["char level", "byte level", "byte level, no BOS", "llama", "ours, BPE", "ours, char"])
def test_common_clean_tokenizers_pass_every_check(name):
    found = statuses(tokenizer=CLEAN[name]())
    assert {c.status for c in found.values()} <= {"pass", "not_applicable"}, found
    assert found["text-lost"].status == found["tokenizer-changes-on-reload"].status == "pass"


def test_kinds_of_tokenizers_are_told_apart():
    kinds = {name: nature(make()).kind for name, make in CLEAN.items()}
    assert kinds["char level"] == kinds["char level without unknown"] == "characters"
    assert kinds["byte level"] == kinds["ours, BPE"] == "bytes"
    assert kinds["llama"] == kinds["metaspace"] == "pieces"
    assert (
        kinds["word piece, lower-cased"] == kinds["word level"] == kinds["metaspace, split on white space"] == "words"
    )


@pytest.mark.parametrize(
    ("text", "back", "what"),
    [
        ("a b", " a b", None),
        ("a b", "a  b", "inserted"),
        ("a  b", "a b", "blanks"),
        ("a\nb", "a b", "white"),
        ("a , b", "a, b", "white"),
        ("a \n", "a", "edge"),
        ("Á b", "a b", "case"),
        ("a1", "a0", "letters"),
    ],
)
def test_differences_are_named(text, back, what):
    assert difference(text, back) == what


def test_characters_outside_the_vocabulary_are_counted_and_no_loss():
    altered, beyond = alterations(char_level(), TORTURE)
    assert not altered
    assert set(beyond) >= {"ideographs", "joined emoji", "accents"}


def test_rows_that_the_vocabulary_cannot_spell_are_a_warning():
    found = result("text-lost", tokenizer=char_level_without_unknown(), dataset=[{"text": "Größe: 5 m"}] * 3)
    assert found.status == "warn"
    assert "ö" in found.evidence[0]["text"]


@pytest.mark.parametrize("make", [word_piece, word_level, bpe_on_words])
def test_tokenizers_that_split_on_white_space_are_judged_and_do_not_fail(make):
    assert result("text-lost", tokenizer=make()).status in ("pass", "warn")


def test_lower_casing_is_noted():
    found = result("text-lost", tokenizer=CLEAN["byte level, lower-cased"]())
    assert found.status == "pass"
    assert "changes case" in found.measured


def test_missing_decoder_of_bytes_fails():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    assert result("text-lost", tokenizer=tokenizer).status == "fail"


@pytest.mark.parametrize("step", [normalizers.Replace("\n", " "), normalizers.Replace(Regex(r"\s+"), " ")])
@pytest.mark.parametrize("make", [byte_level, char_level, lambda: metaspace("llama")], ids=["byte", "char", "llama"])
def test_normaliser_that_eats_line_breaks_fails(make, step):
    tokenizer = make()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([step, *([backend.normalizer] if backend.normalizer else [])])
    assert result("text-lost", tokenizer=tokenizer).status == "fail"


# ids


def test_padded_vocabularies_pass():
    found = statuses(tokenizer=bpe_tokenizer(), model=llama(vocab_size=512))
    assert {found[k].status for k in ("ids-beyond-embedding", "tokenizer-of-another-model")} == {"pass"}


def test_head_that_was_not_resized_fails():
    import torch

    model = llama(vocab_size=424)
    model.lm_head = torch.nn.Linear(32, 300, bias=False)
    assert result("ids-beyond-embedding", tokenizer=bpe_tokenizer(), model=model).status == "fail"


def test_placeholder_of_a_multimodal_sibling_is_a_warning():
    tokenizer = bpe_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    assert result("ids-beyond-embedding", tokenizer=tokenizer, model=llama(vocab_size=size)).status == "warn"


def test_id_of_a_row_beyond_the_embedding_is_shown():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 65535, 7]}]
    found = result("ids-beyond-embedding", tokenizer=bpe_tokenizer(), model=llama(), dataset=rows)
    assert found.status == "fail"
    assert (found.evidence[0]["row"], found.evidence[0]["position"]) == (1, 1)


ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "status"), [(ZEPHYR, "warn"), (LLAMA2, "pass"), (ALPACA, "pass"), (CHATML, "pass")]
)
def test_markers_that_are_words_by_design_do_not_fail(template, status):
    tokenizer = bpe_tokenizer(bos=True, eos_token="<|im_end|>" if template is CHATML else "</s>")
    tokenizer.chat_template = template
    found = statuses(tokenizer=tokenizer, model=llama(eos_token_id=tokenizer.eos_token_id), dataset=chat_rows(4))
    assert found["special-token-split"].status == status
    assert not [(c.id, c.evidence) for c in found.values() if c.status == "fail"]


def test_role_markers_of_which_one_is_spelled_fail():
    tokenizer = bpe_tokenizer(eos_token="</s>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = ZEPHYR
    found = result("special-token-split", tokenizer=tokenizer)
    assert found.status == "fail"
    assert "<|assistant|>" in str(found.evidence)


def test_token_that_only_matches_as_a_word_is_split_in_context():
    tokenizer = bpe_tokenizer(eos_token="</s>")
    token = AddedToken("<|eot|>", single_word=True, special=True, normalized=False)
    tokenizer.add_special_tokens({"extra_special_tokens": [token]})
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|eot|>")
    found = result("special-token-split", tokenizer=tokenizer)
    assert found.status == "fail"


def test_end_of_turn_that_is_not_called_special_is_still_looked_for():
    tokenizer = bpe_tokenizer(eos_token="</s>")
    tokenizer.add_tokens(["<|fin|>"])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|fin|>")
    assert result("stop-token-missing", tokenizer=tokenizer, model=llama(eos_token_id=2)).status == "fail"


def test_tokenizer_alone_cannot_prove_a_missing_stop_token():
    """Gemma's EOS is <eos>; <end_of_turn> is in its generation config only."""
    assert result("stop-token-missing", tokenizer=bpe_tokenizer(eos_token="</s>")).status == "warn"


def test_second_stop_token_in_the_generation_config_passes():
    model = llama(eos_token_id=2)
    model.generation_config.eos_token_id = [2, 4]
    assert result("stop-token-missing", tokenizer=bpe_tokenizer(eos_token="</s>"), model=model).status == "pass"


def test_config_that_kept_the_defaults_is_a_warning():
    """bos 1 and eos 2 are the class's; nobody wrote that the vocabulary is another's."""
    tokenizer = byte_level()
    model = llama(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    assert result("tokenizer-of-another-model", tokenizer=tokenizer, model=model).status == "warn"


def test_tokenizer_of_another_folder_fails(tmp_path):
    from transformers import LlamaForCausalLM

    llama(vocab_size=512).save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    mine = bpe_tokenizer()
    mine.add_tokens(["<more>"])
    for tokenizer, status in ((mine, "pass"), (byte_level(), "fail")):
        assert result("tokenizer-of-another-model", tokenizer=tokenizer, model=model).status == status


@pytest.mark.parametrize(("dtype", "status"), [("uint8", "fail"), ("uint16", "pass")])
def test_type_of_stored_ids_must_hold_the_vocabulary(dtype, status):
    from datasets import Dataset, Features, Sequence, Value

    trainer = lm_trainer()
    ids = [[i % 256 for i in row] for row in trainer.train_dataset["input_ids"]]
    trainer.train_dataset = Dataset.from_dict({"input_ids": ids}, Features({"input_ids": Sequence(Value(dtype))}))
    assert result("ids-overflow-storage", trainer=trainer).status == status


# BOS


def test_bos_of_a_template_under_a_tokenizer_that_adds_it_passes():
    """As in Llama 3 and Gemma: harmless, as long as nobody encodes rendered text with special tokens."""
    tokenizer = bpe_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    found = statuses(tokenizer=tokenizer, dataset=chat_rows(8))
    assert found["double-bos"].status == found["missing-bos"].status == "pass"


def test_rendered_text_that_is_encoded_again_has_two():
    tokenizer = bpe_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    rows = [{"text": tokenizer.apply_chat_template(r["messages"], tokenize=False)} for r in chat_rows(8)]
    assert result("double-bos", tokenizer=tokenizer, dataset=rows).status == "fail"


def test_bos_that_is_eos_may_separate_documents():
    from datasets import Dataset

    tokenizer = byte_level()
    bos = tokenizer.bos_token_id
    rows = [[bos, bos, *tokenizer(r["text"])["input_ids"]] for r in text_rows(8)]
    trainer = lm_trainer(tokenizer=tokenizer, model=llama(eos_token_id=bos, bos_token_id=bos))
    trainer.train_dataset = Dataset.from_dict({"input_ids": rows})
    assert result("double-bos", trainer=trainer).status == "pass"


def test_prompt_and_answer_with_a_bos_each_are_found():
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq

    tokenizer = bpe_tokenizer(bos=True, chat=False)
    rows = []
    for row in completion_rows(8):
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    trainer = lm_trainer(tokenizer=tokenizer, collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train_dataset = Dataset.from_list(rows)
    assert result("double-bos", trainer=trainer).status == "fail"
    assert result("missing-bos", trainer=trainer).status == "pass"


def test_template_without_bos_is_a_warning():
    assert result("missing-bos", tokenizer=bpe_tokenizer(bos=True), dataset=chat_rows(8)).status == "warn"


def test_chunks_of_one_length_begin_anywhere():
    from datasets import Dataset

    tokenizer = bpe_tokenizer(bos=True, chat=False)
    stream = [i for row in text_rows(64) for i in tokenizer(row["text"])["input_ids"]]
    trainer = lm_trainer(tokenizer=tokenizer)
    for ids, status in ((stream, "pass"), ([i for i in stream if i != 1], "warn")):
        chunks = [ids[k : k + 32] for k in range(0, len(ids) - 32, 32)]
        trainer.train_dataset = Dataset.from_dict({"input_ids": chunks})
        assert result("missing-bos", trainer=trainer).status == status


def test_lost_habit_of_bos_is_seen_beside_the_reference(tmp_path):
    bpe_tokenizer(bos=True).save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path)
    found = result("missing-bos", tokenizer=bpe_tokenizer(), model=llama(), reference=tmp_path)
    assert found.status == "fail"


# reload and reference


def test_change_of_the_backend_survives_a_reload():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<x>"])
    tokenizer.chat_template = CHATML
    assert result("tokenizer-changes-on-reload", tokenizer=tokenizer).status == "pass"


def test_padding_side_that_is_set_after_loading_is_a_warning():
    tokenizer = byte_level()
    tokenizer.padding_side = "left"
    assert result("tokenizer-changes-on-reload", tokenizer=tokenizer).status == "warn"


def test_added_tokens_are_no_difference_to_the_reference(tmp_path):
    bpe_tokenizer().save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path)
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["def", "<tool>"])
    assert result("tokenizer-differs-from-reference", tokenizer=tokenizer, reference=tmp_path).status == "pass"


def test_measured_text_never_quotes_the_rows():
    secret = "Geheimnis Größe\n\n  x\n"
    for make in (word_piece, char_level_without_unknown, byte_level):
        tokenizer = make()
        report = runner.run(from_parts(tokenizer=tokenizer, dataset=[{"text": secret}] * 3), runner.Selection(tier=0))
        shown = [(c.measured, c.limit, [e.get("note") for e in c.evidence]) for c in report.checks]
        assert "Geheimnis" not in json.dumps(shown), shown


def test_arguments_of_a_recipe_make_no_difference():
    found = statuses(tokenizer=bpe_tokenizer(), model=llama(), args=arguments(), dataset=chat_rows(4))
    assert not [c for c in found.values() if c.status in ("fail", "warn")]
