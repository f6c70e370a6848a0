"""Engines: one process, DDP, DeepSpeed ZeRO-1 to 3, FSDP2, behind the few calls that the loop makes.

Owns how an engine wraps the model, reduces and clips gradients, makes or skips the update, and how whole weights and
optimiser state come out of it and go back in. Every one gives the same losses, to rounding, and the same checkpoints.

    engine = start_engine(accelerator, kind, model, config, bf16)
    engine.backward(loss, is_last=True); engine.step(judge)

`kind` comes from the environment that the launcher sets. DDP and ZeRO go through Accelerate; FSDP2 is torch's
`fully_shard` on CPUs and GPUs alike, since Accelerate 1.15 turns FSDP on for GPUs only.
Leaves out tensor and pipeline parallelism, and offloading under FSDP2.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from ..config import UserError
from ..hardware import Device
from ..verbs import PretrainConfig
from .optim import build_optimizer

PATIENCE = timedelta(days=2)  # the others wait while rank 0 tokenises
KINDS = "single, ddp, zero1, zero2, zero3, fsdp2"


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def engine_kind() -> str:
    """What the launcher asks for: single, ddp, zero1, zero2, zero3 or fsdp2. Raises UserError for FSDP1."""
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2", "3"):
            raise UserError(f"accelerate_config: DeepSpeed zero_stage={stage}; allowed: 1, 2, 3")
        return f"zero{stage}"
    if _is_on("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("accelerate_config: FSDP version 1; allowed: fsdp_version: 2")
        for key, instead in (
            ("fsdp_offload_params", "zero3_offload offloads"),
            ("fsdp_activation_checkpointing", "the recipe's activation_checkpointing does it"),
        ):
            if _is_on(key.upper()):
                raise UserError(f"accelerate_config: {key}: true; allowed: false ({instead})")
        return "fsdp2"
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"


def check_engine(kind: str, config: PretrainConfig) -> None:
    """Raises UserError for settings that this engine cannot honour."""
    if kind.startswith("zero") and config.optim == "muon":
        raise UserError(
            f"optim=muon does not run under {kind}: DeepSpeed updates flat slices, Muon needs whole matrices; "
            "use fsdp2 or ddp (multi_gpu, cpu), or optim: adamw_torch_fused"
        )
    if kind.startswith("zero") and config.optim == "adamw_torch":
        raise UserError(f"optim=adamw_torch cannot skip a spike under {kind}; use adamw_torch_fused, the same maths")
    if kind in ("zero3", "fsdp2") and config.use_peft:
        raise UserError(f"use_peft=true does not run under {kind} yet; use ddp (multi_gpu, cpu), zero1 or zero2")
    if kind == "zero3" and config.torch_compile:
        raise UserError("torch_compile=true does not run under zero3; set it to false, or use zero2 or fsdp2")


def start_accelerator(kind: str, device: Device, config: PretrainConfig) -> Accelerator:
    """Accelerate's process group for this engine; `cpu=True` would silently turn DeepSpeed and FSDP into DDP.

    bf16 is autocast over float32 weights under every engine, by `Engine.autocast`, so Accelerate is told "no".
    """
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    if not kind.startswith("zero"):
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # `fully_shard` is called here, not by Accelerate
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        return Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[patient])
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build of 90 s; gloo does it too
        PartialState(backend="gloo", timeout=PATIENCE)
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_clipping=config.max_grad_norm,
        zero3_init_flag=False,  # the model is built and probed whole, then split
    )
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if device.bf16:  # an autocast from outside would be switched off inside DeepSpeed's forward
        plugin.deepspeed_config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # or gradients would be summed in bfloat16
        }
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="no",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        kwargs_handlers=[patient],
    )
    unset_hf_deepspeed_config()  # or transformers would build the model in slices under ZeRO-3
    return accelerator


class Engine:
    """One process, or DDP: every rank holds the whole model and the whole optimiser."""

    is_sharded = False  # True: every forward pass talks to the other ranks, so all must make the same number

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, config: PretrainConfig, bf16: bool):
        self.accelerator, self.bare_model, self.config, self.bf16 = accelerator, model, config, bf16
        self.world_size, self.rank = accelerator.num_processes, accelerator.process_index
        is_gpu = accelerator.device.type == "cuda"
        self.hosts = (
            dist.new_group(backend="gloo", timeout=PATIENCE) if is_gpu and self.world_size > 1 else None
        )  # talk without the GPU
        self.plain_class = type(model)  # fully_shard puts another in its place
        self._num_parameters = [sum(p.numel() for p in ps) for ps in (model.parameters(), self.parameters().values())]
        self._wrap()
        if config.torch_compile:
            model.compile()

    def _wrap(self) -> None:
        self.bare_model.to(self.accelerator.device)
        self.optimizer = build_optimizer(self.bare_model, self.config)
        self.model = self.accelerator.prepare(self.bare_model)

        self.trainable = list(self.parameters().values())

    def is_wrapped_as(self, kind: str) -> bool:
        is_ddp = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return is_ddp if kind == "ddp" else kind == "single" and not is_ddp

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable ones, by their name in the plain model; a tied one once."""
        return {name: p for name, p in self.bare_model.named_parameters() if p.requires_grad}

    def num_parameters(self) -> tuple[int, int]:
        """All and trainable ones, of the whole model."""
        total, trainable = self._num_parameters
        return total, trainable

    def autocast(self) -> torch.autocast:
        """bfloat16 matrix products over float32 weights, where the recipe or the device says so."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, value: Tensor) -> Tensor:
        """Over ranks, on the device."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; only the hosts wait, not the GPU."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, group=self.hosts)
        return bool(votes)

    def gather(self, value: Any) -> list:
        """Every rank's value, in order."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds this rank's share of the gradient of the *sum* over ranks; ranks talk at the last micro-batch."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
            (loss * self.world_size).backward()  # gradients are averaged over ranks: undo it

    def step(self, judge: Callable[[Tensor], Tensor]) -> None:
        """Clips, asks `judge(grad_norm) -> bool tensor` whether to skip, updates, clears the gradients.

        `grad_norm` is that of the global batch before clipping. On a GPU nothing waits for the verdict: the update is
        masked on the device.
        """
        norm = nn.utils.clip_grad_norm_(self.trainable, self.config.max_grad_norm or float("inf"))
        skip = judge(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if skip.is_cuda and self.config.optim != "adamw_torch":
            self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # torch's own name for it
            self.optimizer.step()
        elif not skip:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def grad_norms(self) -> dict[str, float]:
        """Gradient norm of every trainable tensor of the global batch; called between `backward` and `step`."""
        norms = {}
        for name, p in self.parameters().items():
            norm = p.grad.norm() if p.grad is not None else torch.zeros(())
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return norms

    # whole tensors out and in; every rank calls, since gathering is a collective

    def weight(self, p: nn.Parameter) -> Tensor:
        return p.full_tensor() if isinstance(p, DTensor) else p.detach()

    def get_weights(self) -> dict[str, Tensor]:
        """The plain model's state dict with whole tensors on the CPU; empty on ranks other than 0."""
        whole: dict[int, Tensor] = {}  # a tied weight is one tensor here too
        weights = {}
        for name, value in self.bare_model.state_dict(keep_vars=True).items():
            if id(value) not in whole:
                gathered = self.weight(value) if isinstance(value, nn.Parameter) else value
                whole[id(value)] = gathered.detach().cpu() if self.rank == 0 else gathered.new_empty(0)
            weights[name] = whole[id(value)]
        return weights if self.rank == 0 else {}

    def get_state(self) -> dict[str, Tensor]:
        """Optimiser state as {"parameter/key": whole tensor on the CPU}; empty on ranks other than 0."""
        state = {}
        for name, p in self.parameters().items():
            for key, value in sorted(self.optimizer.state.get(p, {}).items()):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if self.rank == 0:
                    state[f"{name}/{key}"] = whole.cpu()
        return state

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Puts such a state back; every rank reads the whole of it."""
        parameters = self.parameters()
        for key, value in state.items():
            name, _, kind = key.rpartition("/")
            p = parameters[name]
            if isinstance(p, DTensor) and value.ndim:
                value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
            is_counter = kind == "step" and not self._counts_on_device()
            self.optimizer.state[p][kind] = value if is_counter else value.to(p.device)

    def _counts_on_device(self) -> bool:
        return self.config.optim != "adamw_torch"  # fused AdamW keeps its step beside the weights


class Fsdp2(Engine):
    """Weights, gradients and optimiser state cut along their first dimension (torch.distributed.fsdp.fully_shard)."""

    is_sharded = True

    def _wrap(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = self.bare_model.to(self.accelerator.device)
        mesh = init_device_mesh(model.device.type, (self.world_size,))
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        layers = set(model._no_split_modules or [])
        for module in model.modules():
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        self.model = model
        self.optimizer = build_optimizer(model, self.config)
        self.trainable = list(self.parameters().values())

    def is_wrapped_as(self, kind: str) -> bool:
        return kind == "fsdp2" and all(isinstance(p, DTensor) for p in self.bare_model.parameters())

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.model.set_requires_gradient_sync(is_last)
        (loss * self.world_size).backward()


class Zero(Engine):
    """DeepSpeed: optimiser state (1), gradients (2) and weights (3) in flat slices; it clips by itself."""

    def _wrap(self) -> None:
        self.optimizer = build_optimizer(self.bare_model, self.config)
        self.model, _ = self.accelerator.prepare(self.bare_model, self.optimizer)
        self.stage = self.model.zero_optimization_stage()
        self.is_sharded = self.stage == 3
        self.judge: Callable[[Tensor], Tensor] | None = None
        self.optimizer.register_step_pre_hook(lambda *_: self._before_update())

    def is_wrapped_as(self, kind: str) -> bool:
        return type(self.model).__name__ == "DeepSpeedEngine" and kind == f"zero{self.stage}"

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(is_last)
        self.model.backward(loss * self.world_size, scale_wrt_gas=False)

    def _before_update(self) -> None:
        """DeepSpeed has reduced and clipped, and calls the optimiser once per group: judge at the first of them."""
        if self.judge is not None:
            norm = torch.as_tensor(self.model.optimizer._global_grad_norm, device=self.accelerator.device)
            where = self.optimizer.param_groups[0]["params"][0].device  # the CPU where the state is offloaded
            self.optimizer.found_inf = self.judge(norm.float()).float().to(where)  # type: ignore[attr-defined]
            self.judge = None

    def step(self, judge: Callable[[Tensor], Tensor]) -> None:
        self.judge = judge
        self.model.step()
        if self.judge is not None:  # DeepSpeed found the gradient not finite and made no update
            judge(torch.full((), float("nan"), device=self.accelerator.device))
            self.judge = None

    def grad_norms(self) -> dict[str, float]:
        from deepspeed.utils import safe_get_full_grad

        grads = {name: safe_get_full_grad(p) for name, p in self.parameters().items()}
        return {name: 0.0 if grad is None else float(grad.norm()) for name, grad in grads.items()}

    def weight(self, p: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(p)
        return p.detach() if whole is None else whole  # None: frozen

    def _link_state(self) -> None:
        """Makes DeepSpeed know the state of every group: it looks once, when only the first group has some."""
        flats = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.stage == 3:
            flats = self.model.optimizer.fp32_partitioned_groups_flat
        for flat in flats:
            if not self.optimizer.state[flat]:  # what AdamW itself would begin with
                zeros = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        if self.stage < 3:
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()

    def get_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_state()
        state = {}
        counter = next(iter(self.optimizer.state.values()))["step"]
        for name, p in self.parameters().items():
            for key in ("exp_avg", "exp_avg_sq"):
                whole = safe_get_full_optimizer_state(p, key)
                if self.rank == 0:
                    state[f"{name}/{key}"] = whole.cpu()
            if self.rank == 0:
                state[f"{name}/step"] = counter.clone().cpu()
        return state

    def set_state(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._link_state()
        for name, p in self.parameters().items():
            for key in ("exp_avg", "exp_avg_sq"):
                whole = state[f"{name}/{key}"].to(self.accelerator.device)
                if self.stage == 3:  # the last rank's slice is padded
                    size = p.ds_tensor.ds_numel if hasattr(p.ds_tensor, "ds_numel") else p.ds_tensor.numel()
                    flat = nn.functional.pad(whole.flatten(), (0, size * self.world_size - whole.numel()))
                    safe_set_local_optimizer_state(p, flat[self.rank * size : (self.rank + 1) * size], key)
                else:
                    safe_set_full_optimizer_state(p, whole, key)
            steps = state[f"{name}/step"]
        for flat_state in self.optimizer.state.values():
            flat_state["step"].copy_(steps)


def start_engine(
    accelerator: Accelerator, kind: str, model: PreTrainedModel, config: PretrainConfig, bf16: bool
) -> Engine:
    """Wraps the model. Raises UserError when what came out is not what was asked for."""
    cls = Zero if kind.startswith("zero") else Fsdp2 if kind == "fsdp2" else Engine
    engine = cls(accelerator, model, config, bf16)
    if not engine.is_wrapped_as(kind):
        raise UserError(
            f"accelerate_config: asked for {kind}, got {type(engine.model).__name__} on {accelerator.num_processes} "
            f"processes; allowed: {KINDS}, as the launcher's environment says"
        )
    return engine
