"""Can it learn: the first loss, experts in balance, the same run twice, a sample that decodes.

Owns these catch-all checks of tier 2. Leaves out learning a batch by heart (`overfit.py`).
"""

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import overfit  # noqa: F401  # a check of this family
from .forward import accepts, bare, draw_ids, logits_of, num_ids, text_config
from .overfit import backward, batch_of
from .runner import Outcome, check, failed, first_line, passed, warned
from .subject import NotApplicable, NotRun, Subject, without_dropout

# config fields that scale logits or the stream, on purpose
MULTIPLIERS = (
    "logits_scaling", "logit_scale", "lm_head_multiplier", "embedding_multiplier", "scale_emb", "dim_model_base",
    "output_multiplier", "width_multiplier", "mup_base_width", "logits_multiplier",
)  # fmt: skip


@check("initial-loss", family="learning", tier=2, catalogue="K32")
def initial_loss(subject: Subject) -> Outcome:
    """A fresh model is not undecided: its first loss is not ln V.

    Symptom: the first hundred steps are spent on unlearning the initialisation, or the loss explodes.
    Example: embeddings drawn N(0, 1) under a tied head; an init that a custom class never gets.
    Detected: loss on random ids of the model as it was initialised, against ln V; deviation of its logits.
    Tolerance: ln V +- 0.5 nats, logits' deviation below 1.5; more where matrices of deviation 0.02, the default of
        transformers, give more at this width: a head over 4096 unit numbers has logits of 1.28, and costs 0.8 nats.
    Spares: weights that were trained; a head of zeros gives exactly ln V. A warning where the config scales logits or
        embeddings by a multiplier (muP).
    Fix: draw matrices with initializer_range (0.02); look at whether `_init_weights` reaches every module.
    Sources: litgpt#1150, transformers#38987, fastai#2090.
    """
    subject.need("model")
    if not subject.is_scratch:
        raise NotApplicable("not known to start from scratch")
    model = subject.model
    if model is None:
        with subject.small_model(draw=False) as built, torch.no_grad():
            return _judge_initial(built)
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _judge_initial(model)
    finally:
        for module, mode in was:
            module.training = mode


def _judge_initial(model: Any) -> Outcome:
    ids = draw_ids(model, 4, 33)
    logits = logits_of(model, ids)
    size, config = logits.shape[-1], text_config(model)
    loss = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    spread = float(logits.std())
    width = next((w for k in ("hidden_size", "n_embd", "d_model") if isinstance(w := getattr(config, k, None), int)), 1)
    usual = 0.02 * width**0.5  # deviation of the logits; random ones cost half of its square
    most_nats, most_spread = max(0.5, 0.6 * usual**2 + 0.1), max(1.5, 1.2 * usual)
    measured = f"loss {loss:.3f}, ln {size} = {math.log(size):.3f}, logits' deviation {spread:.2f}"
    limit = f"ln V ± {most_nats:.2f}, deviation {most_spread:.2f}"
    if abs(loss - math.log(size)) <= most_nats and spread < most_spread:
        return passed(measured, limit)
    stds = [(float(p.detach().float().std()), name) for name, p in model.named_parameters() if p.ndim > 1]
    evidence = [{"note": f"{name}: deviation {std:.3g}"} for std, name in sorted(stds, reverse=True)[:3]]
    scaled = [k for k in MULTIPLIERS if getattr(config, k, None) not in (None, 1, 1.0)]
    if scaled and math.isfinite(loss):
        return warned(measured, limit, [{"note": f"config.{k} = {getattr(config, k)}"} for k in scaled] + evidence)
    return failed(measured, limit, evidence)


