"""Watches a GRPO run for reward hacking: its answers while it trains, held-out prompts and canaries in between.

Owns the callback, alerts.jsonl, hacked.jsonl (answers that the reward likes and gold does not) and monitor.json (what
things were at first, so that a run that goes on is measured against the same).

    monitor = Monitor(rewards, gold);  trainer.monitor = monitor;  job.callbacks.append(monitor)

On held-out prompts (eval_datasets) every evaluation answers greedily: `eval_gold`, `eval_proxy`. `eval_kl` is the KL
from the model that training started from to the model now, in nats per token of answers that the former sampled before
the first step (k3 of Schulman 2020, "Approximating KL divergence"): it needs no second model, also at beta 0.
Leaves out the rules (`hacking.py`).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..data.sources import documents, eval_shard_names, parse_sources
from ..evaluate.answers import answering, chat_ids, context_of, ends_of, generate
from ..evaluate.paired import compare
from ..evaluate.texts import score_texts
from ..run import Run, write_json
from ..train.watch import own_random_numbers
from .hacking import Alarms, Floats, Selection, batch_figures
from .rewards import Reward, evaluate, text_of
from .watch import any_rank

SHOWN = 16  # answers in hacked.jsonl per alarm
CANARY_DOCUMENTS = 64
CANARY_CHARS = 64_000
KL_ROWS = 64


class Monitor(TrainerCallback):
    """`gold`: a reward that is never optimised, or None."""

    def __init__(self, rewards: list[Reward], gold: Reward | None):
        self.rewards, self.gold = rewards, gold
        self.selection = Selection()
        self.tops: dict[str, float] = {}
        self.alarms = Alarms()
        self.worst: list[dict[str, Any]] = []  # of the last batch
        self.start: dict[str, Any] = {}  # monitor.json
        self.last: dict[str, float] = {}  # figures of the last evaluation
        self.last_step: int | None = None
        self.is_alarmed = False

    # ---- before the first step

    def begin(self, job: Any, run: Run, watch: Any) -> None:
        self.job, self.run, self.watch = job, run, watch
        watch.on_tasks = self.see_tasks
        config = job.config
        self.can_ask = job.kind not in ("zero3", "fsdp2")  # where no rank has the whole model
        rows = next(iter(job.data.shards.values()), None)
        texts = rows["raw"][: config.gold_prompts] if rows is not None else []
        self.questions: list[dict[str, Any]] = [json.loads(text) for text in texts]
        if not self.questions:
            job.console.print("monitor   no eval_datasets: gold, reward and KL are not measured on held-out prompts")
        sources = parse_sources(config.canary_datasets, "canary_datasets")
        self.canaries = {
            name: _some_texts(source, Path(config.data_dir))
            for name, source in zip(eval_shard_names(sources), sources, strict=True)
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        path = self.run.folder / "monitor.json"
        if state.global_step and path.exists():  # on every rank: all look at the same batches
            self._go_on(path, state.global_step)
            return
        if not self.run.is_main or not self.can_ask:
            return
        model = self._bare(model)
        self.start = {"answers": self._sample(model), "bests": []}
        ids = self.start["answers"]
        self.start["logps"] = [row.tolist() for row in answer_logps(model, ids, self._batch_size())]
        self._evaluate(state.global_step, model)
        if self.job.scorer:
            self.see_tasks(state.global_step, self.job.scorer.score(model))

    def see_tasks(self, step: int, figures: dict[str, float]) -> None:
        """Tasks of eval_tasks are canaries, too."""
        self._look(step, {f"task/{name}": value for name, value in figures.items()})

    def _go_on(self, path: Path, step: int) -> None:
        """What was known at that step; alerts.jsonl is cut there already."""
        self.start = json.loads(path.read_text(encoding="utf-8"))
        self.start["bests"] = [best for best in self.start.get("bests", []) if best["step"] <= step]
        self.alarms = Alarms(self.start["figures"], _kinds(self.run.folder / "alerts.jsonl"))

    def _save(self) -> None:
        self.start["figures"] = self.alarms.start
        if self.run.is_main:
            write_json(self.run.folder / "monitor.json", self.start)

    def _bare(self, model: Any) -> Any:
        return self.job.trainer.accelerator.unwrap_model(model)

    def _batch_size(self) -> int:
        return int(self.job.config.per_device_eval_batch_size)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        tokenizer = self.job.tokenizer
        if not isinstance(prompt, list):
            return list(tokenizer(prompt)["input_ids"])
        return chat_ids(tokenizer, prompt, **(self.job.config.passed_on.get("chat_template_kwargs") or {}))

    def _sample(self, model: Any) -> list[list[list[int]]]:
        """[prompt ids, answer ids] of answers sampled before the first step."""
        rows = self.questions or [json.loads(text) for text in self.job.data.train["raw"][:KL_ROWS]]
        prompts = [self._prompt_ids(row["prompt"]) for row in rows[:KL_ROWS]]
        found = []
        with answering(model), own_random_numbers(self.job.config.seed, next(model.parameters()).device):
            for start in range(0, len(prompts), self._batch_size()):
                batch = prompts[start : start + self._batch_size()]
                found += sample_ids(model, self.job.tokenizer, batch, self.job.config.max_completion_length)
        return [[prompt, answer] for prompt, answer in zip(prompts, found, strict=True)]

    # ---- the answers that it trains on

    def see(
        self,
        prompts: list[Any],
        completions: list[Any],
        ids: list[list[int]],
        rewards_NF: Floats,
        gold_N: Floats | None,
    ) -> dict[str, float]:
        """A batch of all processes; gives the figures to log, and raises alarms."""
        state, size = self.job.trainer.state, self.job.config.num_generations
        texts = [text_of(said) for said in completions]
        weights = [reward.weight for reward in self.rewards]
        rewards = {reward.name: rewards_NF[:, i] for i, reward in enumerate(self.rewards)}
        lengths = np.array([len(row) for row in ids], np.float64)
        figures = batch_figures(
            texts, [text_of(prompt) for prompt in prompts], lengths, rewards, weights, gold_N, size, self.tops
        )
        ends = ends_of(self._bare(self.job.trainer.model), self.job.tokenizer)
        figures["hack/clipped"] = sum(row[-1] not in ends for row in ids) / max(1, len(ids))
        total = np.nan_to_num(rewards_NF) @ np.array(weights)
        if gold_N is not None:
            gold = np.nan_to_num(gold_N)
            z = self.selection.add(total.reshape(-1, size), gold.reshape(-1, size))
            figures |= {} if z is None else {"hack/selection": z}
            self.worst = _worst(prompts, texts, rewards, total, gold)
        self._look(state.global_step, figures)
        return figures

    def _look(self, step: int, figures: dict[str, Any]) -> None:
        num_known = len(self.alarms.start)
        found = self.alarms.look(figures)
        if len(self.alarms.start) > num_known:
            self._save()
        example = {}
        if self.worst:
            shown = json.dumps(self.worst[0]["completion"][:200], ensure_ascii=False)
            example["example"] = f"{shown} (reward {self.worst[0]['reward']:.2f}, gold {self.worst[0]['gold']:.2f})"
        for kind, reason in found:
            self.is_alarmed = True
            self.run.append("alerts.jsonl", {"step": step, "kind": kind, "message": reason, **example})
            self.job.console.print(f"alert     step {step}: {reason}", markup=False)
        for row in self.worst if found else []:
            self.run.append("hacked.jsonl", {"step": step, "alarm": found[0][0], **row})
        if found and self.worst:
            self.job.console.print(f"          e.g. {example['example']}; more in hacked.jsonl", markup=False)

    # ---- held-out prompts and canaries

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = self.job.config.eval_steps or math.inf
        is_due = state.global_step == state.max_steps or state.global_step % every == 0
        if is_due and self.run.is_main and self.can_ask:
            self._evaluate(state.global_step, self._bare(model))
        if self.job.config.stop_on_alarm and any_rank(self.is_alarmed):  # held-out prompts alarm the main one only
            control.should_training_stop = True

    def _evaluate(self, step: int, model: Any) -> None:
        figures: dict[str, Any] = self.measure(model, step)
        shown = {key: value for key, value in figures.items() if isinstance(value, float)}
        self.last, self.last_step = shown, step
        seen = getattr(self.job.trainer.state, "num_input_tokens_seen", 0)  # the x of the report's curves
        self.run.log({"step": step, "num_tokens": seen} | shown)
        names = ("eval_gold", "eval_proxy", "eval_kl", *(key for key in shown if key.startswith("canary/")))
        told = "  ".join(f"{name.removeprefix('eval_')} {shown[name]:.4f}" for name in names if name in shown)
        self.job.console.print(f"monitor {step:>3,}/{self.job.trainer.state.max_steps:,}  {told}")
        self._look(step, figures)
        self._save()
        if self.watch.best:
            self.watch.best.see(step, shown, model)

    def measure(self, model: Any, step: int) -> dict[str, Any]:
        """Held-out reward and gold, their paired changes to where gold was best, KL, canaries; nothing is random."""
        figures: dict[str, Any] = {}
        if self.questions:
            figures |= self._ask(model, step)
        if self.start.get("answers"):
            now = answer_logps(model, self.start["answers"], self._batch_size())
            log_ratio = np.concatenate([new - np.array(old) for new, old in zip(now, self.start["logps"], strict=True)])
            figures["eval_kl"] = float((np.exp(log_ratio) - 1 - log_ratio).mean())
        window = min(self.job.config.max_length, context_of(model) or self.job.config.max_length)
        for name, texts in self.canaries.items():
            scores = score_texts(model, self.job.tokenizer, texts, window, self._batch_size())
            figures[f"canary/{name}"] = scores.loss
        return figures

    def _ask(self, model: Any, step: int) -> dict[str, Any]:
        config, answers = self.job.config, []
        ids = [self._prompt_ids(row["prompt"]) for row in self.questions]
        with answering(model), torch.no_grad():
            for start in range(0, len(ids), self._batch_size()):
                batch = ids[start : start + self._batch_size()]
                answers += generate(model, self.job.tokenizer, batch, config.max_completion_length)
        values = score(self.rewards, self.questions, [text for text, _ in answers])
        total = np.nan_to_num(np.stack(list(values.values()))).T @ np.array([r.weight for r in self.rewards])
        figures: dict[str, Any] = {f"eval_rewards/{name}/mean": float(np.nanmean(v)) for name, v in values.items()}
        measured = {"proxy": total}
        if self.gold is not None:
            gold = score([self.gold], self.questions, [text for text, _ in answers])
            measured["gold"] = np.nan_to_num(gold[self.gold.name])
        figures |= {f"eval_{name}": float(items.mean()) for name, items in measured.items()}
        if self.gold is None:
            return figures
        bests = self.start["bests"]
        if bests:
            for name, items in measured.items():
                pair = compare([items], [np.array(bests[-1][name])])
                figures[f"{name}_change"] = (pair.difference, pair.low, pair.high)
            figures["best_step"] = bests[-1]["step"]
        if not bests or measured["gold"].mean() > np.mean(bests[-1]["gold"]):
            bests.append({"step": step} | {name: items.tolist() for name, items in measured.items()})
        return figures


def _kinds(path: Path) -> set[str]:
    """Of the alerts that were raised up to the checkpoint: Run.start has cut what came after it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {json.loads(line)["kind"] for line in lines}


