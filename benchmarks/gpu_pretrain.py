"""One NVIDIA GPU: the speed of llmkit's pretraining step beside nanoGPT's and nanochat's, on the same card, in one run.

Owns the comparison and its targets; the others' code is read from a checkout and is not part of llmkit:

    python benchmarks/gpu_pretrain.py --nanogpt ../nanoGPT --nanochat ../nanochat --data_dir data

1. Tokens per second and MFU at the shape of GPT-2 124M: 12 layers, 12 heads, 768 wide, context 1024, 50,304 ids, bf16
   autocast, torch.compile, fused AdamW, clipping at 1. The contenders take turns; the median of the rounds counts.
   llmkit runs the loop's own pieces (`_micro_batches`, `_loss`, Engine, Monitor), once per attention that is installed.
2. Wall time of `recipes/shakespeare-char/pretrain_gpu.yaml` to its first evaluation at or under 1.4697 nats, beside
   that of nanoGPT's `train.py config/train_shakespeare_char.py`: whole processes, start and compilation included.

MFU = tokens/s x FLOPs per token / peak of the card. FLOPs per token = 6 x parameters that take part in matrix products
(all but embeddings and vectors; a tied head counts) + 12 x layers x heads x head size x context, attention in full
although half of it is masked: what nanochat's `GPT.estimate_flops` counts (after Chowdhery et al. 2022, appendix B).
Exit code 1 when a target is missed. Leaves out reading data (random tokens from pinned memory, for all), several GPUs,
and nanoGPT's `prepare.py`, which is not timed. nanochat has parts of its own (value embeddings, Muon, no clipping), so
its speed stands beside llmkit with Muon and is no target.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmkit.hardware import detect, peak_bf16
from llmkit.model import LlmkitConfig
from llmkit.run import Run
from llmkit.train.build import flops_per_token
from llmkit.train.engines import start_accelerator, start_engine
from llmkit.train.monitor import Monitor
from llmkit.train.optim import lr_factor, set_learning_rate
from llmkit.train.pretrain import _loss, _micro_batches
from llmkit.verbs import PretrainConfig

SPEED_TARGET, MFU_TARGET, TIME_TARGET = 1.15, 0.40, 0.50
LOSS_TARGET = 1.4697  # nats per character: what nanoGPT's README reports for its own recipe
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contenders have in common; the defaults are nanoGPT's own for one of its eight GPUs."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    vocab: int = 50304
    rows: int = 12
    accumulation: int = 5
    steps: int = 20
    rounds: int = 5
    is_dry: bool = False  # tiny and on the CPU: whether every part runs, no figures

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_dry else "cuda")

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.accumulation * self.context

    def batch(self) -> dict[str, Tensor]:
        """The rows of one step as the loader gives them, (B, T) int64 on the host; random, since only speed counts."""
        ids = torch.randint(self.vocab, (self.rows * self.accumulation, self.context + 1))
        positions = torch.arange(self.context).expand(len(ids), -1)
        rows = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "position_ids": positions}
        return {key: r.contiguous() if self.is_dry else r.contiguous().pin_memory() for key, r in rows.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not self.is_dry)

    def matrix_flops(self, num_matrix_parameters: int) -> float:
        return 6 * num_matrix_parameters + 12 * self.layers * self.width * self.context


@dataclasses.dataclass
class Contender:
    name: str
    step: Callable[[], object]
    flops_per_token: float
    tf32: bool = False  # whether its own script turns it on
    speeds: list[float] = dataclasses.field(default_factory=list)  # tokens per second, one of each round

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


# ---- the contenders


def llmkit(setting: Setting, attention: str, optim: str = "adamw_torch_fused") -> Contender:
    """One step of `pretrain.fit`, line by line, without the log."""
    config = PretrainConfig(
        optim=optim,  # type: ignore[arg-type]
        learning_rate=6e-4,
        per_device_train_batch_size=setting.rows,
        gradient_accumulation_steps=setting.accumulation,
        packing_strategy="contiguous",
        torch_compile=not setting.is_dry,
        use_cpu=setting.is_dry,
    )
    shape = LlmkitConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=setting.context,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation=attention)
    accelerator = start_accelerator("single", detect(config.use_cpu), config)
    engine = start_engine(accelerator, "single", model, config, bf16=not setting.is_dry)
    monitor = Monitor(Run(Path(), "benchmark", is_main=False), setting.device, print)
    job: Any = SimpleNamespace(config=config, engine=engine)
    batch = setting.batch()
    engine.model.train()

    def step() -> None:
        set_learning_rate(engine.optimizer, lr_factor(50, config, 100))
        loss = torch.zeros((), device=setting.device)
        micro_batches = _micro_batches(job, batch)
        for i, micro_batch in enumerate(micro_batches):
            micro_loss = _loss(job, micro_batch) / setting.tokens_per_step
            engine.backward(micro_loss, is_last=i == len(micro_batches) - 1)
            loss += micro_loss.detach()
        engine.step(lambda grad_norm: monitor.judge(loss, grad_norm))

    name = f"llmkit {attention}" + (", Muon" if optim == "muon" else "")
    return Contender(name, step, flops_per_token(model, setting.context))


def nanogpt(setting: Setting, checkout: Path) -> Contender:
    """Its model and optimiser, stepped as its train.py does for one GPU in bfloat16."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec and spec.loader
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs  # its dataclass looks itself up there
    spec.loader.exec_module(theirs)
    shape = theirs.GPTConfig(
        block_size=setting.context,
        vocab_size=setting.vocab,
        n_layer=setting.layers,
        n_head=setting.heads,
        n_embd=setting.width,
        dropout=0.0,
        bias=False,
    )
    model = theirs.GPT(shape).to(setting.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), setting.device.type)
    num_matrix = sum(p.numel() for p in model.parameters() if p.ndim >= 2) - model.transformer.wpe.weight.numel()
    forward = model if setting.is_dry else torch.compile(model)

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        return forward(ids, labels)[1]

    step = plain_step(setting, model, optimizer, loss_of, clips=True)
    return Contender("nanoGPT", step, setting.matrix_flops(num_matrix), tf32=True)


