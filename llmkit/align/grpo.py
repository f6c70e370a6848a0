"""Reinforcement on rewards of the model's own answers: GRPO, on TRL's GRPOTrainer, watched for reward hacking.

    llmkit grpo recipes/toy/grpo.yaml

Owns the verb: rewards are tested on answers made up by hand before the first step (`rewards.py`), a verifier that is
never optimised and held-out prompts are measured while it trains (`monitor.py`). A loss near 0 is no fault here: the
advantages of a prompt's answers add up to 0. Leaves out making prompts, tools and environments.
"""

import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..config import UserError
from ..run import Result, Run, resolve_model_dir
from ..tuning import GrpoConfig
from .job import Figures, Job, get_parts, make_job, run
from .lora import grow_embeddings
from .monitor import Monitor
from .preferences import PromptEncoder, as_prompts
from .rewards import CONTEXT, Reward, get_rewards, self_test
from .trainer import without_spare_adapter

# of TRL's: the monitor asks the held-out prompts, before the first step too
NO_EVALUATION: dict[str, Any] = {"eval_strategy": "no", "eval_steps": None, "eval_on_start": False}


def main(config: GrpoConfig) -> Result:
    """Checks the inputs, tests the rewards, trains, writes the run folder. Raises UserError."""
    return run(config, "grpo", prepare)


def check_batches(config: GrpoConfig) -> None:
    """Raises UserError for answers that cannot be dealt out in groups, or checkpoints in the middle of one batch."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = config.steps_per_generation or config.gradient_accumulation_steps
    answers = config.passed_on.get("generation_batch_size") or config.per_device_train_batch_size * world * steps
    if answers % config.num_generations:
        raise UserError(
            f"num_generations={config.num_generations} does not divide the {answers} answers of a generation "
            f"(per_device_train_batch_size {config.per_device_train_batch_size} x {world} processes x {steps} forward "
            "passes); change one of them"
        )
    steps = answers // (config.per_device_train_batch_size * world)
    multiple = Fraction(steps * config.num_iterations, config.gradient_accumulation_steps).numerator
    if config.save_steps and config.save_steps % multiple:
        raise UserError(
            f"save_steps={config.save_steps}: answers are trained on for several steps, and a run that goes on makes "
            f"them anew; write a multiple of {multiple}"
        )


def prepare(config: GrpoConfig, console: Console, started: float = 0.0) -> Job:
    """Rows, tokenizer, model, rewards and trainer of a recipe. Raises UserError."""
    check_batches(config)
    if config.gold_prompts != GrpoConfig().gold_prompts and not (config.eval_datasets or config.test_split_size):
        raise UserError(f"gold_prompts={config.gold_prompts} has no effect without eval_datasets; remove it")
    rewards = load_rewards(config.reward_funcs, config.reward_weights, config)
    gold = load_rewards([config.gold_verifier], None, config)[0] if config.gold_verifier else None
    if gold and gold.name in [reward.name for reward in rewards]:
        raise UserError(
            f"gold_verifier={config.gold_verifier!r} is among reward_funcs: what is optimised says nothing of its own "
            "hacking; name another one, or none"
        )
    from trl import GRPOConfig, GRPOTrainer

    parts = get_parts(config, GRPOConfig, PromptEncoder, **NO_EVALUATION, reward_weights=None)
    num_prompts = parts.args.generation_batch_size // config.num_generations
    if len(parts.data.train) < num_prompts:
        raise UserError(
            f"datasets: {len(parts.data.train)} prompts, and a generation takes {num_prompts}; "
            "lower per_device_train_batch_size, or raise num_generations"
        )
    report = self_test(rewards, [json.loads(text) for text in parts.data.train["raw"][:64]])
    parts.args.reward_weights = [reward.weight for reward in rewards]
    trainer: Any = type("Trainer", (Watched, GRPOTrainer), {})(
        model=parts.model,
        args=parts.args,
        reward_funcs=[for_trl(reward) for reward in rewards],
        train_dataset=as_prompts(parts.data.train),
        processing_class=parts.tokenizer,
    )
    without_spare_adapter(trainer)
    if trainer.ref_model is not None:  # TRL reads it from the disk, where new tokens have no rows
        grow_embeddings(
            trainer.accelerator.unwrap_model(trainer.ref_model), parts.model.get_input_embeddings().weight.shape[0]
        )
    trainer.monitor, trainer.gold = Monitor(rewards, gold), gold
    figures = (["gold", "proxy"] if gold else ["proxy"]) if parts.data.shards else []
    job = make_job("grpo", config, console, parts, trainer, finish, started, figures)
    job.notes += [f"{'rewards' if i == 0 else '':<10}{line}" for i, line in enumerate(report.lines())]
    if gold is None:
        job.notes.append("monitor   no gold_verifier: a reward that is hacked cannot be told from one that works")
    job.callbacks.append(trainer.monitor)
    job.same = {"rewards": [config.reward_funcs, config.reward_weights], "num_generations": config.num_generations}
    return job


class Watched:
    """Comes before TRL's trainer: the monitor sees every batch of answers with its rewards."""

    monitor: Monitor
    gold: Reward | None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)  # type: ignore[misc]
        if not self.model.training:
            return rewards
        gold = None
        if self.gold is not None:
            columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "row")}
            values = self.gold(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **CONTEXT | columns
            )
            gold = self.accelerator.gather(torch.tensor(values, device=rewards.device, dtype=torch.float32))
            gold = gold.double().cpu().numpy()
        all_prompts, all_said, all_ids = (gather_object(x) for x in (prompts, completions, completion_ids))
        figures = self.monitor.see(all_prompts, all_said, all_ids, rewards.double().cpu().numpy(), gold)
        for key, value in figures.items():
            self._metrics["train"][key].append(value)
        return rewards


