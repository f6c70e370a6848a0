"""What two ranks check about their engine; started by test_engines.py under torchrun.

torchrun --nproc_per_node 2 engine_ranks.py zero2     # the environment says zero2, too"""

import sys

import torch
from helpers import random_ids, tiny_model

from llmkit.evaluate.perplexity import token_losses
from llmkit.hardware import detect
from llmkit.run import quiet_libraries
from llmkit.train.engines import engine_kind, start_accelerator, start_engine
from llmkit.verbs import PretrainConfig

quiet_libraries()
CONFIG = PretrainConfig(per_device_train_batch_size=2, max_grad_norm=0.5, use_cpu=True, adam_epsilon=1e-3)
ids = random_ids(4, 17)
batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "position_ids": torch.arange(16).expand(4, 16)}

# by hand, on all four rows at once: gradient norms, and the weights after one clipped AdamW update
plain = tiny_model().train()
token_losses(plain, batch, True).mean().backward()
norms = {name: p.grad.norm() for name, p in plain.named_parameters()}
total = torch.stack(list(norms.values())).norm()
torch.nn.utils.clip_grad_norm_(plain.parameters(), CONFIG.max_grad_norm)
assert total > CONFIG.max_grad_norm
decayed = [p for p in plain.parameters() if p.ndim > 1]
vectors = [p for p in plain.parameters() if p.ndim == 1]
groups = [{"params": decayed, "weight_decay": CONFIG.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
betas = (CONFIG.adam_beta1, CONFIG.adam_beta2)
torch.optim.AdamW(groups, lr=CONFIG.learning_rate, betas=betas, eps=CONFIG.adam_epsilon).step()

kind = engine_kind()
assert kind == sys.argv[1], kind
accelerator = start_accelerator(kind, detect(use_cpu=True), CONFIG)
engine = start_engine(accelerator, kind, tiny_model().train(), CONFIG, bf16=False)
assert engine.world_size == 2 and engine.num_parameters()[0] == sum(p.numel() for p in plain.parameters())
seen: list[float] = []


def step(skip: bool, scale: float = 1.0) -> None:
    mine = {key: rows[2 * engine.rank : 2 * engine.rank + 2] for key, rows in batch.items()}
    loss = token_losses(engine.model, mine, True).sum() / 64
    engine.backward(loss * scale, is_last=True)
    if scale == 1.0:
        for name, norm in engine.grad_norms().items():
            assert abs(norm - norms[name]) <= 1e-4 * norms[name] + 1e-6, (name, norm, norms[name])

    def judge(norm: torch.Tensor) -> torch.Tensor:
        seen.append(float(norm))
        return torch.tensor(skip or not norm.isfinite())

    engine.step(judge)


before = {name: w.clone() for name, w in engine.get_weights().items()}
step(skip=True)
step(skip=True, scale=float("nan"))
after = engine.get_weights()
assert all(torch.equal(before[name], after[name]) for name in before), "a skipped step changed the weights"
step(skip=False)
assert len(seen) == 3 and abs(seen[0] - total) < 1e-3 * total and not seen[1] < 1e9 and abs(seen[2] - seen[0]) < 1e-6
after = engine.get_weights()
for name, p in plain.named_parameters():
    if engine.rank == 0:
        assert (after[name] - p).abs().max() < 1e-5, (name, float((after[name] - p).abs().max()))
state = engine.get_state()
assert all(float(value) == 1 for key, value in state.items() if key.endswith("/step")), "a skipped step was counted"
assert engine.any(engine.rank == 1) and not engine.any(False) and engine.gather(engine.rank) == [0, 1]
assert float(engine.sum(torch.tensor(1.0 + engine.rank))) == 3.0
accelerator.wait_for_everyone()
accelerator.end_training()
print("ok", flush=True)
