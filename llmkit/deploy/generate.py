"""Prompt in, text out, streamed; or a file of prompts in, a file of continuations out.

Owns the verb: what is asked, by which decoder, and what people see.

    llmkit generate --model_name_or_path runs/toy/pretrain --prompt "Lumo is" --temperature 0 --show_probs

The prompt opens with BOS where the model was trained so. A text ends at an end-of-text token, a stop string,
max_new_tokens, or where the model's context is full: nothing of the prompt is ever dropped to make room. Leaves out
conversations of several turns.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.color import ColorSystem
from rich.console import Console
from rich.progress import Progress
from rich.style import Style
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UserError
from ..data.tokenizer import bos_id
from ..evaluate.columns import manifest_of, run_of
from ..hardware import cpu_seconds, detect
from ..run import Result, quiet_libraries
from ..verbs import GenerateConfig
from .decode import LeanDecoder, lean_refusal
from .loading import find, use_decode_threads
from .sampling import Continuation, Settings, Tell, settings_for, write, write_batch

SHADES = ((0.9, "green"), (0.5, "cyan"), (0.1, "yellow"), (0.0, "red"))  # probability from which, colour
PATIENCE = 8  # tokens after which half a character is shown as it is
# key, what its value must be, how to say it
BOUNDS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("max_new_tokens", lambda v: v >= 1, "1 or more"),
    ("temperature", lambda v: v == 0 or v >= 1e-6, "0 (greedy), or 0.000001 or more"),
    ("top_k", lambda v: v is None or v >= 1, "1 or more, or null"),
    ("top_p", lambda v: v is None or 0 < v <= 1, "above 0, at most 1, or null"),
    ("min_p", lambda v: v is None or 0 <= v <= 1, "0 to 1, or null"),
    ("repetition_penalty", lambda v: v > 0, "above 0; 1: none"),
    ("num_beams", lambda v: v >= 1, "1 (none) or more"),
    ("batch_size", lambda v: v >= 1, "1 or more"),
    ("seed", lambda v: 0 <= v < 2**63, "0 to 2^63 - 1"),
    ("stop_strings", lambda v: all(isinstance(stop, str) and stop for stop in v), "a list of texts that are not empty"),
]


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str  # as it is shown
    ids: list[int]  # as the model gets it


def opens_with_bos(model_dir: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """What the model saw in training: its run's manifest says so; other models follow their own tokenizer."""
    run = run_of(Path(model_dir))
    opened = manifest_of(run).get("documents_open_with_bos") if run else None
    if opened is not None:
        return bool(opened)
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def check_config(config: GenerateConfig) -> None:
    if not config.model_name_or_path:
        raise UserError("model_name_or_path is missing; name a run folder, a model folder or a Hub id")
    for key, is_allowed, allowed in BOUNDS:
        if not is_allowed(value := getattr(config, key)):
            raise UserError(f"{key}={value!r}; allowed: {allowed}")
    filters = [key for key in ("top_k", "top_p", "min_p") if getattr(config, key)]
    if config.temperature == 0 and filters:
        raise UserError(
            f"temperature=0 is greedy and ignores {' and '.join(filters)}; remove it or raise the temperature"
        )
    if config.num_beams > 1:
        why = "show_probs: beams are chosen as a whole" if config.show_probs else None
        why = "decoder=lean, which has no beams" if config.decoder == "lean" else why
        why = f"temperature={config.temperature:g}: set it to 0, beams are not sampled" if config.temperature else why
        if why:
            raise UserError(f"num_beams={config.num_beams} does not go with {why}")
    ignored = {
        "prompt": bool(config.prompt and config.prompts_file) and "with prompts_file, which holds the prompts",
        "output_file": bool(config.output_file and not config.prompts_file) and "without prompts_file",
        "system_instruction": config.system_instruction is not None
        and not config.apply_chat_template
        and "without apply_chat_template: true",
    }
    for key, when in ignored.items():
        if when:
            raise UserError(f"{key}={getattr(config, key)!r} has no effect {when}; remove one of them")
    if config.output_file and Path(config.output_file).exists():
        raise UserError(f"output_file={config.output_file!r}: exists already; choose another or remove it")
    if config.output_file and not Path(config.output_file).absolute().parent.is_dir():
        raise UserError(f"output_file={config.output_file!r}: its folder does not exist; make it or choose another")


