"""Prompt in, text out, streamed.

Owns the simplest way to hear a model: greedy or sampling.   llmkit generate --model_name_or_path runs/toy/pretrain

The prompt opens with BOS where the model was trained so. Leaves out beams, batches, stop strings and chat.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TextStreamer

from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..config import UserError
from ..data.tokenizer import bos_id, load_tokenizer
from ..hardware import cpu_seconds, detect
from ..run import Result, quiet_libraries, resolve_model_dir
from ..verbs import GenerateConfig


class _Stdout(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


def opens_with_bos(model_dir: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """What the model saw in training: its run's manifest says so; other models follow their own tokenizer."""
    for folder in list(Path(model_dir).absolute().parents)[:3]:  # model/ of the run, or of a checkpoint of it
        manifest = folder / "manifest.json"
        if manifest.exists():
            return json.loads(manifest.read_text()).get("documents_open_with_bos", False)
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def check_config(config: GenerateConfig) -> None:
    if not config.model_name_or_path:
        raise UserError("model_name_or_path is missing; name a run folder, a model folder or a Hub id")
    if config.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={config.max_new_tokens}; allowed: 1 or more")
    if config.temperature < 0:
        raise UserError(f"temperature={config.temperature}; allowed: 0 (greedy) or more")
    if config.top_k is not None and config.top_k < 1:
        raise UserError(f"top_k={config.top_k}; allowed: 1 or more, or null")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise UserError(f"top_p={config.top_p}; allowed: above 0, at most 1, or null")
    if config.temperature == 0 and (config.top_k or config.top_p):
        raise UserError("temperature=0 is greedy and ignores top_k and top_p; remove them or raise the temperature")


@torch.no_grad()
def main(config: GenerateConfig) -> Result:
    """Prints prompt and continuation as they come; says on stderr how many tokens and how fast."""
    check_config(config)
    quiet_libraries()
    started = time.perf_counter()
    path = resolve_model_dir(config.model_name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
    tokenizer = load_tokenizer(path, config.trust_remote_code, "model_name_or_path")
    device = detect(config.use_cpu)
    model.to(device.type).eval()

    ids = tokenizer(config.prompt, add_special_tokens=False)["input_ids"]
    if opens_with_bos(path, tokenizer):
        ids = [bos_id(tokenizer), *ids]
    elif not ids:
        ids = [tokenizer.eos_token_id]
    limit = getattr(model.config, "max_position_embeddings", None)
    room = config.max_new_tokens if limit is None else min(config.max_new_tokens, limit - len(ids))
    if room < 1:
        raise UserError(f"prompt has {len(ids)} tokens, the model's context is {limit}; shorten the prompt")
    inputs = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_k": config.top_k or 0,
            "top_p": config.top_p or 1.0,
        }
    torch.manual_seed(config.seed)
    writing = time.perf_counter()
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=room,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        streamer=_Stdout(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    num_new = out.shape[1] - len(ids)
    seconds = time.perf_counter() - started
    ended = " (end of text)" if out[0, -1].item() == tokenizer.eos_token_id else ""
    full = f" (context of {limit} is full)" if limit and out.shape[1] >= limit and not ended else ""
    rate = num_new / (time.perf_counter() - writing)
    print(f"{num_new} tokens, {rate:.0f} per second{ended}{full}", file=sys.stderr)
    return Result("generate", "ok", path, None, seconds, cpu_seconds(), num_new, {}, {})
