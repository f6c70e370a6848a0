"""What a loss teaches at every position, read off its gradient: supervised or not, which token, with what weight.

Owns the logit-gradient probe. The loss runs as it is, the trainer's own included; the gradient that arrives at the
backbone's last hidden state is compared, position by position, with that of plain cross-entropy to the token 0, 1 and
2 places ahead through the same head.

    probe = run_probe(model, training.backward, batch)
    probe.weight[probe.supervised].sum()  # 1 for a mean over tokens

Works with fused heads (TRL's never calls lm_head) since nothing but the backbone's output is touched. Leaves out
verdicts (`loss.py`).
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .forward import bare, num_ids, text_config
from .subject import NotRun, Subject, without_dropout

SHIFTS = (0, 1, 2)
NOTHING = 1e-7  # of the largest gradient: what a position without a target gets, exactly 0 but for other terms

Backward = Callable[[nn.Module, list[dict[str, Any]]], float]


@dataclass
class Probe:
    """(B, T) each; position t predicts the token at t + 1."""

    batch: dict[str, Any]
    ids: Tensor
    expected: Tensor  # by the labels, t has a target
    supervised: Tensor  # by the gradient, it has one
    cosine: Tensor  # (3, B, T) of the gradient with that of the token 0, 1 and 2 ahead
    weight: Tensor  # of the token 1 ahead
    is_distinct: Tensor  # the tokens 0, 1 and 2 ahead differ, so that they can be told apart


@dataclass(frozen=True)
class Tap:
    """A place where the last hidden state passes: a backbone's output, or else the head's input."""

    module: nn.Module
    is_head: bool = False

    @contextlib.contextmanager
    def listening(self, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """`function` sees the hidden state at every forward, and may give another one in its place."""

        def behind(module: nn.Module, args: Any, output: Any) -> Any:
            new = function(output if isinstance(output, Tensor) else output[0])
            if new is None or isinstance(output, Tensor):
                return new
            if isinstance(output, tuple):
                return (new, *output[1:])
            output[next(iter(output.keys()))] = new
            return output

        def before(module: nn.Module, args: Any) -> Any:
            new = function(args[0])
            return None if new is None else (new, *args[1:])

        if self.is_head:
            handle = self.module.register_forward_pre_hook(before)
        else:
            handle = self.module.register_forward_hook(behind)
        try:
            yield
        finally:
            handle.remove()


def taps(model: nn.Module) -> list[Tap]:
    """The outermost first: a fused head never calls lm_head, and some models call their decoder past their backbone."""
    base = bare(model)
    found: list[Any] = [getattr(base, "base_model", None)]
    with contextlib.suppress(Exception):
        found.append(base.get_decoder())
    found += [getattr(base, name, None) for name in ("model", "transformer", "backbone")]
    found += [getattr(module, "decoder", None) for module in found]
    modules = {id(m): m for m in found if isinstance(m, nn.Module) and m is not base}
    result = [Tap(module) for module in modules.values()]
    with contextlib.suppress(Exception):
        head = base.get_output_embeddings()
        result += [Tap(head, is_head=True)] if isinstance(head, nn.Module) else []
    return result


def run_probe(model: nn.Module, backward: Backward, batch: dict[str, Any]) -> Probe:
    """Raises NotRun where the loss cannot be read that way. `model` is in eval mode afterwards."""
    places = taps(model)
    seen: list[list[Tensor]] = [[] for _ in places]

    def keep(hidden: Any, into: list[Tensor]) -> None:
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.retain_grad()
            into.append(hidden)

    with contextlib.ExitStack() as stack:
        stack.enter_context(without_dropout(model))
        for place, into in zip(places, seen, strict=True):
            stack.enter_context(place.listening(functools.partial(keep, into=into)))
        backward(model, [batch])
    model.zero_grad(set_to_none=True)
    used = [(place, [h for h in into if h.grad is not None]) for place, into in zip(places, seen, strict=True)]
    tap, states = next(((place, states) for place, states in used if states), (None, []))
    if tap is None:
        raise NotRun("the loss leaves no gradient at the output of the model's backbone")
    if len(states) > 1:
        raise NotRun(f"the loss runs the model {len(states)} times: one gradient cannot be told from the other")
    hidden = states[0]
    assert hidden.grad is not None
    ids = batch["input_ids"].to(hidden.device)
    extra = hidden.shape[1] - ids.shape[1] if hidden.ndim == 3 else -1  # virtual tokens of prompt tuning come first
    if hidden.shape[0] != ids.shape[0] or extra < 0:
        raise NotRun(f"hidden states of shape {tuple(hidden.shape)} for ids of shape {tuple(ids.shape)}")
    targets = _gradients(model, tap, hidden.detach(), batch, ids)
    gradient = hidden.grad[:, extra:].float()  # (B, T, D)
    size = gradient.norm(dim=-1)
    target_sizes = targets.norm(dim=-1).clamp(min=1e-30)
    dots = (gradient * targets).sum(-1)  # (3, B, T)
    ahead = [ids.roll(-shift, 1) for shift in SHIFTS]
    is_distinct = (ahead[0] != ahead[1]) & (ahead[1] != ahead[2]) & (ahead[0] != ahead[2])
    is_distinct[:, -2:] = False
    return Probe(
        batch=batch,
        ids=ids,
        expected=expected_positions(batch).to(ids.device),
        supervised=size > NOTHING * size.max().clamp(min=1e-30),
        cosine=dots / (target_sizes * size.clamp(min=1e-30)),
        weight=dots[1] / target_sizes[1] ** 2,
        is_distinct=is_distinct,
    )


def _gradients(model: nn.Module, tap: Tap, hidden: Tensor, batch: dict[str, Any], ids: Tensor) -> Tensor:
    """(3, B, T, D): gradient of cross-entropy to the tokens 0, 1, 2 ahead at `hidden`, through the model's own head."""
    leaf = hidden.clone().requires_grad_()
    inputs = {"input_ids": ids}
    if isinstance(batch.get("attention_mask"), Tensor):
        inputs["attention_mask"] = batch["attention_mask"].to(ids.device)
    model.eval()
    with tap.listening(lambda _: leaf):
        output = model(**inputs)
    logits = (output.logits if hasattr(output, "logits") else output[0])[:, -ids.shape[1] :]
    found = []
    for shift in SHIFTS:
        end = ids.shape[1] - shift
        loss = F.cross_entropy(logits[:, :end].flatten(0, 1).float(), ids[:, shift:].flatten(), reduction="sum")
        found.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0][:, -ids.shape[1] :].float())
    return torch.stack(found)


