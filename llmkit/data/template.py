"""The chat template: ours, anyone's, and its hash.

Owns ChatML with generation marks, and which template a run uses.

    note = set_template(tokenizer, "chatml");  template_hash(tokenizer)

A template is part of a model as its vocabulary is: the hash is in the manifest of every stage, and a later stage with
another one is refused. Leaves out whether a template is right: the checks of the family `template` try that.
"""

import hashlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import UserError
from .tokenizer import CHAT

# As Qwen writes it, less its system prompt; a BOS where the model's documents open with one. What an answer is trained
# to say stands between the generation marks: its text and the end of the turn, so that it learns to stop.
CHATML = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
END_OF_TURN = CHAT[1]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the template, None without one."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = repr(sorted(template.items()))
    return hashlib.sha256(template.encode()).hexdigest() if template else None


def read_template(name_or_path: str) -> str:
    """`chatml`, or the text of a .jinja file; raises UserError."""
    if name_or_path == "chatml":
        return CHATML
    try:
        return Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template_path={name_or_path!r}: cannot be read ({getattr(error, 'strerror', error)}); "
            "allowed: chatml, or a .jinja file"
        ) from None
