"""Instruction tuning of a tiny model on real rows, as a user would write it, with one mistake where one is named.

python tests/check/real_sft.py alpaca_en_demo.json [no-marks | no-eos | short | pad-is-eos]
"""

import json
import sys
import tempfile

from datasets import Dataset
from tiny import CHATML, arguments, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

path, mistake = sys.argv[1], (sys.argv[2:] or [""])[0]
with open(path, encoding="utf-8") as file:
    rows = json.load(file)[:300]
rows = [
    {
        "messages": [
            {"role": "user", "content": f"{r['instruction']}\n\n{r['input']}" if r["input"] else r["instruction"]},
            {"role": "assistant", "content": r["output"]},
        ]
    }
    for r in rows
]

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
bpe.train_from_iterator(
    (m["content"] for row in rows for m in row["messages"]),
    trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>")
tokenizer.chat_template = CHATML
if mistake == "no-marks":
    tokenizer.chat_template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
if mistake == "no-eos":
    tokenizer.chat_template = CHATML.replace(
        "{{ message['content'] }}<|im_end|>{% endgeneration %}", "{{ message['content'] }}{% endgeneration %}"
    )
model = llama(vocab_size=2000, bos_token_id=None, eos_token_id=2, pad_token_id=0, max_position_embeddings=1024)

if mistake == "pad-is-eos":
    tokenizer.pad_token = tokenizer.eos_token
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    trainer = Trainer(
        model=model,
        args=arguments(max_steps=20),
        train_dataset=Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=512))),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
else:
    length = 48 if mistake == "short" else 1024
    trainer = SFTTrainer(
        model=model,
        args=arguments(
            SFTConfig, max_steps=20, max_length=length, assistant_only_loss=True, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
trainer.train()
print("trained", tempfile.gettempdir())