def finish(job: Job, run: Run, is_best: bool) -> Figures:
    """What the held-out prompts gave at the start and at the end."""
    monitor: Monitor = job.trainer.monitor
    is_old = is_best or monitor.last_step != job.trainer.state.global_step  # ended by an alarm in between
    if is_old and run.is_main and monitor.can_ask:
        model = job.trainer.accelerator.unwrap_model(job.trainer.model)
        measured = monitor.measure(model, job.trainer.state.global_step)
        monitor.last = {key: value for key, value in measured.items() if isinstance(value, float)}
    metrics = {key.removeprefix("eval_"): value for key, value in monitor.last.items()}
    if bests := monitor.start.get("bests"):
        metrics |= {f"{name}_at_start": float(np.mean(bests[0][name])) for name in ("gold", "proxy")}
    metrics["num_alerts"] = len(monitor.alarms.raised)
    return {}, metrics, "ok"


# ---- rewards


def load_rewards(entries: list[Any], weights: list[Any] | None, config: Any) -> list[Reward]:
    """By name, function, or folder of a reward model. Raises UserError."""
    if not entries:
        raise UserError("reward_funcs is missing; name what is rewarded, e.g. reward_funcs: [exact_answer]")
    models = {i: name for i, name in enumerate(entries) if isinstance(name, str) and is_classifier(name)}
    if weights is not None and not all(type(w) in (int, float) and math.isfinite(w) for w in weights):
        raise UserError(f"reward_weights={weights!r}; allowed: numbers, one for each of reward_funcs, or null")
    plain = [entry for i, entry in enumerate(entries) if i not in models]
    if weights is not None and len(weights) != len(entries):
        raise UserError(
            f"reward_weights has {len(weights)} numbers for {len(entries)} reward_funcs; write one for each"
        )
    of = list(weights) if weights is not None else [1.0] * len(entries)
    found = iter(get_rewards(plain, [of[i] for i in range(len(entries)) if i not in models]) if plain else [])
    rewards = [
        model_reward(models[i], float(of[i]), config) if i in models else next(found) for i in range(len(entries))
    ]
    names = [reward.name for reward in rewards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"reward_funcs: two of them would be logged as {twice[0]!r}; rename one, or its run folder")
    return rewards


def is_classifier(name: str) -> bool:
    """A run or model folder whose model gives one score."""
    path = Path(resolve_model_dir(name)) / "config.json"
    if not path.is_file():
        return False
    architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def model_reward(name: str, weight: float, config: Any) -> Reward:
    """The score that a reward model reads at the end of prompt and answer, written in its own chat template."""
    path = resolve_model_dir(name)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=config.trust_remote_code).eval()
    if torch.cuda.is_available() and not config.use_cpu:
        model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.config.pad_token_id = pad

    @torch.no_grad()
    def reward(*, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        rows = []
        for prompt, said in zip(prompts, completions, strict=True):
            if isinstance(prompt, list):
                rows.append(tokenizer.apply_chat_template(prompt + said, return_dict=True)["input_ids"])
            else:
                rows.append(tokenizer(prompt + said + (tokenizer.eos_token or ""))["input_ids"])
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        scores: list[float | None] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        return scores

    folder = Path(path)
    return Reward(folder.parent.name if folder.name == "model" else folder.name, weight, reward)


def for_trl(reward: Reward) -> Any:
    """The reward as a function that TRL logs by its name; what comes out is checked."""

    def function(**arguments: Any) -> list[float | None]:
        return [None if math.isnan(value) else value for value in reward(**arguments).tolist()]

    function.__name__ = reward.name
    return function
