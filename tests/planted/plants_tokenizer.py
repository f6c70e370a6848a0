"""Bugs of tokenizers."""

import json
from pathlib import Path

import pytest
from tiny import bpe_tokenizer, chat_rows, llama, text_rows
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmkit.check.attach import from_folder, from_parts
from llmkit.check.subject import Subject
from llmkit.verbs import CheckConfig
from planted.plant import plant


@plant("tokens-added-not-resized", caught_by="ids-beyond-embedding", bug="T8", evidence="<|new0|>")
def tokens_added_not_resized(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Tokens were added and the embedding was not resized."""
    tokenizer = bpe_tokenizer()
    model = llama(vocab_size=len(tokenizer) + (0 if is_planted else 2))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new0|>", "<|new1|>"]})
    return from_parts(model=model, tokenizer=tokenizer)


@plant("padded-vocabulary-cut", caught_by="embedding-rows-lost", bug="T8", evidence="64 rows are gone")
def padded_vocabulary_cut(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """resize_token_embeddings(len(tokenizer)) cut the padding of the parent's vocabulary."""
    llama(vocab_size=448).save_pretrained(folder / "parent")
    return from_parts(model=llama(vocab_size=384 if is_planted else 512), reference=folder / "parent")


@plant("chatml-without-its-tokens", caught_by="special-token-split", bug="T4", evidence="<|im_end|>")
def chatml_without_its_tokens(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A ChatML template on a tokenizer that spells <|im_end|>."""
    tokenizer = bpe_tokenizer(eos_token="</s>")
    if is_planted:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if "im_" not in t["content"]]
        state["model"]["vocab"] = {t.replace("<|im_", "<unused_"): i for t, i in state["model"]["vocab"].items()}
        template = tokenizer.chat_template
        (folder / "t.json").write_text(json.dumps(state))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "t.json"), eos_token="</s>", pad_token="<pad>")
        tokenizer.chat_template = template
    return from_parts(tokenizer=tokenizer, model=llama())


@plant("base-eos-under-chatml", caught_by="stop-token-missing", bug="C9", evidence="<|im_end|>")
def base_eos_under_chatml(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The base model's EOS stays while the template ends turns by <|im_end|>."""
    end = 2 if is_planted else 4
    tokenizer = bpe_tokenizer(eos_token="</s>" if is_planted else "<|im_end|>")
    return from_parts(tokenizer=tokenizer, model=llama(eos_token_id=end))


@plant("stop-missing-in-folder", caught_by="stop-token-missing", bug="C9", evidence="stop ids are [2]")
def stop_missing_in_folder(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """generation_config.json of a saved chat model names the base's EOS only."""
    tokenizer, model = bpe_tokenizer(eos_token="</s>"), llama(eos_token_id=2)
    model.generation_config.eos_token_id = [2] if is_planted else [2, 4]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return from_folder(CheckConfig(model_name_or_path=str(folder)))


@plant("tokenizer-of-gpt2", caught_by="tokenizer-of-another-model", bug="T7", evidence="eos_token_id")
def tokenizer_of_gpt2(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A small tokenizer with its own ids on a large vocabulary."""
    ids = {"bos_token_id": 900, "eos_token_id": 901} if is_planted else {"bos_token_id": 1, "eos_token_id": 4}
    tokenizer = bpe_tokenizer(bos=True)
    return from_parts(tokenizer=tokenizer, model=llama(vocab_size=1000 if is_planted else 330, **ids))


@plant("bos-twice-in-text", caught_by="double-bos", bug="T1", evidence="2 BOS")
def bos_twice_in_text(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows were rendered with BOS, and the tokenizer adds another."""
    tokenizer = bpe_tokenizer(bos=True, chat=False)
    rows = [{"text": "<s>" * is_planted + row["text"]} for row in text_rows()]
    return from_parts(tokenizer=tokenizer, dataset=rows, model=llama())


@plant("bos-twice-by-post-processor", caught_by="double-bos", bug="T1", evidence="plain text")
def bos_twice_by_post_processor(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The post-processor writes BOS twice."""
    tokenizer = bpe_tokenizer(bos=True, chat=False)
    if is_planted:
        twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = twice
    return from_parts(tokenizer=tokenizer, model=llama())


@plant("bos-left-out", caught_by="missing-bos", bug="T2", evidence="do not begin with BOS")
def bos_left_out(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows are encoded without special tokens for a model whose tokenizer adds BOS."""
    from datasets import Dataset
    from tiny import arguments
    from transformers import DataCollatorForLanguageModeling, Trainer

    tokenizer = bpe_tokenizer(bos=True, chat=False)
    ids = [tokenizer(r["text"], add_special_tokens=not is_planted)["input_ids"] for r in text_rows()]
    trainer = Trainer(
        llama(), arguments(), DataCollatorForLanguageModeling(tokenizer, mlm=False),
        Dataset.from_dict({"input_ids": ids}), processing_class=tokenizer,
    )  # fmt: skip
    return from_parts(trainer)


@plant("newlines-eaten", caught_by="text-lost", bug="T5", evidence="newlines")
def newlines_eaten(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The pre-tokeniser drops line breaks."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        drop = pre_tokenizers.Split(Regex(r"\n"), "removed")
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([drop, backend.pre_tokenizer])
    return from_parts(tokenizer=tokenizer, model=llama())


@plant("spaces-cleaned-in-decoder", caught_by="text-lost", bug="T5", evidence="runs of blanks")
def spaces_cleaned_in_decoder(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Runs of blanks are collapsed on the way out."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        backend = tokenizer.backend_tokenizer
        fuse = decoders.Replace(Regex("  +"), " ")
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), fuse])
    return from_parts(tokenizer=tokenizer, model=llama())


@plant("end-of-turn-strips", caught_by="text-lost", bug="T5", evidence="strips both sides")
def end_of_turn_strips(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A control token is declared with lstrip and rstrip."""
    tokenizer = bpe_tokenizer()
    token = AddedToken("<|tool|>", lstrip=is_planted, rstrip=is_planted, special=True, normalized=False)
    tokenizer.add_special_tokens({"extra_special_tokens": [token]})
    return from_parts(tokenizer=tokenizer, model=llama())


@plant("rows-lose-their-tabs", caught_by="text-lost", bug="T5", evidence="row 0, text")
def rows_lose_their_tabs(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Tabs of the user's own code become blanks in a step that is no normaliser."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        backend = tokenizer.backend_tokenizer
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace("\t", " ")])
    return from_parts(tokenizer=tokenizer, model=llama(), dataset=[{"text": "if x:\n\treturn y\n"}])


@plant("backend-lives-in-memory", caught_by="tokenizer-changes-on-reload", bug="C11", evidence="template is gone")
def template_not_saved(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """save_pretrained of a subclass forgets the chat template."""

    class Forgetful(PreTrainedTokenizerFast):
        def save_pretrained(self, folder, **kwargs):
            out = super().save_pretrained(folder, **kwargs)
            (Path(folder) / "chat_template.jinja").unlink()
            return out

    tokenizer = bpe_tokenizer()
    if is_planted:
        tokenizer.__class__ = Forgetful
    return from_parts(tokenizer=tokenizer, model=llama())


@plant("digits-split-otherwise", caught_by="tokenizer-differs-from-reference", bug="T6", evidence="digits")
def digits_split_otherwise(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Another pre-tokeniser expression than the parent's."""
    llama().save_pretrained(folder / "parent")
    bpe_tokenizer().save_pretrained(folder / "parent")
    tokenizer = bpe_tokenizer()
    if is_planted:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Replace(Regex(r"(\d)"), "0")
    return from_parts(model=llama(), tokenizer=tokenizer, reference=folder / "parent", dataset=chat_rows(4))


@plant("newline-normalised-away", caught_by="text-lost", bug="T5", evidence="newlines")
def newline_normalised_away(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A normaliser makes one blank of every run of white space."""
    tokenizer = bpe_tokenizer(chat=False)
    if is_planted:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    return from_parts(tokenizer=tokenizer)


@plant("end-of-turn-matches-words-only", caught_by="special-token-split", bug="T4", evidence="<|eot|>")
def end_of_turn_matches_words_only(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The token is in the vocabulary, and behind a letter it does not match."""
    tokenizer = bpe_tokenizer()
    token = AddedToken("<|eot|>", single_word=is_planted, special=True, normalized=False)
    tokenizer.add_special_tokens({"extra_special_tokens": [token]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    return from_parts(tokenizer=tokenizer)


@plant("eos-outside-vocabulary", caught_by="special-token-split", bug="T4", evidence="not in the vocabulary")
def eos_outside_vocabulary(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """tokenizer.eos_token names a token that nobody added."""
    tokenizer = bpe_tokenizer(chat=False)
    if is_planted:
        tokenizer._special_tokens_map["eos_token"] = "<|endoftext|>"
    return from_parts(tokenizer=tokenizer)


@plant("head-not-resized", caught_by="ids-beyond-embedding", bug="T8", evidence="300 rows")
def head_not_resized(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The embedding was enlarged by hand, the head was not."""
    import torch

    model = llama()
    model.lm_head = torch.nn.Linear(32, 300 if is_planted else 424, bias=False)
    return from_parts(tokenizer=bpe_tokenizer(), model=model)


@plant("sentinel-in-the-rows", caught_by="ids-beyond-embedding", bug="D7", evidence="holds id 65535")
def sentinel_in_the_rows(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A document separator of one's own is no id of the model."""
    rows = [{"input_ids": [5, 6, 7, 65535 if is_planted else 2, 8, 9]}]
    return from_parts(tokenizer=bpe_tokenizer(chat=False), model=llama(eos_token_id=2), dataset=rows)


@plant("ids-in-a-small-type", caught_by="ids-overflow-storage", bug="D7", evidence="uint8")
def ids_in_a_small_type(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows are windows of an array whose type is too small for the vocabulary."""
    import numpy as np
    import torch
    from tiny import arguments
    from transformers import Trainer

    tokenizer = bpe_tokenizer(chat=False)
    ids = np.array([i for row in text_rows() for i in tokenizer(row["text"])["input_ids"]])

    class Windows(torch.utils.data.Dataset):
        def __init__(self):
            self.ids = ids.astype(np.uint8 if is_planted else np.uint16)

        def __len__(self):
            return len(self.ids) // 16

        def __getitem__(self, k):
            window = torch.from_numpy(self.ids[k * 16 : k * 16 + 16].astype(np.int64))
            return {"input_ids": window, "labels": window}

    return from_parts(Trainer(llama(), arguments(), train_dataset=Windows(), processing_class=tokenizer))


@plant("answer-with-its-own-bos", caught_by="double-bos", bug="Q4", evidence="answer begins with another BOS")
def answer_with_its_own_bos(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Prompt and answer are encoded one by one, each with special tokens."""
    from datasets import Dataset
    from tiny import completion_rows, lm_trainer
    from transformers import DataCollatorForSeq2Seq

    tokenizer = bpe_tokenizer(bos=True, chat=False)
    rows = []
    for row in completion_rows(8):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=is_planted)["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    trainer = lm_trainer(tokenizer=tokenizer, collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train_dataset = Dataset.from_list(rows)
    return from_parts(trainer)


@plant("bos-lost-in-conversion", caught_by="missing-bos", bug="T2", evidence="reference")
def bos_lost_in_conversion(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The post-processor that adds BOS did not survive a conversion."""
    for name, has_bos in (("parent", True), ("child", not is_planted)):
        llama().save_pretrained(folder / name)
        bpe_tokenizer(bos=has_bos, chat=False).save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text(json.dumps(text_rows(1)[0]))
    paths = dict(model_name_or_path=str(folder / "child"), reference=str(folder / "parent"))
    return from_folder(CheckConfig(dataset=str(folder / "rows.jsonl"), **paths))


@plant(
    "tokenizer-of-another-folder", caught_by="tokenizer-of-another-model", bug="T7", evidence="model's own tokenizer"
)
def tokenizer_of_another_folder(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """--tokenizer_name names the folder of a sibling with the same special ids."""
    llama().save_pretrained(folder / "model")
    bpe_tokenizer().save_pretrained(folder / "model")
    bpe_tokenizer().save_pretrained(folder / "sibling")
    if is_planted:
        path = folder / "sibling" / "tokenizer.json"
        state = json.loads(path.read_text())
        vocabulary = state["model"]["vocab"]
        size = len(vocabulary)
        state["model"]["vocab"] = {t: i if i < 5 else size + 4 - i for t, i in vocabulary.items()}
        path.write_text(json.dumps(state))
    paths = dict(model_name_or_path=str(folder / "model"), tokenizer_name=str(folder / "sibling"))
    return from_folder(CheckConfig(**paths))


@plant("end-is-a-piece", caught_by="special-token-forged", bug="T9", status="warn", evidence="becomes id 1")
def end_is_a_piece(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A Unigram vocabulary in which </s> has the best score of all pieces."""
    letters = [(c, -4.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz</>"]
    core = Tokenizer(models.Unigram([("<unk>", -100.0), ("</s>", 0.0 if is_planted else -100.0), *letters], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    return from_parts(tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>"))


@plant("wrapped-without-eos", caught_by="eos-undeclared", bug="T10", evidence="no eos_token")
def wrapped_without_eos(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The tokenizer has </s> in its vocabulary, and nobody said that it is EOS."""
    return from_parts(tokenizer=bpe_tokenizer(chat=False, eos_token=None if is_planted else "</s>"))


@plant("eos-by-post-processor", caught_by="eos-behind-prompt", bug="T10", status="warn", evidence="stands behind it")
def eos_by_post_processor(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """An encoder-decoder's post-processor ends every text, prompts included."""
    tokenizer = bpe_tokenizer(chat=False)
    if is_planted:
        ends = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        tokenizer.backend_tokenizer.post_processor = ends
    return from_parts(tokenizer=tokenizer)


@plant("store-of-16-bits", caught_by="ids-overflow-storage", bug="D7", evidence="would be stored as 4464")
def store_of_16_bits(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The token store takes two bytes for an id, the largest of which is 70,000."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "word": 70_000}, unk_token="<unk>"))
    subject = from_parts(tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>"))
    subject.settings["store_dtype"] = "uint16" if is_planted else "uint32"
    return subject
