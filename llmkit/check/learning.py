"""Can it learn: the first loss, one batch learned by heart, the same run twice, a sample that decodes.

Owns the catch-all checks of tier 2: whatever is broken on the way from a row to an update shows here, without a name.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .forward import accepts, bare, draw_ids, logits_of, text_config
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject, without_dropout

STEPS, RATES = 80, (1e-2, 5e-2, 2e-3)  # 5e-2: models that divide their logits by a constant learn slowly
LEARNED, HOPELESS = 0.1, 0.5  # nats per token; share of the first loss


@check("initial-loss", family="learning", tier=2, catalogue="K32")
def initial_loss(subject: Subject) -> Outcome:
    """A fresh model is not undecided: its first loss is not ln V.

    Symptom: the first hundred steps are spent on unlearning the initialisation, or the loss explodes.
    Example: embeddings drawn N(0, 1) under a tied head; an init that a custom class never gets.
    Detected: loss on random ids of the model as it was initialised, against ln V; deviation of its logits.
    Tolerance: ln V +- 0.5 nats, logits' deviation below 1.5.
    Spares: weights that were trained; a head of zeros gives exactly ln V.
    Fix: draw matrices with initializer_range (0.02); look at whether `_init_weights` reaches every module.
    Sources: litgpt#1150, transformers#38987, fastai#2090.
    """
    subject.need("model")
    if not subject.is_scratch:
        raise NotApplicable("not known to start from scratch")
    model = subject.model if subject.model is not None else None
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
    size = logits.shape[-1]
    loss = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    spread = float(logits.std())
    measured = f"loss {loss:.3f}, ln {size} = {math.log(size):.3f}, logits' deviation {spread:.2f}"
    limit = "ln V ± 0.5, deviation 1.5"
    if abs(loss - math.log(size)) <= 0.5 and spread < 1.5:
        return passed(measured, limit)
    stds = [(float(p.detach().std()), name) for name, p in model.named_parameters() if p.ndim > 1]
    evidence = [{"note": f"{name}: deviation {std:.3g}"} for std, name in sorted(stds, reverse=True)[:3]]
    return failed(measured, limit, evidence)


@check("moe-balance-void", family="learning", tier=2, catalogue="K32")
def moe_balance_void(subject: Subject) -> Outcome:
    """The loss that should spread tokens over experts does not see a collapse.

    Symptom: a few experts take all tokens, the others stay as they were drawn.
    Example: softmax applied twice to the router's logits; a coefficient that never enters the loss.
    Detected: the auxiliary loss with routers of zero weight (undecided) and of huge weight on one repeated token
        (collapsed): it must rise by E / 2k; and the loss must contain coefficient times it.
    Tolerance: half of the exact ratio E / k; the coefficient to 1 %.
    Spares: routers balanced by a bias, without auxiliary loss (DeepSeek-V3); dense models.
    Fix: give `load_balancing_loss_func` raw router logits, and add `router_aux_loss_coef * aux_loss` to the loss.
    Sources: transformers#45120, Megatron-LM#1984, transformers#28505.
    """
    subject.need("model")
    with subject.small_model() as model, without_dropout(model), torch.no_grad():
        config = text_config(model)
        experts = next((n for k in ("num_local_experts", "num_experts") if (n := getattr(config, k, None))), None)
        chosen = getattr(config, "num_experts_per_tok", None)
        coefficient = getattr(config, "router_aux_loss_coef", None)
        if not experts or not chosen or coefficient is None or not accepts(model, "output_router_logits"):
            raise NotApplicable("no mixture of experts with an auxiliary loss")
        ids = draw_ids(model, 1, 1).expand(2, 16).contiguous()
        routers = [
            p
            for n, p in model.named_parameters()
            if ("router" in n or "gate" in n) and p.shape[0] == experts and p.ndim <= 2
        ]
        if not routers:
            raise NotRun("no router weights found")
        values = []
        for factor in (0.0, 1e4):
            for p in routers:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * factor)
            out = model(input_ids=ids, labels=ids, output_router_logits=True)
            if getattr(out, "aux_loss", None) is None:
                raise NotApplicable("the model returns no auxiliary loss")
            logits = out.logits.float()
            plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            values.append((float(out.aux_loss), float(out.loss - plain)))
    (low, _), (high, extra) = values
    ratio, wanted = high / max(low, 1e-9), experts / chosen
    measured = (
        f"collapsed / undecided {ratio:.2f} (exact {wanted:.1f}), in the loss {extra:.3g} of {coefficient * high:.3g}"
    )
    if ratio < wanted / 2:
        return failed(
            measured, f"{wanted / 2:.1f}", [{"note": f"auxiliary loss {low:.3g} undecided, {high:.3g} collapsed"}]
        )
    if abs(extra - coefficient * high) > 0.01 * coefficient * high + 1e-4:
        return failed(measured, "the coefficient times it", [{"note": f"router_aux_loss_coef {coefficient}"}])
    return passed(measured, f"{wanted / 2:.1f}")


def _own_batch(subject: Subject, model: Any) -> dict[str, Tensor]:
    """Four random rows that end in EOS, all tokens trained; what is learned where there is no trainer."""
    ids = draw_ids(model, 4, 12)
    eos = getattr(text_config(model), "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) else eos
    if isinstance(eos, int) and 0 <= eos < model.get_input_embeddings().num_embeddings:
        ids[:, -1] = eos
    return {"input_ids": ids, "labels": ids.clone()}


def _backward(subject: Subject, model: Any, batch: dict[str, Any]) -> float:
    """Loss of the batch, gradients in the model; by the trainer where there is one."""
    if subject.training is not None:
        return subject.training.backward(model, [batch])
    model.zero_grad(set_to_none=True)
    model.train()
    if accepts(model, "labels"):
        inputs = dict(batch) | ({"use_cache": False} if accepts(model, "use_cache") else {})
        out = model(**inputs)
        loss = out.loss if hasattr(out, "loss") else out[0]
    else:
        logits = logits_of(model, batch["input_ids"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def _learn(subject: Subject, model: Any, batch: dict[str, Any], rate: float) -> list[float]:
    """AdamW of our own on one batch, clipped, until it is learned: losses in nats per trained token."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))
    losses: list[float] = []
    for step in range(STEPS):
        losses.append(_backward(subject, model, batch))
        if not math.isfinite(losses[-1]) or losses[-1] < LEARNED / 2:
            break
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5) * (1 - 0.9 * step / STEPS)
        optimizer.step()
    return losses