def _some_texts(source: Any, data_dir: Path) -> list[str]:
    """The first documents, at most CANARY_DOCUMENTS of CANARY_CHARS together."""
    found: list[str] = []
    for document in documents(source, data_dir):
        room = CANARY_CHARS - sum(map(len, found))
        if len(found) == CANARY_DOCUMENTS or room <= 0:
            break
        found.append(document.text[:room])
    return [text for text in found if text.strip()]


def _worst(
    prompts: list[Any], texts: list[str], rewards: dict[str, Floats], total: Floats, gold: Floats
) -> list[dict[str, Any]]:
    """Answers that earn most among those which gold calls worse than the best of the batch."""
    is_low = gold < gold.max() if np.ptp(gold) > 1e-9 else np.ones(len(gold), bool)
    order = sorted(np.flatnonzero(is_low), key=lambda i: -total[i])
    return [
        {
            "prompt": text_of(prompts[i]),
            "completion": texts[i],
            "reward": float(total[i]),
            "gold": float(gold[i]),
            "rewards": {name: None if np.isnan(v[i]) else float(v[i]) for name, v in rewards.items()},
        }
        for i in order[:SHOWN]
    ]


def score(rewards: list[Reward], rows: list[dict[str, Any]], texts: list[str]) -> dict[str, Floats]:
    """What each reward gives for one answer per row, (N,), NaN for None."""
    return dict(zip([reward.name for reward in rewards], evaluate(rewards, rows, texts), strict=True))


@torch.no_grad()
def sample_ids(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Ids of one sampled answer to each prompt, its end included."""
    ends, pad = ends_of(model, tokenizer), tokenizer.pad_token_id
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, pad_token_id=pad, eos_token_id=sorted(ends),
    )[:, width:].tolist()  # fmt: skip
    return [row[: next((k + 1 for k, i in enumerate(row) if i in ends), len(row))] for row in out]


@torch.no_grad()
def answer_logps(model: Any, rows: list[list[list[int]]], batch_size: int) -> list[Floats]:
    """Log-probability of every token of the answers in [prompt ids, answer ids], nats; in eval mode."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    for start in range(0, len(rows), batch_size):
        batch = [prompt + answer for prompt, answer in rows[start : start + batch_size]]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()  # (B, T - 1, V)
        logps = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for row, (prompt, answer) in zip(logps.double().cpu().numpy(), rows[start : start + batch_size], strict=True):
            found.append(row[len(prompt) - 1 : len(prompt) + len(answer) - 1])
    model.train(was_training)
    return found