# ---- prompts


def _encode(config: GenerateConfig, tokenizer: Any, opens: bool, given: str | list[dict[str, Any]]) -> Prompt:
    """A text, or messages, which always go through the chat template. Raises UserError for what that refuses."""
    messages = given if isinstance(given, list) else None
    if isinstance(given, str) and config.apply_chat_template:
        if not given:
            raise UserError("the prompt is empty; with apply_chat_template it is what a user says: --prompt TEXT")
        messages = [{"role": "user", "content": given}]
        if config.system_instruction is not None:
            messages.insert(0, {"role": "system", "content": config.system_instruction})
    if messages is None:
        ids = tokenizer(given, add_special_tokens=False)["input_ids"]
        return Prompt(str(given), [bos_id(tokenizer), *ids] if opens or not ids else ids)
    if not tokenizer.chat_template:
        raise UserError("apply_chat_template: the tokenizer has no chat template; ask in plain text")
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except (TemplateError, KeyError, TypeError) as error:
        raise UserError(f"the chat template refuses these messages ({error})") from None
    return Prompt(str(messages[-1].get("content", "")), ids)


def read_prompts(path: Path) -> Iterator[tuple[int, str | list[dict[str, Any]]]]:
    """(line, prompt or messages) of a .txt or .jsonl file; empty lines are none. Raises UserError naming the line."""
    if path.suffix.lower() not in ("", ".txt", ".jsonl"):
        raise UserError(f"prompts_file={str(path)!r}: its name ends in {path.suffix}; allowed: .txt, .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts_file={str(path)!r}: cannot be read ({error}); name a .txt or .jsonl file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            yield number, line
            continue
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            given: Any = row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
            is_chat = isinstance(given, list) and given and all(isinstance(m, dict) for m in given)
            if isinstance(given, str) or is_chat:
                yield number, given
                continue
        raise UserError(
            f"{path} line {number}: {line[:60]!r}; a line is {{prompt: text}} or {{messages: [...]}} as JSON"
        )


def _prompts(config: GenerateConfig, tokenizer: Any, opens: bool, context: int | None) -> list[Prompt]:
    """All that will be continued. Raises UserError for a prompt that fills the context."""
    given = [(0, config.prompt)] if not config.prompts_file else list(read_prompts(Path(config.prompts_file)))
    if not given:
        raise UserError(f"prompts_file={config.prompts_file!r}: holds no prompt; a line each")
    found, too_long = [], []
    for number, prompt in given:
        where = f"{config.prompts_file} line {number}: " if number else ""
        try:
            found.append(_encode(config, tokenizer, opens, prompt))
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        if context is not None and len(found[-1].ids) >= context:
            too_long.append((where, len(found[-1].ids)))
    if too_long:
        where, count = too_long[0]
        more = f" ({len(too_long)} of {len(found)} prompts are too long)" if len(found) > 1 else ""
        raise UserError(f"{where}prompt has {count} tokens, the model's context is {context}; shorten the prompt{more}")
    return found


# ---- what people see


class _Screen:
    """Text on stdout as soon as its characters are whole; with probabilities in colour, or a line each without colours.

    A character of several tokens has the product of their probabilities.
    """

    def __init__(self, tokenizer: Any, shows_probs: bool, prompt: list[int]):
        self.tokenizer, self.shows_probs = tokenizer, shows_probs
        self.console = Console()
        self.is_table = shows_probs and (self.console.color_system is None or self.console.no_color)
        # decoded behind the tokens before them: SentencePiece drops the space of the first
        self.ids, self.num_before, self.num_shown = list(prompt), len(prompt), len(decoded(tokenizer, prompt))
        self.logprob, self.num_waiting = 0.0, 0

    def tell(self, token: int, logprob: float | None) -> None:
        if self.is_table:
            shown = self.tokenizer.decode([token])
            print(f"{_prob(logprob):.4f}  {shown!r}", flush=True)
            return
        self.ids.append(token)
        self.logprob += logprob or 0.0
        self.num_waiting += 1
        text = decoded(self.tokenizer, self.ids)
        whole = text.rstrip("\ufffd") if self.num_waiting <= PATIENCE else text  # the rest of a character may come
        new = whole[self.num_shown :]
        if new:
            self.write(new, self.logprob)
            self.num_shown = len(whole)
        if new or whole == text:
            self.logprob, self.num_waiting = 0.0, 0
        if new and whole == text:
            del self.ids[: self.num_before]
            self.num_before, self.num_shown = len(self.ids), len(decoded(self.tokenizer, self.ids))

    def write(self, text: str, logprob: float | None = None) -> None:
        if self.shows_probs and logprob is not None:
            shade = next(colour for least, colour in SHADES if _prob(logprob) >= least)
            text = Style.parse(shade).render(text, color_system=ColorSystem.STANDARD)
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        if not self.is_table:
            self.write(decoded(self.tokenizer, self.ids)[self.num_shown :] + "\n")
        sys.stdout.flush()


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _prob(logprob: float | None) -> float:
    return 0.0 if logprob is None else math.exp(logprob)


def _summary(count: int, seconds: float, ended: str, settings: Settings) -> str:
    said = {
        "context": f"the context of {settings.context} is full: the text stops here",
        "max_new_tokens": f"max_new_tokens={settings.max_new_tokens} reached",
    }.get(ended, ended)
    return f"{count} tokens, {count / max(seconds, 1e-9):,.0f} per second; {said}"


# ---- the verb


@dataclasses.dataclass
class Job:
    config: GenerateConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    prompts: list[Prompt]
    decoder: LeanDecoder | None

    def continue_one(self, prompt: Prompt, tell: Tell) -> Continuation:
        if self.decoder is not None:
            return write(self.decoder, self.tokenizer, prompt.ids, self.settings, tell)
        return write_batch(self.model, self.tokenizer, [prompt.ids], self.settings, tell)[0]


def _decoder(config: GenerateConfig, model: PreTrainedModel, prompts: list[Prompt], settings: Settings) -> Any:
    refusal = "num_beams is above 1" if config.num_beams > 1 else lean_refusal(model)
    if config.decoder == "lean" and refusal:
        raise UserError(f"decoder=lean: cannot decode this model, {refusal}; leave it at auto")
    if config.decoder == "transformers" or refusal:
        return None
    longest = max(len(prompt.ids) + settings.room(len(prompt.ids)) for prompt in prompts)
    return LeanDecoder(model, longest)  # type: ignore[arg-type]


def prepare(config: GenerateConfig) -> Job:
    """All that can be wrong before the first token. Raises UserError."""
    check_config(config)
    quiet_libraries()
    source = find(config.model_name_or_path, config.trust_remote_code)
    tokenizer = source.load_tokenizer()
    device = detect(config.use_cpu)
    model = source.load(device=device.type)
    use_decode_threads(device, model)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")
    chosen = {name: getattr(config, name) for name in names}
    settings = settings_for(
        model, tokenizer, stop_strings=tuple(config.stop_strings), wants_probs=config.show_probs, **chosen
    )
    opens = opens_with_bos(source.path, tokenizer)
    prompts = _prompts(config, tokenizer, opens, settings.context)
    return Job(config, model, tokenizer, settings, prompts, _decoder(config, model, prompts, settings))


def main(config: GenerateConfig) -> Result:
    """Prints prompt and continuation as they come; says on stderr how many tokens, how fast, and why it ended."""
    started = time.perf_counter()
    job = prepare(config)
    torch.manual_seed(config.seed)
    count = _from_file(job) if config.prompts_file else _stream(job)
    wall_s = time.perf_counter() - started
    return Result("generate", "ok", config.model_name_or_path, None, wall_s, cpu_seconds(), count, {}, {})


def _stream(job: Job) -> int:
    """One prompt to the console; the number of new tokens."""
    prompt = job.prompts[0]
    screen = _Screen(job.tokenizer, job.config.show_probs, prompt.ids)
    if not job.config.apply_chat_template:
        screen.write(prompt.text + ("\n" if screen.is_table and prompt.text else ""))
        if job.tokenizer.chat_template:
            print("(a model for chats: --apply_chat_template asks it as one)", file=sys.stderr)
    is_live = job.settings.num_beams == 1 and (job.decoder is not None or not job.settings.wants_probs)
    started = time.perf_counter()
    written = job.continue_one(prompt, screen.tell if is_live else lambda token, logprob: None)
    seconds = time.perf_counter() - started
    if not is_live:
        for index, token in enumerate(written.ids):
            screen.tell(token, written.logprobs[index] if written.logprobs else None)
    screen.end()
    if job.config.show_probs and not screen.is_table:
        legend = ", ".join(f"{colour} from {least:g}" for least, colour in SHADES)
        print(f"probability of each token: {legend}", file=sys.stderr)
    print(_summary(len(written.ids), seconds, written.ended, job.settings), file=sys.stderr)
    return len(written.ids)


def _batches(job: Job) -> Iterator[list[Prompt]]:
    """In the order of the file; alone what has a decoder of its own, a penalty, or less room than was asked for."""
    batch: list[Prompt] = []
    for prompt in job.prompts:
        is_alone = job.decoder is not None or job.settings.repetition_penalty != 1
        is_alone = is_alone or job.settings.room(len(prompt.ids)) < job.settings.max_new_tokens
        if batch and (is_alone or len(batch) == job.config.batch_size):
            yield batch
            batch = []
        batch.append(prompt)
        if is_alone:
            yield batch
            batch = []
    if batch:
        yield batch


def _from_file(job: Job) -> int:
    """Every prompt of the file; a line of output_file as soon as it is there. The number of new tokens."""
    started, count = time.perf_counter(), 0
    ends: dict[str, int] = {}
    console = Console(stderr=True, highlight=False)
    out = Path(job.config.output_file) if job.config.output_file else None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        task = bar.add_task("prompts", total=len(job.prompts))
        file = stack.enter_context(out.open("x", encoding="utf-8")) if out else sys.stdout
        for batch in _batches(job):
            if len(batch) == 1:
                found = [job.continue_one(batch[0], lambda token, logprob: None)]
            else:
                found = write_batch(job.model, job.tokenizer, [p.ids for p in batch], job.settings)
            for prompt, written in zip(batch, found, strict=True):
                file.write(json.dumps(_row(job.tokenizer, prompt, written), ensure_ascii=False) + "\n")
                count += len(written.ids)
                ends[written.ended] = ends.get(written.ended, 0) + 1
            file.flush()
            bar.advance(task, len(batch))
    said = ", ".join(f"{number:,} {reason}" for reason, number in ends.items())
    rate = count / (time.perf_counter() - started)
    print(f"{len(job.prompts):,} prompts, {count:,} tokens, {rate:,.0f} per second; ended: {said}", file=sys.stderr)
    return count


def _row(tokenizer: Any, prompt: Prompt, written: Continuation) -> dict[str, Any]:
    text = decoded(tokenizer, prompt.ids + written.ids)[len(decoded(tokenizer, prompt.ids)) :]
    row = {"prompt": prompt.text, "text": text, "num_tokens": len(written.ids), "ended": written.ended}
    if written.logprobs is not None:
        row["tokens"] = [
            [tokenizer.decode([token]), round(_prob(logprob), 6)]
            for token, logprob in zip(written.ids, written.logprobs, strict=True)
        ]
    return row