@check("does-not-overfit", family="learning", tier=2, catalogue="K33")
def does_not_overfit(subject: Subject) -> Outcome:
    """One batch cannot be learned by heart.

    Symptom: the loss falls and then stays, whatever the rate: something on the way from row to update is broken.
    Example: a gradient that is detached, labels shifted twice, targets that are not in the inputs.
    Detected: four rows, trained with the trainer's own loss (the model's where there is no trainer) by an AdamW of our
        own on redrawn weights; the loss must go to about 0; then `generate` must write an answer word for word and
        stop.
    Tolerance: below 0.1 nats, or 99 % of the trained tokens predicted, is learned; a fail only where less than 90 % are
        at every learning rate that is tried, or generation differs although every token is predicted.
    Spares: losses with a floor (label smoothing, auxiliary losses): their tokens are predicted all the same.
    Fix: look at labels-misaligned, no-gradient and eos-not-trained first; then compare logits with and without cache.
    Sources: the practice of overfitting one batch before anything else.
    """
    subject.need("model")
    best: list[float] = []
    hits: float | None = None
    wrong: dict[str, Any] | None = None
    keep = subject.training is not None
    with subject.small_model(keep_vocabulary=keep) as model:
        batch = _batch(subject, model, 4)
    for rate in RATES:
        with subject.small_model(keep_vocabulary=keep) as model, without_dropout(model):
            losses = _learn(subject, model, batch, rate)
            if not best or losses[-1] < best[-1]:
                best, hits = losses, _share_predicted(model, batch)
                wrong = _generates_otherwise(subject, model, batch) if hits == 1 else None
        if best[-1] < LEARNED:
            break
    predicted = "" if hits is None else f", {hits:.0%} of the trained tokens predicted"
    measured = f"loss {best[0]:.2f} -> {best[-1]:.3f} in {len(best)} steps{predicted}"
    limit = f"{LEARNED} nats, or every token predicted"
    is_hopeless = best[-1] > HOPELESS * best[0] if hits is None else hits < 0.9
    if not math.isfinite(best[-1]) or is_hopeless:
        return failed(measured, limit, [{"note": f"learning rates {RATES} were tried"}])
    if best[-1] > LEARNED and (hits or 0) < 0.99:
        return warned(measured, limit, fix="a loss with a floor (smoothing, auxiliary terms) may end here")
    if wrong:
        return failed(f"{measured}; {wrong['note']}", "word for word, then stop", [wrong])
    return passed(f"{measured}, and generated word for word", limit)


