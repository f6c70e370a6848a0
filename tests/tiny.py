"""Tiny clean things to check and to plant bugs in: tokenizers, models, data sets and trainers. Offline, milliseconds.

    trainer = sft_trainer(rows=chat_rows(32), assistant_only_loss=True)

Every builder is clean as it is: a check that fails on what it returns is a false alarm.
"""

import functools
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

WORDS = "red blue green cat dog bird house tree river stone runs sleeps sings small large old new one two three".split()
CORPUS = [f"The {a} {b} {c}. {d}, {a}!\n" for a in WORDS for b in WORDS[:5] for c in WORDS[8:12] for d in WORDS[:2]]

CHATML = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def _bpe(bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return tokenizer.to_str()


def bpe_tokenizer(bos: bool = False, chat: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with pad 0, <s> 1, </s> 2, <|im_start|> 3, <|im_end|> 4; chat: ChatML with generation marks."""
    given = dict(pad_token="<pad>", eos_token="<|im_end|>" if chat else "</s>", bos_token="<s>" if bos else None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe(bos)), **given | options)
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: the first space of a decoded text is dropped, unknown characters are bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += dict.fromkeys("▁" + "".join(WORDS) + "T.!,") | dict.fromkeys(f"▁{word}" for word in WORDS)
    core = Tokenizer(models.Unigram([(token, -float(len(token) < 2)) for token in tokens], 0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    given = dict(
        vocab_size=424,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=4,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**given | options))


def chat_rows(count: int = 32, turns: int = 1) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        a, b, c = (WORDS[(i * k + k) % len(WORDS)] for k in (1, 3, 7))
        messages = []
        for turn in range(turns):
            messages += [
                {"role": "user", "content": f"Tell me about the {a} {b}" + f" and the {c}" * ((i + turn) % 3) + "."},
                {"role": "assistant", "content": f"The {b} is {a}" + f", the {c} sings" * ((i + turn) % 4) + "!"},
            ]
        rows.append({"messages": messages})
    return rows


def completion_rows(count: int = 32) -> list[dict[str, Any]]:
    """Prompt and completion as text; the prompt ends at a token boundary."""
    chats = chat_rows(count)
    return [
        {"prompt": f"Q: {m[0]['content']}\nA:", "completion": f" {m[1]['content']}"}
        for m in (r["messages"] for r in chats)
    ]


def text_rows(count: int = 32) -> list[dict[str, Any]]:
    return [{"text": "".join(CORPUS[i * 7 % len(CORPUS)] for i in range(i, i + 1 + i % 4))} for i in range(count)]


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """Goes with the process."""
    return tempfile.TemporaryDirectory(prefix="llmkit-tests-")


def arguments(cls: type = TrainingArguments, **options: Any) -> Any:
    given = dict(
        output_dir=tempfile.mkdtemp(dir=_scratch().name),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_strategy="no",
        save_strategy="no",
    )
    return cls(**given | options)


def sft_trainer(
    rows: list | None = None,
    tokenizer: Any = None,
    model: Any = None,
    cls: type | None = None,
    eval_rows: list | None = None,
    peft_config: Any = None,
    **options: Any,
) -> Any:
    """TRL's SFTTrainer (or a subclass) on chat rows; options go to SFTConfig."""
    from trl import SFTConfig, SFTTrainer

    given = dict(max_length=128, gradient_checkpointing=False) | options
    return (cls or SFTTrainer)(
        model=model or llama(),
        args=arguments(SFTConfig, **given),
        train_dataset=Dataset.from_list(rows or chat_rows()),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer or bpe_tokenizer(),
        peft_config=peft_config,
    )


def lm_trainer(
    rows: list | None = None,
    tokenizer: Any = None,
    model: Any = None,
    collator: Any = None,
    cls: type = Trainer,
    eval_rows: list | None = None,
    **options: Any,
) -> Trainer:
    """A plain Trainer on texts, EOS after each; padding is masked by its own collator unless one is given."""
    from transformers import DataCollatorForLanguageModeling

    tokenizer = tokenizer or bpe_tokenizer(chat=False)

    def encode(rows: list) -> Dataset:
        texts = [row["text"] for row in rows]
        return Dataset.from_dict({"input_ids": [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]})

    return cls(
        model=model or llama(eos_token_id=2),
        args=arguments(**options),
        train_dataset=encode(rows or text_rows()),
        eval_dataset=encode(eval_rows) if eval_rows else None,
        data_collator=collator or DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
