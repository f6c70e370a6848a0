"""`llmkit check --demo NAME`: plants a bug in a tiny chat model, offline, and shows it being caught.

Owns the toy (model, tokenizer, rows; all as they should be) and a bug for each family of checks, a few lines each,
which are shown to the user as they stand here.   code = run_demo("future-leak")

Leaves out bugs of a Trainer: the base install has none.
"""

import difflib
import inspect
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..config import UserError
from ..verbs import CheckConfig
from .attach import from_folder, from_parts
from .report import CheckResult
from .runner import get_check, quiet, run_one
from .subject import Subject

PLACES = ("the red house", "the old river", "the small town", "the green tree", "the long bridge", "the tall stone")
CONTROL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 4
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows() -> list[dict[str, Any]]:
    def row(a: str, b: str) -> dict[str, Any]:
        question, answer = f"How do I get from {a} to {b}?", f"Walk past {a}, turn left, and {b} is in front of you."
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    return [row(a, b) for a in PLACES for b in PLACES if a != b]


def make_tokenizer(control: list[str], eos: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <s> before a text, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [message["content"] for row in make_rows() for message in row["messages"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=control, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    made.chat_template = CHATML
    return made


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=4)
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=64, max_position_embeddings=256)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **sizes, **ids))


@dataclass
class Toy:
    """A tiny chat model that is about to be trained from scratch, everything as it should be."""

    folder: Path  # empty, for a bug of files
    model: Any = field(default_factory=make_model)
    tokenizer: Any = field(default_factory=lambda: make_tokenizer(CONTROL, eos="<|im_end|>"))
    rows: list[dict[str, Any]] = field(default_factory=make_rows)
    settings: dict[str, Any] = field(default_factory=lambda: {"max_length": 128, "assistant_only_loss": True})

    def save(self) -> None:
        self.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)

    def subject(self) -> Subject:
        if any(self.folder.iterdir()):
            return from_folder(CheckConfig(model_name_or_path=str(self.folder), chat=True))
        subject = from_parts(model=self.model, tokenizer=self.tokenizer, dataset=self.rows, chat=True, scratch=True)
        subject.settings = self.settings
        return subject


@dataclass(frozen=True)
class Demo:
    name: str  # of the check that must catch it
    plant: Callable[[Toy], None]
    is_saved: bool

    @property
    def what(self) -> str:
        return inspect.cleandoc(self.plant.__doc__ or "")

    @property
    def code(self) -> str:
        """The plant's own lines, without its head and docstring."""
        lines = inspect.getsource(self.plant).splitlines()
        end_of_docstring = next(number for number, line in enumerate(lines) if line.rstrip().endswith('"""'))
        return textwrap.dedent("\n".join(lines[end_of_docstring + 1 :])).strip()


DEMOS: dict[str, Demo] = {}


def demo(name: str, is_saved: bool = False) -> Callable:
    """`is_saved`: the toy lies in its folder before the bug is planted, and is checked from there."""

    def register(plant: Callable[[Toy], None]) -> Callable[[Toy], None]:
        DEMOS[name] = Demo(name, plant, is_saved)
        return plant

    return register


@demo("future-leak")
def _future_leak(toy: Toy) -> None:
    """The attention has lost its causal mask."""

    def without_mask(attention: Any, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"attention_mask": None}

    for layer in toy.model.model.layers:
        layer.self_attn.is_causal = False
        layer.self_attn.register_forward_pre_hook(without_mask, with_kwargs=True)


@demo("padding-changes-logits")
def _padding_changes_logits(toy: Toy) -> None:
    """The attention mask of a batch is dropped on the way into the model."""

    def without_mask(model: Any, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"attention_mask": None}

    toy.model.register_forward_pre_hook(without_mask, with_kwargs=True)


@demo("packed-documents-leak")
def _packed_documents_leak(toy: Toy) -> None:
    """Packed rows arrive without position_ids, so nothing says where a document begins."""

    def without_positions(model: Any, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"position_ids": None}

    toy.model.register_forward_pre_hook(without_positions, with_kwargs=True)


@demo("cache-differs")
def _cache_differs(toy: Toy) -> None:
    """Positions start at 0 again with every piece that the cache continues."""

    def from_zero(model: Any, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]}

    toy.model.register_forward_pre_hook(from_zero, with_kwargs=True)


@demo("double-bos")
def _double_bos(toy: Toy) -> None:
    """Conversations are rendered to text, BOS included, and the tokenizer adds its own."""
    for row in toy.rows:
        messages = row.pop("messages")
        row["text"] = toy.tokenizer.apply_chat_template(messages, tokenize=False)


@demo("special-token-split")
def _special_token_split(toy: Toy) -> None:
    """A ChatML template on a base tokenizer that has no <|im_start|> and <|im_end|>."""
    toy.tokenizer = make_tokenizer(["<pad>", "<s>", "</s>"], eos="</s>")


@demo("stop-token-missing")
def _stop_token_missing(toy: Toy) -> None:
    """The template ends turns by <|im_end|>, and generation still waits for the base model's </s>."""
    toy.tokenizer.eos_token = "</s>"
    toy.model.config.eos_token_id = toy.model.generation_config.eos_token_id = 2


