"""lm-eval in this process: one load of the model for all tasks, and what lm-eval does silently is counted or refused.

Owns what stands between lm-eval and the model: a journal (an interrupted evaluation goes on and gives the same figures
to the bit), a count of prompts that did not fit, an end at the first NaN, and one BOS where lm-eval (0.4.13, its issue
3333) scores rolling perplexity behind two.

    lm = make_lm(model, tokenizer, batch_size=16, journal=Journal(path));  found = run(lm, tasks, is_chat=False)

Requests reach the model in lm-eval's own order and batches, so figures are those of its command line. Leaves out which
tasks there are (task_index.py) and what is made of their scores.
"""

import contextlib
import hashlib
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import UserError

BLOCK = 8  # batches between two lines of the journal
SEED, OTHER_SEED = 0, 1234  # lm-eval's own
BOOTSTRAPS = 1000  # for the standard error of metrics that are no mean


class Journal:
    """Answers by the hash of what was asked, a JSON line each; a line that a kill cut short is asked again."""

    def __init__(self, path: Path | None):
        self.path, self.known = path, {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        for line in text.splitlines():
            key, value = json.loads(line)
            self.known[key] = value

    def get(self, key: str) -> Any:
        return self.known.get(key)

    def add(self, key: str, value: Any) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, value]) + "\n")

    def close(self) -> None:
        """All is scored and saved: nothing to go on from."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Journaled:
    """Mixed into lm-eval's HFLM."""

    journal: Journal
    tell: Callable[[int, int], object]  # of so many done, and so many more to do
    num_cut: Counter[str]  # prompts that did not fit, by task
    seconds: dict[str, float]  # of the model, by task
    salt: str  # of the journal: the model and how it is asked
    _requests: list[Any]
    _task_of: dict[str, str]
    _batch: list[str]
    _rolling_task = ""
    _is_rolling = False

    # scored text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._requests = requests
        self.tell(0, len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._requests, self._is_rolling = [], True
        self._rolling_task = requests[0].task_name  # seconds of several such tasks go to the first
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)  # type: ignore[misc]
        finally:
            self._is_rolling = False

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        if self._is_rolling and add_special_tokens is None:
            add_special_tokens = False  # lm-eval puts its prefix token, the BOS, before the first window by itself
        return super().tok_encode(string, add_special_tokens=add_special_tokens, **more)  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        """In blocks of whole batches, in the order in which lm-eval would take them."""
        for instance, (_, context, continuation) in zip(self._requests, requests, strict=False):
            if len(context) + len(continuation) > self.max_length + 1:  # type: ignore[attr-defined]
                self.num_cut[instance.task_name] += 1
        groups: dict[tuple[int, ...], list[int]] = {}  # one-token answers to the same question share a forward pass
        for i, (_, context, continuation) in enumerate(requests):
            groups.setdefault((*context, *continuation[:-1]), []).append(i)
        heads = [max(group, key=lambda i: len(requests[i][2])) for group in groups.values()]
        whole = {i: [*requests[i][1], *requests[i][2]] for i in heads}
        order = sorted(zip(heads, groups.values(), strict=True), key=lambda pair: _length_first(whole[pair[0]]))
        size = (override_bs or self.batch_size) * BLOCK  # type: ignore[attr-defined]
        answers: list[Any] = [None] * len(requests)
        tasks = [instance.task_name for instance in self._requests]
        if self._is_rolling:
            self.tell(0, len(requests))
        for start in range(0, len(order), size):
            block = sorted(i for _, group in order[start : start + size] for i in group)
            asked = [requests[i] for i in block]
            key = _hash(self.salt, [[context, continuation] for _, context, continuation in asked])
            found = self.journal.get(key)
            if found is None:
                started = time.perf_counter()
                found = super()._loglikelihood_tokens(asked, disable_tqdm=True, override_bs=override_bs)  # type: ignore[misc]
                self._refuse_nan([log_prob != log_prob for log_prob, _ in found])
                self.journal.add(key, found)
                self._count_seconds(started, [tasks[i] for i in block] if tasks else [self._rolling_task])
            for i, answer in zip(block, found, strict=True):
                answers[i] = tuple(answer)
            self.tell(len(block), 0)
        return answers

    # generated text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.tell(0, len(requests))
        self._task_of = {request.args[0]: request.task_name for request in requests}
        return super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: Any = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)  # type: ignore[misc]
        self._batch = strings
        if left_truncate_len and ids.shape[1] > left_truncate_len:
            for string, length in zip(strings, mask.sum(dim=1).tolist(), strict=True):
                if length > left_truncate_len:
                    self.num_cut[self._task_of.get(string, "")] += 1
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        from transformers import LogitsProcessorList

        plain = {name: value for name, value in settings.items() if name != "attention_mask"}
        key = _hash(self.salt, [context.tolist(), max_length, stop, repr(sorted(plain.items()))])
        found = self.journal.get(key)
        if found is None:
            guard, started = _NanGuard(), time.perf_counter()
            if settings.get("do_sample"):
                torch.manual_seed(int(key[:15], 16))  # of this batch alone, so that going on draws the same
            out = super()._model_generate(  # type: ignore[misc]
                context, max_length, stop, logits_processor=LogitsProcessorList([guard]), **settings
            )
            self._refuse_nan([bool(guard.seen)])
            found = out[:, context.shape[1] :].tolist()
            self.journal.add(key, found)
            self._count_seconds(started, [self._task_of.get(string, "") for string in self._batch])
        self.tell(len(found), 0)
        return torch.cat([context, torch.tensor(found, dtype=context.dtype, device=context.device)], dim=1)

    def _count_seconds(self, started: float, tasks: list[str]) -> None:
        share = (time.perf_counter() - started) / max(1, len(tasks))
        for task in tasks:
            self.seconds[task] = self.seconds.get(task, 0.0) + share

    def _refuse_nan(self, is_nan: list[bool]) -> None:
        if any(is_nan):
            raise UserError(
                f"{self.name}: the model's logits are NaN; check its weights and dtype "  # type: ignore[attr-defined]
                f"(llmkit check --model_name_or_path), or load it in another --dtype"
            )