def without_cache(model: Any) -> None:
    """As a Trainer runs it. Undone by `small_model`."""
    for config in (model.config, text_config(model)):
        config.use_cache = False


def expected_positions(batch: dict[str, Any]) -> Tensor:
    """(B, T): positions whose next token is to be trained, in any of the three conventions for labels."""
    if isinstance(batch.get("shift_labels"), Tensor):
        return batch["shift_labels"] != -100
    labels, ids = batch["labels"], batch["input_ids"]
    is_on = labels != -100
    here = (is_on & (labels == ids)).sum()
    ahead = (is_on & (labels == ids.roll(-1, 1))).sum()
    if ahead > here:  # shifted by the collator
        return is_on
    expected = torch.zeros_like(is_on)
    expected[:, :-1] = is_on[:, 1:]
    return expected


# a model's own loss, where there is no trainer


def ragged_batch(model: nn.Module, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Random ids padded on the right; padding and the first third of every row have label -100."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(num_ids(model), (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    is_prompt = torch.arange(max(lengths))[None] < torch.tensor([n // 3 for n in lengths])[:, None]
    labels = ids.masked_fill(~mask | is_prompt, -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def own_backward(model: nn.Module, micro_batches: list[dict[str, Any]]) -> float:
    """The model's own loss as a Trainer uses it: normalised by the number of tokens where the forward takes that."""
    num_items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches)
    options = {"num_items_in_batch": num_items} if takes_num_items(model) else {}
    model.train()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, **options).loss
        loss = loss if options else loss / len(micro_batches)
        loss.backward()
        total += float(loss.detach())
    return total


def takes_num_items(model: nn.Module) -> bool:
    """As transformers' Trainer decides it."""
    base = bare(model)
    declared = getattr(base, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())


# a shrunk model for a trainer's loss


def need_same_forward(subject: Subject, model: Any) -> None:
    """Raises NotRun where a shrunk copy would not run what the live model does.

    Of a forward that was written on the live model only TRL's fused head is trusted to `live.patch_forward_as`.
    """
    trainer = getattr(subject.training, "trainer", None)
    forward = None if trainer is None else vars(bare(trainer.model)).get("forward")
    if forward is None or model is subject.model:
        return
    source = getattr(getattr(forward, "__func__", forward), "__code__", None)
    if source is None or source.co_name != "_fused_forward":
        raise NotRun("the live model's forward was replaced, which its shrunk copy lacks")
