"""Bugs of optimisers, schedules, resuming and evaluation."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import bpe_tokenizer, chat_rows, llama, lm_trainer, sft_trainer, text_rows
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from trl import SFTTrainer

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant

Patch = pytest.MonkeyPatch


def lm(cls: type = Trainer, model: Any = None, optimizer: Any = None, scheduler: Any = None, **options: Any) -> Subject:
    trainer = lm_trainer(cls=cls, model=model, **options)
    trainer.optimizer, trainer.lr_scheduler = optimizer, scheduler
    return from_parts(trainer)


# what the optimiser holds


@plant("optimizer-before-adapter", caught_by="parameter-not-in-optimizer", bug="O3", evidence="lora_")
def optimizer_before_adapter(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The optimiser is built from the model's parameters before SFTTrainer puts the adapter on."""
    from tiny import Dataset, arguments
    from trl import SFTConfig

    model, config = llama(), LoraConfig(r=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if not is_planted:
        model = get_peft_model(model, config)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(chat_rows()),
        processing_class=bpe_tokenizer(),
        peft_config=config if is_planted else None,
        optimizers=(optimizer, None),
    )
    return from_parts(trainer)


@plant("optimizer-of-another-copy", caught_by="weights-do-not-move", bug="O3", evidence="embed_tokens")
def optimizer_of_another_copy(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The optimiser holds the parameters of a deep copy of the model."""
    model = llama(eos_token_id=2)
    held = copy.deepcopy(model) if is_planted else model
    return lm(model=model, optimizer=torch.optim.AdamW(held.parameters(), lr=1e-3))


class OnlyMatrices(Trainer):
    """Names that the filter forgets are trained by nobody."""

    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if "embed" in n or "proj" in n]
            self.optimizer = torch.optim.AdamW([p for _, p in named], lr=self.args.learning_rate)
        return self.optimizer


@plant("parameters-left-out", caught_by="parameter-not-in-optimizer", bug="O3", evidence="norm.weight")
def parameters_left_out(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A filter by name leaves norms and head out of the optimiser."""
    return lm(OnlyMatrices if is_planted else Trainer)


@plant("half-of-the-weights-stand-still", caught_by="weights-do-not-move", bug="O3", evidence="lm_head")
def half_of_the_weights_stand_still(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A second group, with its rate left at zero."""
    model = llama(eos_token_id=2)
    head = [model.lm_head.weight]
    rest = [p for p in model.parameters() if p is not model.lm_head.weight]
    rate = 0.0 if is_planted else 1e-3
    return lm(model=model, optimizer=torch.optim.AdamW([{"params": rest}, {"params": head, "lr": rate}], lr=1e-3))


class ByType(Trainer):
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            norms = {id(p) for m in self.model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
            decay = [p for p in self.model.parameters() if id(p) not in norms]
            rest = [p for p in self.model.parameters() if id(p) in norms]
            groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


@plant("decay-by-type", caught_by="decay-on-norms", bug="O1", status="warn", evidence="layernorm")
def decay_by_type(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The filter knows nn.LayerNorm, the model has an RMSNorm."""
    return lm(ByType if is_planted else Trainer, weight_decay=0.1)


@plant("pure-bf16-small-rate", caught_by="update-lost-in-rounding", bug="P1", status="warn", evidence="bfloat16")
def pure_bf16_small_rate(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """bfloat16 weights and a rate of 1e-6; the twin's rate is large enough."""
    return lm(model=llama(eos_token_id=2).bfloat16(), learning_rate=1e-6 if is_planted else 5e-3)


class Thawing(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *given: Any, **kwargs: Any) -> Any:
        model.requires_grad_(True)
        return super().compute_loss(model, inputs, *given, **kwargs)


def _frozen_embedding() -> Any:
    model = llama(eos_token_id=2)
    model.model.embed_tokens.requires_grad_(False)
    return model


@plant("thawed-in-the-step", caught_by="frozen-parameter-moves", bug="O4", evidence="embed_tokens")
def thawed_in_the_step(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """requires_grad_(True) in the loss, and an optimiser that was built before the freeze."""
    model = llama(eos_token_id=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.model.embed_tokens.requires_grad_(False)
    return lm(Thawing if is_planted else Trainer, model=model, optimizer=optimizer)


class Clamping(Trainer):
    def training_step(self, *given: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(0.999)  # a weight decay of one's own, on everything
        return super().training_step(*given, **kwargs)


@plant("decay-of-frozen-weights", caught_by="frozen-parameter-moves", bug="O4", evidence="embed_tokens")
def decay_of_frozen_weights(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A decay in the step shrinks every parameter, frozen ones too."""
    return lm(Clamping if is_planted else Trainer, model=_frozen_embedding())


@plant("tied-head-trained-alone", caught_by="frozen-parameter-moves", bug="F6", status="warn", evidence="lm_head")
def tied_head_trained_alone(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Only lm_head is trained, and it is the input embedding too."""
    model = llama(eos_token_id=2, tie_word_embeddings=is_planted)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return lm(model=model)


@plant("detached-mlp", caught_by="no-gradient", bug="F1", evidence="gate_proj")
def detached_mlp(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A detach that was there for debugging, in training mode only."""
    forward = LlamaMLP.forward

    def detached(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x).detach() if self.training else forward(self, x)

    if is_planted:
        patch.setattr(LlamaMLP, "forward", detached)
    return lm()


def _reentrant(model: Any, is_planted: bool, patch: Patch) -> Subject:
    """What older versions did: checkpointing is turned on and nobody asks the inputs for a gradient."""
    if is_planted:
        patch.setattr(PreTrainedModel, "enable_input_require_grads", lambda self: None)
    options = {"use_reentrant": True}
    return lm(model=model, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)


@plant("reentrant-checkpointing", caught_by="lora-gets-no-gradient", bug="F1", evidence="grad")
def reentrant_checkpointing(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A PEFT model under reentrant checkpointing in a plain Trainer."""
    return _reentrant(get_peft_model(llama(eos_token_id=2), LoraConfig(r=4)), is_planted, patch)


@plant("reentrant-beside-a-head", caught_by="lora-gets-no-gradient", bug="F1", evidence="lora_")
def reentrant_beside_a_head(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The head is trained as well, so backward finds something to do and says nothing."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    return _reentrant(get_peft_model(llama(eos_token_id=2), config), is_planted, patch)


@plant("layers-checkpointed-by-hand", caught_by="lora-gets-no-gradient", bug="F1", evidence="lora_")
def layers_checkpointed_by_hand(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Every layer goes through a reentrant checkpoint of one's own, with a trained final norm after it."""
    model = get_peft_model(llama(eos_token_id=2), LoraConfig(r=4, modules_to_save=["norm"]))
    forward = LlamaDecoderLayer.forward

    def checkpointed(self: Any, hidden_states: torch.Tensor, *given: Any, **kwargs: Any) -> Any:
        if not self.training:
            return forward(self, hidden_states, *given, **kwargs)
        again = functools.partial(forward, self, **kwargs)
        return checkpoint(again, hidden_states, *given, use_reentrant=is_planted)

    patch.setattr(LlamaDecoderLayer, "forward", checkpointed)
    return lm(model=model)


class ClipPerTensor(Trainer):
    def _clip_grad_norm(self, model: Any) -> Any:
        norms = [torch.nn.utils.clip_grad_norm_(p, self.args.max_grad_norm) for p in model.parameters()]
        return torch.stack(norms).norm()


@plant("clip-per-tensor", caught_by="clipping-wrong", bug="O5", evidence="norm")
def clip_per_tensor(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Every tensor is clipped by itself."""
    return lm(ClipPerTensor if is_planted else Trainer, max_grad_norm=0.5)


# the schedule


class EpochHorizon(Trainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(int(self.args.num_train_epochs), optimizer)


@plant("horizon-in-epochs", caught_by="learning-rate-off-plan", bug="O2", evidence="zero")
def horizon_in_epochs(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The schedule's horizon is the number of epochs, so that the rate is zero after four steps."""
    return lm(EpochHorizon if is_planted else Trainer, max_steps=-1, num_train_epochs=4)


class MicroBatchHorizon(Trainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(num_training_steps * self.args.gradient_accumulation_steps, optimizer)


@plant("horizon-in-micro-batches", caught_by="learning-rate-off-plan", bug="O2", evidence="of the peak")
def horizon_in_micro_batches(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The schedule counts micro-batches: a quarter of the decay happens."""
    options = dict(gradient_accumulation_steps=4, lr_scheduler_type="cosine", max_steps=40)
    return lm(MicroBatchHorizon if is_planted else Trainer, **options)


@plant("cosine-climbs-again", caught_by="learning-rate-off-plan", bug="O2", evidence="rises")
def cosine_climbs_again(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """CosineAnnealingLR whose T_max is shorter than the run goes up and down."""
    model = llama(eos_token_id=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10 if is_planted else 40)
    return lm(model=model, optimizer=optimizer, scheduler=scheduler, max_steps=40)


class StepsInEveryMicroBatch(Trainer):
    def training_step(self, *given: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*given, **kwargs)
        self.lr_scheduler.step()
        return loss


@plant("scheduler-in-every-micro-batch", caught_by="learning-rate-not-per-step", bug="O2", evidence="planned")
def scheduler_in_every_micro_batch(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """scheduler.step() in training_step, besides the trainer's own."""
    return lm(StepsInEveryMicroBatch if is_planted else Trainer, gradient_accumulation_steps=2)


# resuming


class SeededInTheLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        generator, batch = torch.Generator().manual_seed(0), self.args.train_batch_size
        return DataLoader(
            self.train_dataset, batch_size=batch, shuffle=True, generator=generator, collate_fn=self.data_collator
        )


@plant("loader-with-its-own-generator", caught_by="resume-data-order", bug="R1", evidence="step")
def loader_with_its_own_generator(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A loader whose generator starts at the first epoch's order in every process."""
    return lm(SeededInTheLoader if is_planted else Trainer)


@plant("nothing-is-skipped", caught_by="resume-data-order", bug="R1", evidence="step")
def nothing_is_skipped(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A resumed epoch starts with its first batch again."""
    if is_planted:
        patch.setattr("transformers.trainer.skip_first_batches", lambda loader, count: loader)
    return lm()


class GlobalOrder(Trainer):
    def get_train_dataloader(self) -> Any:
        order = torch.randperm(len(self.train_dataset)).tolist()
        batch, collate = self.args.train_batch_size, self.data_collator
        return DataLoader(self.train_dataset.select(order), batch_size=batch, shuffle=True, collate_fn=collate)


@plant("order-from-the-global-seed", caught_by="resume-data-order", bug="R1", evidence="step")
def order_from_the_global_seed(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A loader of one's own shuffles by the global random state."""
    return lm(GlobalOrder if is_planted else Trainer)


class EpochSampler(Sampler):
    """Counts epochs by itself; a new process counts from 0 again."""

    def __init__(self, size: int, is_counting: bool):
        self.size, self.is_counting, self.epoch = size, is_counting, 0

    def __iter__(self) -> Any:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += self.is_counting
        return iter(order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch if not self.is_counting else self.epoch

    def __len__(self) -> int:
        return self.size


class CountsEpochs(Trainer):
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return EpochSampler(len(self.train_dataset), is_counting=True)


class IsToldEpochs(Trainer):
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return EpochSampler(len(self.train_dataset), is_counting=False)


@plant("epoch-counter-restarts", caught_by="resume-data-order", bug="R1", evidence="step")
def epoch_counter_restarts(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A sampler that counts its own epochs begins with the first one's order after a resume."""
    return lm(CountsEpochs if is_planted else IsToldEpochs)


class StartsAnew(Trainer):
    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            self._load_from_checkpoint(resume_from_checkpoint)
        return super().train(**kwargs)


@plant("resume-loads-weights-alone", caught_by="resume-data-order", bug="R1", evidence="step")
def resume_loads_weights_alone(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Resuming loads the weights and begins with the first row."""
    return lm(StartsAnew if is_planted else Trainer)


class FreshScheduler(Trainer):
    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            for group in self.optimizer.param_groups:
                group.pop("initial_lr", None)
                group["lr"] = self.args.learning_rate
            self.lr_scheduler = None
            self.create_scheduler(self.args.max_steps, self.optimizer)


@plant("scheduler-restarts", caught_by="resume-learning-rate", bug="R3", evidence="step 5")
def scheduler_restarts(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A new scheduler with last_epoch=-1 after every resume."""
    return lm(FreshScheduler if is_planted else Trainer, warmup_steps=2)


class DropsOptimizer(Trainer):
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        (Path(output_dir) / "optimizer.pt").unlink()


@plant("optimizer-deleted-to-save-room", caught_by="resume-optimizer", bug="R4", evidence="exp_avg")
def optimizer_deleted_to_save_room(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """optimizer.pt is deleted from every checkpoint."""
    return lm(DropsOptimizer if is_planted else Trainer)


class OnlyScheduler(SFTTrainer):
    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint:
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


@plant("optimizer-never-loaded", caught_by="resume-optimizer", bug="R4", evidence="exp_avg")
def optimizer_never_loaded(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """An override loads the scheduler and forgets the optimiser, under an adapter."""
    cls = OnlyScheduler if is_planted else SFTTrainer
    return from_parts(sft_trainer(cls=cls, peft_config=LoraConfig(r=4)))


@plant("random-state-not-restored", caught_by="resume-weights", bug="R2", evidence="dropout")
def random_state_not_restored(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The random state is not read back, so that dropout masks are others."""
    if is_planted:
        patch.setattr(Trainer, "_load_rng_state", lambda self, checkpoint: None)
    return lm()


class PrefixedCheckpoint(Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        state = {f"_orig_mod.{k}": v for k, v in self.model.state_dict().items()}
        super()._save(output_dir, state)
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, Path(output_dir) / "model.safetensors")


@plant("prefix-on-every-key", caught_by="resume-weights", bug="R5", evidence="after loading")
def prefix_on_every_key(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A compiled model's prefix on every key, and a load that is not strict."""
    return lm(PrefixedCheckpoint if is_planted else Trainer)


class ForgetsAdapter(SFTTrainer):
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        return None


@plant("adapter-not-loaded-on-resume", caught_by="resume-weights", bug="R4", evidence="lora_")
def adapter_not_loaded_on_resume(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The adapter of the checkpoint is not loaded: training goes on from a fresh one."""
    return from_parts(sft_trainer(cls=ForgetsAdapter if is_planted else SFTTrainer, peft_config=LoraConfig(r=4)))


# evaluation


def _with_dropout(**options: Any) -> Any:
    return llama(eos_token_id=2, attention_dropout=0.1, **options)


class OwnEvaluation(Trainer):
    """Loops by itself; `is_careful`: in eval mode, a mean over tokens."""

    is_careful = True

    def evaluate(self, eval_dataset: Any = None, *given: Any, **kwargs: Any) -> dict[str, float]:
        self.model.train(not self.is_careful)
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                count = int((batch["labels"][:, 1:] != -100).sum())
                total += float(self.model(**batch).loss) * count
                tokens += count
        return {"eval_loss": total / tokens}


class CarelessEvaluation(OwnEvaluation):
    is_careful = False


@plant("evaluation-without-eval", caught_by="eval-in-train-mode", bug="E4", evidence="training mode")
def evaluation_without_eval(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A loop of one's own that forgets model.eval()."""
    return lm(CarelessEvaluation if is_planted else OwnEvaluation, model=_with_dropout(), eval_rows=text_rows(12))


class NeverBack(Trainer):
    """Calls model.train() once, before the first step."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


@plant("stays-in-eval-mode", caught_by="eval-in-train-mode", bug="E4", evidence="stay in eval")
def stays_in_eval_mode(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A step without model.train(): after the first evaluation dropout is off for good."""
    return lm(NeverBack if is_planted else Trainer, model=_with_dropout(), eval_rows=text_rows(12))


@plant("functional-dropout-always-on", caught_by="eval-in-train-mode", bug="E4", evidence="differ")
def functional_dropout_always_on(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """F.dropout(x, 0.1), whose default is training=True."""
    forward = LlamaMLP.forward

    def dropping(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(forward(self, x), 0.1)

    if is_planted:
        patch.setattr(LlamaMLP, "forward", dropping)
    return lm(eval_rows=text_rows(12))


def _labels_of_everything(tokenizer: Any) -> Any:
    def collate(rows: list) -> dict[str, Any]:
        batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
        return dict(batch) | {"labels": batch["input_ids"].clone()}

    return collate


@plant("padding-in-the-evaluation", caught_by="eval-depends-on-batch-size", bug="E3", evidence="batches of 1")
def padding_in_the_evaluation(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """labels = input_ids, padding included: the longer the neighbours of a row, the more it counts."""
    tokenizer = bpe_tokenizer(chat=False)
    collator = _labels_of_everything(tokenizer) if is_planted else None
    return lm(collator=collator, tokenizer=tokenizer, eval_rows=text_rows(12))


class MeanOfMeans(OwnEvaluation):
    def evaluate(self, eval_dataset: Any = None, *given: Any, **kwargs: Any) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            losses = [float(self.model(**batch).loss) for batch in self.get_eval_dataloader()]
        return {"eval_loss": sum(losses) / len(losses)}


@plant("mean-of-batch-means", caught_by="eval-depends-on-batch-size", bug="E3", evidence="batches of 1")
def mean_of_batch_means(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Every batch weighs the same, however few tokens it trains."""
    return lm(MeanOfMeans if is_planted else OwnEvaluation, eval_rows=text_rows(13))


class ReportsPerplexity(Trainer):
    base = math.e

    def evaluate(self, *given: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*given, **kwargs)
        return metrics | {"eval_perplexity": self.base ** metrics["eval_loss"]}


class TwoToTheLoss(ReportsPerplexity):
    base = 2.0


@plant("two-to-the-loss", caught_by="perplexity-formula", bug="E6", evidence="perplexity")
def two_to_the_loss(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """2 ** loss, where the loss is in nats."""
    return lm(TwoToTheLoss if is_planted else ReportsPerplexity, eval_rows=text_rows(12))


@plant("constructor-raises", caught_by="trainer-raises", bug="C1", evidence="no assistant tokens")
def constructor_raises(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The trainer's constructor refuses what it is given."""
    subject = from_parts(lm_trainer())
    if is_planted:
        subject.training, subject.failure = None, "SFTTrainer raised RuntimeError: no assistant tokens"
    return subject