def nanochat(setting: Setting, checkout: Path) -> Contender:
    """Its model, every layer with the full context, and its optimiser."""
    sys.path.insert(0, str(checkout))
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    shape = GPTConfig(
        sequence_len=setting.context,
        vocab_size=setting.vocab,
        n_layer=setting.layers,
        n_head=setting.heads,
        n_kv_head=setting.heads,
        n_embd=setting.width,
        window_pattern="L",
    )
    with torch.device("meta"):
        model = GPT(shape)
    model.to_empty(device=setting.device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    forward = model if setting.is_dry else torch.compile(model, dynamic=False)
    step = plain_step(setting, model, optimizer, forward, clips=False, autocasts=False)  # it casts by itself
    return Contender("nanochat", step, model.estimate_flops(), tf32=True)


def plain_step(
    setting: Setting,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    clips: bool,
    autocasts: bool = True,
) -> Callable[[], None]:
    """Accumulate, clip, update, clear; every micro-batch is sent to the card while the one before is computed."""
    batch = setting.batch()
    ids_B, labels_B = (batch[key].split(setting.rows) for key in ("input_ids", "shift_labels"))

    def step() -> None:
        for ids, labels in zip(ids_B, labels_B, strict=True):
            x, y = (rows.to(setting.device, non_blocking=True) for rows in (ids, labels))
            with setting.autocast() if autocasts else contextlib.nullcontext():
                loss = loss_of(x, y) / setting.accumulation
            loss.backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- 1. tokens per second


@contextlib.contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = is_on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def run_steps(contender: Contender, setting: Setting, count: int) -> float:
    """Seconds for so many steps, until the card has done them."""
    wait = torch.cuda.synchronize if setting.device.type == "cuda" else lambda: None
    with tf32(contender.tf32):
        wait()
        started = time.perf_counter()
        for _ in range(count):
            contender.step()
        wait()
    return time.perf_counter() - started


def build(name: str, setting: Setting, make: Callable[[], Contender]) -> list[Contender]:
    """The contender, compiled and warm; none when it cannot run here, which is said."""
    try:
        contender = make()
        run_steps(contender, setting, 3)
        return [contender]
    except Exception as error:  # whatever another project's code or a missing kernel raises: the others go on
        print(f"left out  {name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
        return []


def contenders_of(setting: Setting, nanogpt_dir: Path | None, nanochat_dir: Path | None) -> list[Contender]:
    attentions = ["sdpa"]
    if not setting.is_dry:
        attentions += ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None) + ["flex_attention"]
    found: list[Contender] = []
    for attention in attentions:
        found += build(f"llmkit {attention}", setting, lambda a=attention: llmkit(setting, a))  # type: ignore[misc]
    found += build("llmkit sdpa, Muon", setting, lambda: llmkit(setting, "sdpa", "muon"))
    for name, folder, make in (("nanoGPT", nanogpt_dir, nanogpt), ("nanochat", nanochat_dir, nanochat)):
        if folder is None:
            print(f"left out  {name}: no --{name.lower()}", flush=True)
        else:
            found += build(name, setting, lambda make=make, folder=folder: make(setting, folder))  # type: ignore[misc]
    return found


def measure_speed(setting: Setting, contenders: list[Contender], peak: float | None) -> dict[str, float | None]:
    """The two ratios that have targets, of the fastest llmkit with AdamW."""
    for _ in range(setting.rounds):
        for contender in contenders:
            seconds = run_steps(contender, setting, setting.steps)
            contender.speeds.append(setting.steps * setting.tokens_per_step / seconds)
    rival = next((c for c in contenders if c.name == "nanoGPT"), None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("contender", "tokens/s", "spread", "MFLOP/token", "MFU", "x nanoGPT"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for c in contenders:
        spread = (max(c.speeds) - min(c.speeds)) / c.speed
        mfu = f"{c.speed * c.flops_per_token / peak:.1%}" if peak else "peak unknown"
        ratio = f"{c.speed / rival.speed:.3f}" if rival else ""
        table.add_row(c.name, f"{c.speed:,.0f}", f"{spread:.1%}", f"{c.flops_per_token / 1e6:,.1f}", mfu, ratio)
    Console(highlight=False, width=120).print(table)
    ours = [c for c in contenders if c.name.startswith("llmkit") and "Muon" not in c.name]
    best = max(ours, key=lambda c: c.speed, default=None)
    return {
        "speed": best.speed / rival.speed if best and rival else None,
        "mfu": best.speed * best.flops_per_token / peak if best and peak else None,
    }


# ---- 2. time to a loss


def watch(
    name: str, command: list[str], folder: Path, losses: Callable[[str], list[float]], target: float
) -> float | None:
    """Starts a process in `folder`; seconds until an evaluation is at or under the target, None when it never is.

    `losses` finds the validation losses in a line of its output. The process is ended as soon as the target is reached.
    """
    started = time.perf_counter()
    seen: list[tuple[float, float]] = []  # (loss, seconds)
    options: dict[str, Any] = {"cwd": folder, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-4:], line]
            found = losses(line)
            seen += [(loss, time.perf_counter() - started) for loss in found]
            if found and found[-1] <= target:
                process.kill()
                return seen[-1][1]
    lowest = f"lowest {min(seen)[0]:.4f} after {min(seen)[1]:.0f} s" if seen else f"ended with: {''.join(tail).strip()}"
    print(f"not there {name}: never at or under {target}; {lowest}", flush=True)
    return None


def measure_time(is_dry: bool, checkout: Path, data_dir: Path) -> float | None:
    """llmkit's time to the loss as a share of nanoGPT's."""
    target = 100.0 if is_dry else LOSS_TARGET
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        recipe = [str(ROOT / "recipes/shakespeare-char/pretrain_gpu.yaml"), "--data_dir", str(data_dir.resolve())]
        tiny = "--use_cpu true --torch_compile false --max_steps 4 --eval_steps 2 --config_overrides.hidden_size 24"
        recipe += ["--output_dir", str(scratch / "run"), *(tiny.split() if is_dry else [])]
        ours = watch(
            "llmkit",
            [sys.executable, "-u", "-m", "llmkit", "pretrain", *recipe],
            ROOT,
            lambda line: [float(x) for x in re.findall(r"^eval .* validation (\d+\.\d+)", line)],
            target,
        )
        theirs_dir = scratch / "nanogpt"
        shutil.copytree(checkout, theirs_dir, ignore=shutil.ignore_patterns(".git"))
        data = theirs_dir / "data/shakespeare_char"
        shutil.copy(data_dir / "tiny_shakespeare.txt", data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
        tiny = "--device=cpu --compile=False --max_iters=4 --eval_interval=2 --eval_iters=1 --n_layer=1 --n_embd=24"
        options = tiny.split() if is_dry else []
        theirs = watch(
            "nanoGPT",
            [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *options],
            theirs_dir,
            lambda line: [float(x) for x in re.findall(r"^step .* val loss (\d+\.\d+)", line)],
            target,
        )
    said = [f"{seconds:.0f} s" if seconds else "not reached" for seconds in (ours, theirs)]
    print(f"to {target}  llmkit {said[0]}, nanoGPT {said[1]}", flush=True)
    return ours / theirs if ours and theirs else None


def judge(what: str, value: float | None, target: float, is_at_least: bool) -> bool:
    """Says the figure beside its target; True unless it was measured and missed."""
    sign = ">=" if is_at_least else "<="
    is_met = value is None or (value >= target if is_at_least else value <= target)
    verdict = "not measured" if value is None else f"{value:.3f}  {'met' if is_met else 'MISSED'}"
    print(f"{what:<34}target {sign} {target:.2f}   {verdict}", flush=True)
    return is_met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="checkout of karpathy/nanoGPT")
    parser.add_argument("--nanochat", type=Path, metavar="DIR", help="checkout of karpathy/nanochat")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="holds tiny_shakespeare.txt (default data)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each contender and round (default 20)")
    parser.add_argument("--rows", type=int, default=12, help="rows of a micro-batch (default 12, nanoGPT's)")
    parser.add_argument("--dry_run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    setting = Setting(rows=args.rows, steps=args.steps)
    peak, card = None, "CPU, dry run: no figure means anything"
    if args.dry_run:
        setting = Setting(2, 2, 64, 64, 256, rows=2, accumulation=2, steps=2, rounds=2, is_dry=True)
    elif torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        peak = peak_bf16(card)
    else:
        print("no NVIDIA GPU here: nothing measured")
        return 0
    print(f"{card}, torch {torch.__version__}, {setting.tokens_per_step:,} tokens per step", flush=True)
    ratios = measure_speed(setting, contenders_of(setting, args.nanogpt, args.nanochat), peak)
    torch.cuda.empty_cache()
    share = None
    if args.nanogpt is None or not (args.data_dir / "tiny_shakespeare.txt").exists():
        print(f"left out  shakespeare: needs --nanogpt and {args.data_dir}/tiny_shakespeare.txt", flush=True)
    else:
        share = measure_time(args.dry_run, args.nanogpt, args.data_dir)
    if args.dry_run:
        print('dry run: every part that says no "left out" has run', flush=True)
        return 0
    verdicts = [
        judge("tokens/s over nanoGPT's", ratios["speed"], SPEED_TARGET, is_at_least=True),
        judge("MFU", ratios["mfu"], MFU_TARGET, is_at_least=True),
        judge(f"share of nanoGPT's time to {LOSS_TARGET}", share, TIME_TARGET, is_at_least=False),
    ]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