@demo("text-lost")
def _text_lost(toy: Toy) -> None:
    """The pre-tokeniser throws line breaks away."""
    backend = toy.tokenizer.backend_tokenizer
    without_breaks = pre_tokenizers.Split(Regex(r"\n"), "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([without_breaks, backend.pre_tokenizer])


@demo("generation-prompt-mismatch")
def _generation_prompt_mismatch(toy: Toy) -> None:
    """Generation asks for the role `bot`, training answers as `assistant`."""
    asked = "{% if add_generation_prompt %}<|im_start|>assistant"
    toy.tokenizer.chat_template = CHATML.replace(asked, asked.replace("assistant", "bot"))


@demo("no-token-trained")
def _no_token_trained(toy: Toy) -> None:
    """assistant_only_loss with a template that has no generation marks: every label is -100."""
    for mark in ("{% generation %}", "{% endgeneration %}"):
        toy.tokenizer.chat_template = toy.tokenizer.chat_template.replace(mark, "")


@demo("eos-not-trained")
def _eos_not_trained(toy: Toy) -> None:
    """The end of turn stands outside of the generation marks, so it is never taught."""
    inside = "<|im_end|>{% endgeneration %}"
    outside = "{% endgeneration %}<|im_end|>"
    toy.tokenizer.chat_template = CHATML.replace(inside, outside)


@demo("answer-truncated")
def _answer_truncated(toy: Toy) -> None:
    """max_length is shorter than most prompts."""
    toy.settings["max_length"] = 24


@demo("labels-misaligned")
def _labels_misaligned(toy: Toy) -> None:
    """A loss of one's own forgets that labels are shifted by one."""

    def loss(logits: Any, labels: Any, **kwargs: Any) -> Any:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    toy.model.loss_function = loss


@demo("tied-head-mismatch")
def _tied_head_mismatch(toy: Toy) -> None:
    """The head is tied by hand, and the configuration that is saved says that it is not."""
    toy.model.lm_head.weight = toy.model.model.embed_tokens.weight


@demo("initial-loss")
def _initial_loss(toy: Toy) -> None:
    """The head is drawn with a deviation of 1 instead of 0.02."""
    torch.nn.init.normal_(toy.model.lm_head.weight)


@demo("reload-differs")
def _reload_differs(toy: Toy) -> None:
    """A filter of the saved tensors takes one too many."""
    save = toy.model.save_pretrained

    def save_filtered(folder: str) -> None:
        tensors = toy.model.state_dict()
        del tensors["model.norm.weight"]
        save(folder, state_dict=tensors)

    toy.model.save_pretrained = save_filtered


@demo("untrained-token-rows", is_saved=True)
def _untrained_token_rows(toy: Toy) -> None:
    """The row of <|im_end|> has never been trained: the saved head holds zeros there."""
    path = toy.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][4] = 0
    save_file(tensors, path, metadata={"format": "pt"})


def checked(item: Demo, is_planted: bool) -> CheckResult:
    """The result of its check on the toy, with the bug or without."""
    with quiet(), tempfile.TemporaryDirectory(prefix="llmkit-demo-") as folder:
        toy = Toy(Path(folder))
        if item.is_saved:
            toy.save()
        if is_planted:
            item.plant(toy)
        return run_one(get_check(item.name), toy.subject())


def get_demo(name: str) -> Demo:
    """Raises UserError naming the nearest one."""
    if name not in DEMOS:
        near = difflib.get_close_matches(name, DEMOS, n=1, cutoff=0.4)
        hint = f"nearest: {near[0]!r}; " if near else ""
        raise UserError(f"no demo is named {name!r}; {hint}`llmkit check --demo list` names them")
    return DEMOS[name]


def run_demo(name: str) -> int:
    """0: the bug was caught, and the same thing without it passed."""
    from .console import hang, print_result
    from .verb import make_console

    console = make_console()
    if name == "list":
        width = max(map(len, DEMOS))
        for item in DEMOS.values():
            hang(console, Text(f"{item.name:<{width}}  "), Text(item.what))
        return 0
    item = get_demo(name)
    hang(console, Text("planted   ", style="bold"), Text(item.what))
    hang(console, Text("seen as   ", style="bold"), Text(" ".join(get_check(name).section("Symptom").split())))
    console.print(Text("\n" + textwrap.indent(item.code, "    "), style="cyan"), soft_wrap=True)
    torch.set_num_threads(1)  # tiny models are slower on more
    clean, planted = checked(item, is_planted=False), checked(item, is_planted=True)
    for title, result in (("without the bug", clean), ("with the bug", planted)):
        console.print(Text(f"\n{title}", style="bold"))
        print_result(result, console)
    is_caught = (clean.status, planted.status) == ("pass", "fail")
    verdict = "caught" if is_caught else "not caught: please report this"
    console.print(Text(f"\n{verdict} ({clean.seconds + planted.seconds:.1f} s)", style="bold"))
    console.print(Text(f"more: llmkit check --explain {name}", style="dim"))
    return 0 if is_caught else 1
