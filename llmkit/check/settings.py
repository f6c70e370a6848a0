"""Settings that contradict each other, the model or its configuration. Nothing is run but constructors.

Owns the tier-0 lint but for positions (`positions.py`). Leaves out settings that older versions called otherwise, and
what only behaviour shows.
"""

import inspect
from typing import Any

from torch import Tensor

from .forward import bare, text_config
from .positions import HALVES, some_model  # whose checks are of this family as well
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, Subject

LOWER = ("loss", "perplexity", "ppl", "nll", "bpb", "wer", "cer", "error", "mse", "mae", "rmse")
HIGHER = ("accuracy", "acc", "f1", "bleu", "rouge1", "rouge2", "rougel", "match", "precision", "recall", "auc", "mcc")


# weights


@check("tied-head-mismatch", family="settings", tier=0, catalogue="K7")
def tied_head_mismatch(subject: Subject) -> Outcome:
    """The configuration says that head and embedding are one tensor, and they are two, or the other way round.

    Symptom: a trained head is lost when the model is saved and loaded, or comes back random.
    Example: `model.lm_head = nn.Linear(...)` on a tied model; a PEFT `modules_to_save=["lm_head"]` on one.
    Detected: `tie_word_embeddings` against whether both weights share their memory in the live model.
    Tolerance: none. A head that an adapter copied: a warning.
    Spares: models without a head, quantised heads, weights on the meta device.
    Fix: set tie_word_embeddings to what the model does before it is saved; `model.tie_weights()` where it should.
    Sources: transformers#43429, transformers#45079, vec2text#94.
    """
    with some_model(subject) as model:
        return _tied_as_configured(model, model.config)


def _tied_as_configured(base: Any, config: Any) -> Outcome:
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    words = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    is_copied = any(hasattr(m, "modules_to_save") and hasattr(m, "original_module") for m in (head, words))
    is_copied = is_copied and getattr(head, "weight", None) is not getattr(words, "weight", 0)  # unless both follow it
    head, words = (getattr(m, "original_module", m) for m in (head, words))
    a, b = (getattr(getattr(m, "base_layer", m), "weight", None) for m in (head, words))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise NotApplicable("the model has no output embedding")
    if "meta" in (a.device.type, b.device.type) or not (a.is_floating_point() and b.is_floating_point()):
        raise NotApplicable("head or embedding is quantised or not loaded")
    declared = bool(getattr(config, "tie_word_embeddings", False))
    declared = declared or bool(getattr(text_config(config), "tie_word_embeddings", False))
    is_tied = a.data_ptr() == b.data_ptr()
    limit = f"tie_word_embeddings={declared}"
    if declared != is_tied:
        what = "head and embedding are " + ("one tensor" if is_tied else "two tensors")
        shapes = [{"note": f"head {tuple(a.shape)}, embedding {tuple(b.shape)}"}]
        return failed(what, limit, shapes)
    if is_tied and is_copied:
        return warned("an adapter trains a copy of one of two tied tensors: merging must untie them", limit)
    return passed("head and embedding are " + ("one tensor" if is_tied else "two tensors"), limit)


@check("bf16-swallows-updates", family="settings", tier=0, catalogue="K7")
def bf16_swallows_updates(subject: Subject) -> Outcome:
    """The learning rate is smaller than half a step of the 16-bit weights.

    Symptom: the loss stalls early; most weights never change.
    Example: from_pretrained loads bfloat16, AdamW at 1e-6: a weight of 0.02 moves in steps of 1.2e-4.
    Detected: `learning_rate`, which is what an Adam step moves a weight by, against half the distance to the next
        representable number, over a sample of the trained weights.
    Tolerance: a warning where more than half of the weights could not move.
    Spares: float32 weights, adapters in float32, optimisers that are not of Adam's kind. `update-lost-in-rounding`
        measures it with the optimiser itself (stochastic rounding, float32 copies).
    Fix: load with dtype=float32 and train with bf16=True, train an adapter, or raise the rate.
    Sources: ml-by-hand#85, pytorch/ao#1124, torchtune#2254.
    """
    subject.need("settings")
    rate = subject.settings.get("learning_rate")
    if subject.model is None or not rate:
        raise NotApplicable("no live model with a learning rate")
    if "adam" not in str(subject.settings.get("optim") or "adamw"):
        raise NotApplicable("not an optimiser of Adam's kind")
    trained = [p for p in subject.model.parameters() if p.requires_grad and p.numel()]
    halves = [p for p in trained if p.dtype in HALVES and p.device.type != "meta"]
    if not halves or sum(p.numel() for p in halves) * 2 < sum(p.numel() for p in trained):
        raise NotApplicable("the trained weights are not in a 16-bit format")
    stuck = sum(p.numel() * _share_stuck(p, float(rate)) for p in halves) / sum(p.numel() for p in halves)
    limit = "at most half of the weights"
    what = f"at rate {rate:.1e} an update is rounded away in {stuck:.0%} of the {str(halves[0].dtype)[6:]} weights"
    return warned(what, limit) if stuck > 0.5 else passed(what, limit)