class _NanGuard:
    """Sees the logits of every step, changes nothing."""

    def __init__(self) -> None:
        self.seen: Any = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen | torch.isnan(scores).any()  # read once, at the end: no wait for a GPU in between
        return scores


def _length_first(ids: list[int]) -> tuple[int, tuple[int, ...]]:
    return -len(ids), tuple(ids)


def _hash(salt: str, asked: Any) -> str:
    return hashlib.sha256(f"{salt}{json.dumps(asked)}".encode()).hexdigest()


def quiet() -> None:
    """What lm-eval says about things that are decided here."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def make_lm(
    name: str, model: Any, tokenizer: Any, batch_size: int, max_length: int | None, journal: Journal, salt: str
) -> Any:
    """lm-eval's model around one in memory. `salt` says in the journal which model it is and how it is asked."""
    quiet()
    from lm_eval.models.huggingface import HFLM

    lm = type("Lm", (Journaled, HFLM), {})(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
    )
    lm.seconds = {}
    lm.name, lm.journal, lm.salt, lm.num_cut, lm.tell = name, journal, salt, Counter(), lambda done, more: None
    return lm


def prepare_tasks(
    tasks: dict[str, Any], lm: Any, num_fewshot: int | None, gen_kwargs: dict[str, Any], end_of_turn: str = ""
) -> None:
    """Few-shot examples and generation settings as lm-eval's command line sets them; chats stop at the end of the turn.

    Raises UserError for what cannot fit into the model's context.
    """
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if num_fewshot is None:
            task.set_config(key="num_fewshot", value=own or 0)
        elif own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=OTHER_SEED)
        if task.get_config("output_type") == "generate_until":
            if end_of_turn:
                until = (task.config.generation_kwargs or {}).get("until") or []
                until = [until] if isinstance(until, str) else until
                more = {"until": [*dict.fromkeys([*until, end_of_turn])]}
                task.set_config(key="generation_kwargs", value=more, update=True)
            if gen_kwargs:
                task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
            wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
            if wanted >= lm.max_length:
                raise UserError(
                    f"task {name!r} generates {wanted} tokens, and the context of {lm.name} has {lm.max_length}; leave "
                    f"that task out, or generate less: --gen_kwargs.max_gen_toks {lm.max_length // 2}"
                )


def run(
    lm: Any, loaded: dict[str, Any], is_chat: bool, limit: int | None, system: str | None, allows_code: bool
) -> dict[str, Any]:
    """lm-eval's results of loaded and prepared tasks, samples included. Random generators and mode come back."""
    import lm_eval
    import lm_eval.api.task

    lm_eval.api.task.tqdm = lambda rows, **_: rows  # its bars; ours shows the whole
    with _seeded(lm.device):
        return lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            system_instruction=system,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=allows_code,
        )


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """lm-eval's seeds inside, everybody's generators as they were afterwards."""
    own, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(arrays)