def _batch(subject: Subject, model: Any, count: int) -> dict[str, Any]:
    """The trainer's own rows, or four random ones."""
    if subject.training is None:
        return _own_batch(subject, model)
    device, batch = next(model.parameters()).device, subject.training.batches(1, count)[0]
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def _share_predicted(model: Any, batch: dict[str, Any]) -> float | None:
    """Of the trained tokens, how many a plain forward finds likeliest; None for batches of another kind."""
    if not {"input_ids", "labels"} <= batch.keys():
        return None
    model.eval()
    positions = batch.get("position_ids")
    logits = logits_of(model, batch["input_ids"], batch.get("attention_mask"), positions)
    labels = batch["labels"][:, 1:]
    is_trained = labels != -100
    return float((logits[:, :-1].argmax(-1) == labels)[is_trained].float().mean())


@torch.no_grad()
def _generates_otherwise(subject: Subject, model: Any, batch: dict[str, Any]) -> dict[str, Any] | None:
    """What `generate` writes instead of the first row's answer; None where it writes the answer, or cannot be asked."""
    inner = bare(model)
    if not hasattr(inner, "generate") or not {"input_ids", "labels"} <= batch.keys() or "position_ids" in batch:
        return None
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        ids, labels = ids[mask[0].bool()], labels[mask[0].bool()]
    trained = (labels != -100).nonzero().flatten()
    if len(trained) == 0:
        return None
    start = max(int(trained[0]), 1)
    run = 0  # the first stretch of trained tokens
    while start + run < len(labels) and labels[start + run] != -100:
        run += 1
    answer = ids[start : start + run]
    model.eval()
    predicted = logits_of(model, ids[None])[0, start - 1 : start + run - 1].argmax(-1)
    if not torch.equal(predicted, answer):
        return None
    config = getattr(inner, "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    stops = set(stops) if isinstance(stops, list) else {stops}
    if subject.tokenizer is not None and subject.tokenizer.eos_token_id is not None:
        stops.add(subject.tokenizer.eos_token_id)
    stops = {s for s in stops if isinstance(s, int)}
    try:
        out = inner.generate(
            input_ids=ids[None, :start], attention_mask=torch.ones_like(ids[None, :start]), do_sample=False,
            num_beams=1, max_new_tokens=run + 4, pad_token_id=0, **({"eos_token_id": sorted(stops)} if stops else {}),
        )[0, start:]  # fmt: skip
    except Exception:
        return None
    ends = [i for i, token in enumerate(answer.tolist()) if token in stops]
    expected = answer[: ends[0] + 1] if ends else answer
    if not torch.equal(out[: len(expected)], expected):
        first = int((out[: len(expected)] != expected[: len(out)]).nonzero()[0]) if len(out) else 0
        return {"row": 0, "position": start + first, "ids": out[:16].tolist(), "note": "generate writes another token"}
    if ends and len(out) > len(expected):
        return {"row": 0, "position": start + len(expected), "ids": out.tolist()[-6:], "note": "generate does not stop"}
    return None


@check("same-seed-differs", family="learning", tier=2, catalogue="K33")
def same_seed_differs(subject: Subject) -> Outcome:
    """The same seed gives another run.

    Symptom: a result cannot be reproduced, and a bug cannot be told from chance.
    Example: dropout or augmentation from a generator that nothing seeds; iteration over a set.
    Detected: the same three steps from the same weights, batch and seed, twice, dropout as it is.
    Tolerance: none: equal in every bit on a CPU; 1e-6 elsewhere.
    Spares: kernels of an accelerator that are not deterministic.
    Fix: take every random number from a seeded generator.
    Sources: the practice of reproducible runs.
    """
    subject.need("model")
    runs: list[list[float]] = []
    for _ in range(2):
        with subject.small_model(keep_vocabulary=subject.training is not None) as model:
            torch.manual_seed(1)
            device = next(model.parameters()).device
            batch = _batch(subject, model, 2)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            losses = []
            for _ in range(3):
                losses.append(_backward(subject, model, batch))
                optimizer.step()
            runs.append(losses)
    gaps = [abs(a - b) for a, b in zip(*runs, strict=True)]
    limit = 0.0 if device.type == "cpu" else 1e-6
    if max(gaps) > limit or any(math.isnan(x) for x in gaps):
        step = next(i for i, gap in enumerate(gaps) if not gap <= limit)
        evidence = [{"position": step, "note": f"losses {runs[0][step]!r} and {runs[1][step]!r}"}]
        return failed(f"losses of two equal runs differ by {max(gaps):.1e}", f"{limit:g}", evidence)
    return passed(f"losses of two equal runs differ by {max(gaps):g}", f"{limit:g}")


@check("sample-does-not-decode", family="learning", tier=2, catalogue="K33")
def sample_does_not_decode(subject: Subject) -> Outcome:
    """A sample from the model does not become text.

    Symptom: generation crashes at the end of a long run, or prints ids that no tokenizer knows.
    Example: a head with other rows than the tokenizer; a `generate` that the custom forward breaks.
    Detected: a few tokens sampled from the redrawn model, restricted to the tokenizer's ids, are decoded.
    Tolerance: none.
    Spares: rows of the head beyond the tokenizer (padding of the vocabulary).
    Fix: make head, embedding and tokenizer of one size; see ids-beyond-embedding.
    Sources: the practice of looking at a sample before training.
    """
    subject.need("model", "tokenizer")
    with subject.small_model(keep_vocabulary=True) as model, torch.no_grad():
        inner, count = bare(model), len(subject.tokenizer)
        if not hasattr(inner, "generate"):
            raise NotApplicable("the model has no generate")
        prompt = draw_ids(model, 1, 4)
        with contextlib.suppress(AttributeError):
            count = min(count, inner.get_input_embeddings().num_embeddings)
        beyond = list(range(count, inner.get_input_embeddings().num_embeddings))
        out = inner.generate(
            input_ids=prompt % count, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=True, top_k=0,
            pad_token_id=0, **({"suppress_tokens": beyond} if beyond and len(beyond) < 5000 else {}),
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
    known = [token for token in out if token < count]
    text = subject.tokenizer.decode(known)
    if not isinstance(text, str) or (
        len(known) > 2 and not text and not set(known) <= set(subject.tokenizer.all_special_ids)
    ):
        return failed("sampled ids decode to nothing", "text", [{"ids": known, "note": "sampled ids"}])
    return passed(f"{len(known)} sampled tokens decode to {len(text)} characters", "text")