@check("moe-balance-void", family="learning", tier=2, catalogue="K32")
def moe_balance_void(subject: Subject) -> Outcome:
    """The loss that should spread tokens over experts does not see a collapse.

    Symptom: a few experts take all tokens, the others stay as they were drawn.
    Example: softmax applied twice to the router's logits; a coefficient that never enters the loss; padding counted.
    Detected: the auxiliary loss of rows of one and the same token, in training mode: with routers that all prefer one
        expert (collapsed) it must be E / 2k times that with routers of zero weight (undecided); the loss must contain
        coefficient times it; and padding behind mask 0 must not change it.
    Tolerance: half of the exact ratio E / k, a warning up to three quarters; the coefficient to 1 %; padding 1 %, a
        warning.
    Spares: routers balanced by a bias, without auxiliary loss (DeepSeek-V3); dense models; every expert chosen. A
        trainer that starts from scratch with `output_router_logits=False` is warned of: it has no such loss.
    Fix: give `load_balancing_loss_func` raw router logits and the attention mask, and add
        `router_aux_loss_coef * aux_loss` to the loss; set `output_router_logits=True` in the config to train with it.
    Sources: transformers#45120, Megatron-LM#1984, transformers#28505.
    """
    subject.need("model")
    with subject.small_model() as model, without_dropout(model), torch.no_grad():
        config = text_config(model)
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        experts = next((n for k in names if (n := getattr(config, k, None))), None)
        chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_top_k", None)
        coefficient = getattr(config, "router_aux_loss_coef", None)
        if not experts or not chosen or coefficient is None or not accepts(model, "output_router_logits"):
            raise NotApplicable("no mixture of experts with an auxiliary loss")
        if experts <= chosen:
            raise NotApplicable("every token goes to every expert")
        routers = _routers(model, experts)
        one = draw_ids(model, 1, 1).expand(16, 1).contiguous()  # rows of one token: nothing tells them apart
        varied = draw_ids(model, 2, 16)
        model.train()
        for p in routers.values():
            p.zero_()
        low, _ = _auxiliary(model, one)
        with _collapsed(model, routers):
            high, _ = _auxiliary(model, one)
        for p in routers.values():
            p.copy_(3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        (alone, extra), padded = _auxiliary(model, varied), _auxiliary(model, varied, padding=16)[0]
    ratio, wanted = high / max(low, 1e-9), experts / chosen
    share = coefficient * alone
    if not math.isfinite(ratio + extra):
        raise NotRun("losses are not finite with redrawn weights")
    measured = f"collapsed / undecided {ratio:.2f} (exact {wanted:.1f}), in the loss {extra:.3g} of {share:.3g}"
    limit = f"{wanted / 2:.1f}"
    evidence = [{"note": f"auxiliary loss {low:.3g} undecided, {high:.3g} collapsed"}]
    if ratio < wanted / 2:
        return failed(measured, limit, evidence)
    if abs(extra - share) > 0.01 * share + 1e-4:
        return failed(measured, "the coefficient times it", [{"note": f"router_aux_loss_coef {coefficient}"}])
    if ratio < 0.75 * wanted:
        return warned(measured, f"{0.75 * wanted:.1f}", evidence)
    if abs(padded - alone) > 0.01 * alone:
        note = f"auxiliary loss {alone:.4g} alone, {padded:.4g} with padding that the attention mask hides"
        return warned("padding counts in the auxiliary loss", "1 %", [{"note": note}])
    is_used = getattr(config, "output_router_logits", False) or not coefficient
    if subject.is_scratch and subject.training is not None and not is_used:
        note = f"router_aux_loss_coef is {coefficient}, output_router_logits False"
        return warned("the auxiliary loss is right, and training will not use it", "", [{"note": note}])
    return passed(measured, limit)


def _routers(model: Any, experts: int) -> dict[str, Tensor]:
    """Weights and biases that give one number per expert, by name."""
    width = int(model.get_input_embeddings().weight.shape[1])
    found = {
        n: p
        for n, p in model.named_parameters()
        if p.ndim <= 2 and p.shape[0] == experts and ("router" in n or "gate" in n or p.shape[1:] == (width,))
    }
    if not found:
        raise NotRun("no router weights found")
    return found


@contextlib.contextmanager
def _collapsed(model: Any, routers: dict[str, Tensor]) -> Iterator[None]:
    """Inside, every router of the model prefers its first expert by far, and then the others in order.

    The balancing loss takes the mean over layers, so that layers which collapse to different experts look balanced.
    """

    def prefer(module: Any, args: Any) -> None:
        hidden = args[0].reshape(-1, args[0].shape[-1])[0].float()
        if hidden.shape[0] == module.weight.shape[-1]:
            wish = -1e3 * torch.arange(len(module.weight), device=hidden.device)
            wish[0] = 1e3
            module.weight.copy_(wish[:, None] * hidden / hidden.square().sum().clamp_min(1e-12))

    handles = []
    for name, p in routers.items():
        owner, _, last = name.rpartition(".")
        if p.ndim == 2 and last == "weight":
            handles.append(model.get_submodule(owner).register_forward_pre_hook(prefer))
        p.zero_()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _auxiliary(model: Any, ids: Tensor, padding: int = 0) -> tuple[float, float]:
    """(auxiliary loss, what the loss has beyond cross-entropy), `padding` tokens behind every row, without labels."""
    pad = ids[:, :1].expand(-1, padding)
    rows, labels = torch.cat([ids, pad], 1), torch.cat([ids, torch.full_like(pad, -100)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(pad)], 1)
    out = model(input_ids=rows, attention_mask=mask, labels=labels, output_router_logits=True)
    if getattr(out, "aux_loss", None) is None:
        raise NotApplicable("the model returns no auxiliary loss")
    if ids.shape[1] == 1:
        return float(out.aux_loss), 0.0
    plain = F.cross_entropy(out.logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return float(out.aux_loss), float(out.loss - plain)


@check("same-seed-differs", family="learning", tier=2, catalogue="K33")
def same_seed_differs(subject: Subject) -> Outcome:
    """The same seed gives another run.

    Symptom: a result cannot be reproduced, and a bug cannot be told from chance.
    Example: dropout or augmentation from a generator that nothing seeds; an order taken from the clock.
    Detected: the first steps of two runs of the trainer from the same weights and seeds, dropout on, rows and losses
        compared; without a trainer, or where it cannot be run, three steps on one batch, twice.
    Tolerance: none on a CPU; 1e-3 of the loss elsewhere.
    Spares: kernels of an accelerator that are not deterministic; generators that the user seeds.
    Fix: take every random number from a generator that is seeded at the start of the run.
    Sources: the practice of reproducible runs.
    """
    subject.need("model")
    if (outcome := _runs_of_trainer(subject)) is not None:
        return outcome
    runs: list[list[float]] = []
    for _ in range(2):
        with subject.small_model(keep_vocabulary=subject.training is not None) as model:
            device = next(model.parameters()).device
            runs.append(_three_steps(subject, model))
    limit = 0.0 if device.type == "cpu" else 1e-3 * abs(runs[0][0])
    gaps = [abs(a - b) for a, b in zip(*runs, strict=True)]
    worst = max((gap if math.isfinite(gap) else math.inf) for gap in gaps)
    if worst > limit:
        step = next(i for i, gap in enumerate(gaps) if not gap <= limit)
        evidence = [{"position": step, "note": f"losses {runs[0][step]!r} and {runs[1][step]!r} in step {step + 1}"}]
        return failed(f"losses of two equal runs differ by {worst:.1e}", f"{limit:.1g}", evidence)
    return passed(f"losses of two equal runs differ by {worst:g}", f"{limit:.1g}")


def _runs_of_trainer(subject: Subject) -> Outcome | None:
    """From the runs that the checks on resuming make anyway; None where there are none."""
    from .resume import CUT, compare_runs

    try:
        runs = compare_runs(subject)
    except Exception:  # what is wrong with them is said there
        return None
    is_cpu = subject.model is None or next(subject.model.parameters()).device.type == "cpu"
    limit = 0.0 if is_cpu else 1e-3
    measured = f"losses of the first {CUT} steps of two equal runs differ by {runs.noise:g}"
    if not runs.is_repeatable:
        return failed(f"two equal runs see other rows; {measured}", "the same rows and losses", [{"note": measured}])
    if runs.noise > limit:
        note = "the rows are the same: look at dropout and noise in the model or the loss"
        return failed(measured, f"{limit:g}", [{"note": note}])
    return passed(f"{measured}, rows are the same", f"{limit:g}")


def _three_steps(subject: Subject, model: Any) -> list[float]:
    with subject.training.unchanged() if subject.training is not None else contextlib.nullcontext():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        batch = batch_of(subject, model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            losses.append(backward(subject, model, batch))
            optimizer.step()
    return losses


@check("sample-does-not-decode", family="learning", tier=2, catalogue="K33")
def sample_does_not_decode(subject: Subject) -> Outcome:
    """A sample from the model does not become text.

    Symptom: generation crashes at the end of a long run, or prints ids that no tokenizer knows.
    Example: a `generate` that the custom forward breaks; a decoder that drops everything; text whose ids have no row.
    Detected: a few tokens sampled from the redrawn model, among the ids that the tokenizer has, are decoded, and the
        text is encoded again: all of its ids must have a row.
    Tolerance: none.
    Spares: rows of the head beyond the tokenizer (padding of the vocabulary), special tokens, text that is encoded by
        other ids than it was decoded from.
    Fix: make `generate` work on the fresh model first; look at text-lost and ids-beyond-embedding.
    Sources: the practice of looking at a sample before training.
    """
    subject.need("model", "tokenizer")
    tokenizer = subject.tokenizer
    with subject.small_model(keep_vocabulary=True) as model, torch.no_grad():
        if not hasattr(bare(model), "generate"):
            raise NotApplicable("the model has no generate")
        rows = num_ids(model)
        known = sorted({i for i in tokenizer.get_vocab().values() if i < rows})
        if not known:
            raise NotRun("the tokenizer has no id that the embedding has")
        try:
            out = _sample(model, known)
        except Exception as error:
            return failed("generate raises", "8 tokens", [{"note": first_line(error)}])
    special = set(tokenizer.all_special_ids)
    plain = [token for token in out if token not in special]
    try:
        text = tokenizer.decode(plain)
        again = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    except Exception as error:
        return failed("sampled ids cannot be decoded", "text", [{"ids": out, "note": first_line(error)}])
    if len(plain) > 2 and not text:
        return failed("sampled ids decode to nothing", "text", [{"ids": plain, "note": "sampled ids"}])
    if beyond := [i for i in again if i >= rows]:
        note = f"the embedding has {rows} rows"
        return failed("sampled text is encoded by ids without a row", "0", [{"ids": beyond, "note": note}])
    return passed(f"{len(out)} sampled tokens decode to {len(text)} characters, which {len(again)} ids encode", "text")


def _sample(model: Any, known: list[int]) -> list[int]:
    """Eight ids out of `known`."""
    from transformers import GenerationConfig, LogitsProcessorList

    def only_known(ids: Tensor, scores: Tensor) -> Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, places] = scores[:, places]
        return allowed

    places = torch.tensor([i for i in known if i < text_config(model).vocab_size] or known)
    prompt = draw_ids(model, 1, 4)
    bare(model).generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=8, pad_token_id=0)
    holder = model if hasattr(model, "generate") else bare(model)
    out = holder.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=LogitsProcessorList([only_known]),
    )
    return out[0, prompt.shape[1] :].tolist()
