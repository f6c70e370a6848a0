"""From next-token logits to a continuation: greedy or sampled, with probabilities, until something ends it.

Owns the settings of generation, what a text ends at, and one continuation, by `LeanDecoder` or by transformers.

    written = write(LeanDecoder(model), tokenizer, ids, settings, tell=print)

Filters are transformers' own, in the order in which `generate` applies them, and random numbers are drawn as there, so
that both ways write the same tokens. Leaves out where prompts come from and what is shown (`generate.py`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    BaseStreamer,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .decode import LeanDecoder

Tell = Callable[[int, float | None], object]  # a new token and its log-probability, where it is known by then


@dataclasses.dataclass(frozen=True)
class Settings:
    """As in GenerationConfig; temperature 0 is greedy. `eos` are the ids that end a text."""

    eos: tuple[int, ...]
    pad: int
    max_new_tokens: int
    context: int | None = None  # most positions that the model takes
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    stop_strings: tuple[str, ...] = ()
    wants_probs: bool = False

    def room(self, num_ids: int) -> int:
        """Tokens that may follow so many."""
        return self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - num_ids)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """`ids` without the prompt; `logprobs` in nats, before temperature and filters, None unless they were wanted."""

    ids: list[int]
    logprobs: list[float] | None
    ended: str  # end of text, stop string, context, max_new_tokens


def settings_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **chosen: Any) -> Settings:
    """What the model's own files say of ends and context; the rest is chosen."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Settings(tuple(ends) if isinstance(ends, (list, tuple)) else (ends,), pad, context=context, **chosen)


def stops_here(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_strings: Sequence[str]) -> bool:
    """Whether a stop string ends inside the text of the last token; it may begin in the prompt."""
    if not stop_strings:
        return False
    most = max(len(stop.encode()) for stop in stop_strings)  # a token has a byte at least
    tail = list(ids[-most - 1 :])  # one more: SentencePiece drops the space of the first
    text = tokenizer.decode(tail)
    before = len(tokenizer.decode(tail[:-1]).rstrip("\ufffd"))  # half a character is none yet
    return any(stop in text and text.rfind(stop) + len(stop) > before for stop in stop_strings)


def _filters(settings: Settings) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature > 0:
        if settings.temperature != 1.0:
            found.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            found.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1:
            found.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            found.append(MinPLogitsWarper(settings.min_p))
    return found


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], num_prompt: int, settings: Settings) -> str | None:
    """Why `ids`, prompt included, go no further; None where they do."""
    if ids[-1] in settings.eos:
        return "end of text"
    if stops_here(tokenizer, ids, settings.stop_strings):
        return "stop string"
    if len(ids) - num_prompt >= settings.max_new_tokens:
        return "max_new_tokens"
    return "context" if settings.context is not None and len(ids) >= settings.context else None


@torch.inference_mode()
def write(
    decoder: LeanDecoder,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    settings: Settings,
    tell: Tell = lambda token, logprob: None,
) -> Continuation:
    """Continues one prompt from an empty cache; `tell` hears every token as it comes."""
    filters, row, ended = _filters(settings), list(ids), None
    logprobs: list[float] | None = [] if settings.wants_probs else None
    decoder.reset()
    new = torch.tensor(ids)
    seen = new[None]
    while ended is None:
        logits = decoder.forward(new)[None]  # (1, V)
        scores = filters(seen, logits) if filters else logits
        if settings.temperature > 0:
            new = torch.multinomial(scores.softmax(-1), num_samples=1)[0]
        else:
            new = scores.argmax(-1)
        token = int(new)
        row.append(token)
        if settings.repetition_penalty != 1.0:
            seen = torch.cat([seen, new[None]], dim=1)
        if logprobs is not None:
            logprobs.append(float(logits.log_softmax(-1)[0, token]))
        tell(token, logprobs[-1] if logprobs else None)
        ended = _ended(tokenizer, row, len(ids), settings)
    return Continuation(row[len(ids) :], logprobs, ended)


class _Streamer(BaseStreamer):
    """Hands the tokens of `generate` on; the first it gives is the prompt."""

    def __init__(self, tell: Tell):
        self.tell, self.is_prompt = tell, True

    def put(self, value: Tensor) -> None:
        for token in [] if self.is_prompt else value.flatten().tolist():
            self.tell(token, None)
        self.is_prompt = False

    def end(self) -> None:
        pass


@contextlib.contextmanager
def _nothing_else(model: PreTrainedModel) -> Iterator[None]:
    """What the model's generation_config.json asks for beyond `Settings` does not count, as in `write`."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT, which asks its base
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def write_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    settings: Settings,
    tell: Tell | None = None,
) -> list[Continuation]:
    """Continues prompts of any causal LM by `generate`, padded on the left; with `tell` a single one.

    Several rows must each have room for max_new_tokens, and no repetition penalty, which would count their padding.
    """
    width = max(map(len, rows))
    inputs = torch.tensor([[settings.pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    room = min(settings.room(len(row)) for row in rows)
    assert len(rows) == 1 or (room == settings.max_new_tokens and settings.repetition_penalty == 1), "see above"
    how: dict[str, Any] = {"do_sample": settings.temperature > 0, "num_beams": settings.num_beams}
    if settings.temperature > 0:
        how |= {"temperature": settings.temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p or 1.0}
        how |= {"min_p": settings.min_p} if settings.min_p is not None else {}
    if settings.stop_strings:
        how |= {"stop_strings": list(settings.stop_strings), "tokenizer": tokenizer}
    how |= {"max_new_tokens": room, "repetition_penalty": settings.repetition_penalty}
    with _nothing_else(model):
        out = model.generate(
            inputs,
            attention_mask=mask,
            pad_token_id=settings.pad,
            eos_token_id=list(settings.eos),
            return_dict_in_generate=True,
            output_logits=settings.wants_probs,
            streamer=_Streamer(tell) if tell and settings.num_beams == 1 else None,
            **how,
        )
    return [_cut(tokenizer, out, index, row, width, settings) for index, row in enumerate(rows)]


def _cut(
    tokenizer: PreTrainedTokenizerBase, out: Any, index: int, prompt: list[int], width: int, settings: Settings
) -> Continuation:
    """One row of what `generate` gave, up to its own end."""
    ids, ended = list(prompt), None
    for token in out.sequences[index, width:].tolist():
        ids.append(token)
        if (ended := _ended(tokenizer, ids, len(prompt), settings)) is not None:
            break
    new, logprobs = ids[len(prompt) :], None
    if settings.wants_probs:
        steps = zip(out.logits, new, strict=False)
        logprobs = [float(step[index].float().log_softmax(-1)[token]) for step, token in steps]
    return Continuation(new, logprobs, ended or "max_new_tokens")