def _share_stuck(p: Tensor, rate: float) -> float:
    sample = p.detach().flatten()[:: max(p.numel() // 1000, 1)].float()
    sample = sample[sample != 0].abs()
    if not sample.numel():
        return 0.0
    step = 2.0 ** (sample.log2().floor() - HALVES[p.dtype])
    return float((rate < step / 2).float().mean())


# a trainer's settings


@check("lora-with-reentrant-checkpointing", family="settings", tier=0, catalogue="K7")
def lora_with_reentrant_checkpointing(subject: Subject) -> Outcome:
    """Reentrant checkpointing under an adapter, and no input that requires a gradient.

    Symptom: adapters get no gradient; the loss does not fall.
    Example: layers checkpointed with use_reentrant=True by hand, over frozen embeddings.
    Detected: whether checkpointing is reentrant (in the settings, or on layers where it is on already), and whether the
        input embedding is trained or hooked (`enable_input_require_grads`), or will be by the trainer.
    Tolerance: a warning; `lora-gets-no-gradient` measures it.
    Spares: use_reentrant=False, trained embeddings, checkpointing that the trainer turns on: transformers then asks the
        inputs for a gradient.
    Fix: `gradient_checkpointing_kwargs={"use_reentrant": False}`, or `model.enable_input_require_grads()`.
    Sources: transformers#26221, peft#1142, open-unlearning#178.
    """
    given, model = subject.settings, subject.model
    if model is None or not hasattr(model, "peft_config"):
        raise NotApplicable("no adapter on a live model")
    base = bare(model)
    by_trainer = bool(given.get("gradient_checkpointing") or given.get("activation_checkpointing"))
    options = given.get("activation_checkpointing_kwargs") or given.get("gradient_checkpointing_kwargs") or {}
    on = [m for m in base.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in on]
    by_hand = any((getattr(f, "keywords", None) or {}).get("use_reentrant") for f in functions)
    if not by_trainer and not on:
        raise NotApplicable("no checkpointing")
    limit = "use_reentrant=False, or inputs that require a gradient"
    if not by_hand and not (by_trainer and options.get("use_reentrant")):
        return passed("checkpointing is not reentrant", limit)
    words = base.get_input_embeddings()
    if words._forward_hooks or any(p.requires_grad for p in words.parameters()):
        return passed("reentrant, and the inputs require a gradient", limit)
    is_asked = type(base).enable_input_require_grads.__module__.startswith("transformers.")
    if by_trainer and is_asked:
        return passed("reentrant; the inputs will require a gradient when the trainer turns it on", limit)
    return warned("reentrant, and the embedded inputs require no gradient", limit)


@check("packing-without-isolation", family="settings", tier=0, catalogue="K7")
def packing_without_isolation(subject: Subject) -> Outcome:
    """Documents are packed into one row and nothing tells the model where they end.

    Symptom: answers leak from one document into the next; quality falls with the number of documents per row.
    Example: packing=True for a model whose forward knows no position_ids; a collator that adds an attention mask.
    Detected: a batch of the trainer's collator holds positions (or document numbers) and no mask, which would turn
        the isolation off, and the model's forward takes them.
    Tolerance: a warning: how the model uses them is measured by the packing checks of its forward pass.
    Spares: packing_strategy="wrapped" (documents are joined on purpose), no packing.
    Fix: keep the trainer's own collator (padding_free), or an attention implementation that reads cu_seq_lens.
    Sources: axolotl#3796, functionary#132, ms-swift#4736, trl#3526.
    """
    subject.need("settings", "training", "config")
    given = subject.settings
    if not given.get("packing") and not given.get("padding_free"):
        raise NotApplicable("no packing")
    if given.get("packing") and given.get("packing_strategy") == "wrapped":
        raise NotApplicable("packing_strategy=wrapped: documents are joined on purpose")
    batch = subject.training.batches(1, 1)[0]
    model = bare(subject.model)
    known = set(inspect.signature(type(model).forward).parameters) if model is not None else {"position_ids"}
    marks = [k for k in ("position_ids", "seq_idx", "cu_seq_lens_q") if batch.get(k) is not None]
    limit = "position_ids and no attention_mask"
    if not marks:
        return warned(f"a packed batch holds {', '.join(sorted(batch))} alone", limit)
    if isinstance(batch.get("attention_mask"), Tensor) and batch["attention_mask"].ndim == 2:
        return warned("an attention_mask beside position_ids turns the isolation off", limit)
    if not known & {"position_ids", "seq_idx"}:
        return warned(f"{type(model).__name__}.forward takes no position_ids", limit)
    return passed(f"a packed batch holds {', '.join(marks)}", limit)


@check("best-metric-inverted", family="settings", tier=0, catalogue="K7")
def best_metric_inverted(subject: Subject) -> Outcome:
    """The checkpoint that is kept as the best one is the worst.

    Symptom: the final model is worse than every other checkpoint; early stopping stops at once.
    Example: metric_for_best_model="eval_perplexity" (greater_is_better becomes True, since it does not end in loss).
    Detected: the last word of `metric_for_best_model` against `greater_is_better`.
    Tolerance: none; a name that says nothing is passed over.
    Spares: metrics of the user's own, and settings where nothing is chosen by a metric.
    Fix: set greater_is_better=False for losses, perplexities and error rates, True for accuracies and scores.
    Sources: transformers#31142, unsloth-zoo#1011, transformers#40221.
    """
    subject.need("settings")
    metric, greater = subject.settings.get("metric_for_best_model"), subject.settings.get("greater_is_better")
    if not metric or greater is None:
        raise NotApplicable("nothing is chosen by a metric")
    words = str(metric).lower().replace("/", "_").replace("-", "_").split("_")
    limit = f"greater_is_better={greater}"
    last = next((w for w in reversed(words) if w in LOWER + HIGHER), None)
    if last is None:
        raise NotApplicable(f"whether more of {metric} is better cannot be told from its name")
    if (last in LOWER) == bool(greater):
        return failed(f"{metric} is better when it is {'lower' if last in LOWER else 'higher'}", limit)
    return passed(f"{metric}: {'lower' if last in LOWER else 'higher'} is better", limit)
