"""Saving and resuming: whole folders, verified when they are read.

Owns `model/`, `adapter/` and `checkpoints/step-00000500/` of a run folder.

    save_checkpoint(engine, tokenizer, run.folder, state, tensors, limit);  found = find_checkpoint(folder, True, say)

    step-00000500/  model/                  a plain transformers folder; for LoRA the merged weights, adapter/ beside it
                    trainable.safetensors   LoRA only: the trained tensors as they are, since merging rounds
                    optimizer.safetensors   "parameter/key": whole tensors, the same under every engine
                    state.safetensors       random generators of every rank, the monitor's window
                    state.json              step, tokens, recipe, what data, tokenizer and model must be, world size
                    index.json              size and SHA-256 of every file above

The learning rate and the batches are functions of the step, and there is no loss scaler (bf16 needs none), so none of
them has state. Nothing is pickled. Leaves out what is restored into the loop: `pretrain.py` does that.
"""

import copy
import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UserError
from ..data.tokenizer import save_tokenizer
from ..run import remove_partials, written_beside
from .engines import Engine

INDEX = "index.json"
STEP = "step-????????"
# settings that do not change what is trained, so a difference is not worth a line
QUIET = {"output_dir", "data_dir", "store_dir", "resume_from_checkpoint", "accelerate_config", "num_processes"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified one."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        return self.state["step"]


# ---- writing


def _save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict) -> None:
    model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder)


def _parts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]
) -> dict[str, Callable[[Path], None]]:
    """Subfolder -> what writes it: config, safetensors, tokenizer, generation config, our model's code.

    Raises UserError for weights that are not finite.
    """
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(
            "the weights are not finite any more: not saved, earlier checkpoints are untouched; "
            "lower learning_rate or raise warmup_steps"
        )
    model = engine.bare_model
    if not hasattr(model, "merge_and_unload"):
        with torch.device("meta"):
            plain = engine.plain_class(model.config)
        plain.generation_config = model.generation_config
        return {"model": lambda folder: _save_model(plain, tokenizer, folder, weights)}

    def save_merged(folder: Path) -> None:
        merged = copy.deepcopy(model).merge_and_unload()
        _save_model(merged, tokenizer, folder, merged.state_dict())

    return {"adapter": lambda folder: model.save_pretrained(folder, state_dict=weights), "model": save_merged}


def save_run_model(engine: Engine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `model/`, for LoRA merged, with `adapter/` beside it. Every rank calls: whole weights are gathered."""
    weights = engine.get_weights()
    if engine.accelerator.is_main_process:
        for name, save in _parts(engine, tokenizer, weights).items():
            with written_beside(folder / name, replace=True) as partial:
                save(partial)
    engine.accelerator.wait_for_everyone()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / INDEX)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def _as_text(index: dict) -> str:
    return json.dumps(index, indent=1) + "\n"


def save_checkpoint(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    save_total_limit: int | None,
) -> Path:
    """Writes `checkpoints/step-NNNNNNNN`, then removes the oldest beyond `save_total_limit`. Every rank calls.

    Raises UserError when the disk is full; earlier checkpoints are then untouched.
    """
    path = folder / "checkpoints" / f"step-{state['step']:08d}"
    weights, optimizer, generators = engine.get_weights(), engine.get_state(), _gather_generators(engine)
    if engine.accelerator.is_main_process:
        parts = _parts(engine, tokenizer, weights)
        with written_beside(path, replace=True) as partial:
            for name, save in parts.items():
                save(partial / name)
            if "adapter" in parts:
                trained = {name: weights[name].contiguous() for name in engine.parameters()}
                save_file(trained, partial / "trainable.safetensors")
            save_file(optimizer, partial / "optimizer.safetensors")
            save_file({**generators, **tensors}, partial / "state.safetensors")
            (partial / "state.json").write_text(json.dumps(state, indent=1, default=str), encoding="utf-8")
            (partial / INDEX).write_text(_as_text(_files(partial)), encoding="utf-8")
        _remove_oldest(path.parent, save_total_limit)
    engine.accelerator.wait_for_everyone()
    return path


def _remove_oldest(parent: Path, save_total_limit: int | None) -> None:
    for old in sorted(parent.glob(STEP))[: -save_total_limit if save_total_limit else 0]:
        hidden = old.with_name(f".{old.name}.gone")  # a kill must not leave half of it under its name
        os.rename(old, hidden)
        shutil.rmtree(hidden)


def seal_checkpoint(written: Path, path: Path, save_total_limit: int | None) -> None:
    """Turns a folder that another trainer wrote into a checkpoint: indexed, on the disk, then renamed to `path`."""
    (written / INDEX).write_text(_as_text(_files(written)), encoding="utf-8")
    with written_beside(path, replace=True) as partial:
        for file in written.iterdir():
            os.rename(file, partial / file.name)
    written.rmdir()
    _remove_oldest(path.parent, save_total_limit)


# ---- random generators: torch on the CPU and the device, numpy and Python


def _generators(device: torch.device) -> dict[str, Tensor]:
    _, keys, position, has_gauss, gauss = np.random.get_state()
    _version, words, python_gauss = random.getstate()
    own = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if python_gauss is None else python_gauss], dtype=torch.float64),
    }
    if device.type in ("cuda", "mps"):
        own["device"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()
    return own


def _gather_generators(engine: Engine) -> dict[str, Tensor]:
    own = _generators(engine.accelerator.device)
    return {f"rng/{rank}/{key}": value for rank, ours in enumerate(engine.gather(own)) for key, value in ours.items()}


def restore_generators(tensors: dict[str, Tensor], rank: int, device: torch.device) -> bool:
    """False when the checkpoint has no such rank: then they stay as seeded."""
    prefix = f"rng/{rank}/"
    own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    if not own:
        return False
    torch.set_rng_state(own["torch"])
    position, has_gauss, gauss = own["numpy_rest"].tolist()
    np.random.set_state(("MT19937", own["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    python_gauss = own["python_gauss"].item()
    random.setstate((3, tuple(own["python"].tolist()), None if python_gauss != python_gauss else python_gauss))
    if "device" in own and device.type == "cuda":
        torch.cuda.set_rng_state(own["device"], device)
    elif "device" in own and device.type == "mps":
        torch.mps.set_rng_state(own["device"])
    return True


# ---- reading


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file must be there, and be the one that was written."""
    try:
        text = (folder / INDEX).read_text(encoding="utf-8")
        index = json.loads(text)
        if not isinstance(index, dict) or _as_text(index) != text:
            return f"{INDEX} was changed"
    except (OSError, ValueError) as error:
        return f"{INDEX} cannot be read ({type(error).__name__})"
    found = _files(folder)
    for name, digest in index.items():  # what others put beside them is not ours to judge
        if name not in found:
            return f"{name} is missing"
        if digest != found[name]:
            return f"{name} was changed (SHA-256 differs)"
    return None


def _open(folder: Path) -> Checkpoint:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    tensors = folder / "state.safetensors"  # TRL's trainers keep theirs in files of their own
    return Checkpoint(folder, state, load_file(tensors) if tensors.exists() else {})


def find_checkpoint(run_folder: Path, asked: bool | str, say: Callable[[str], object]) -> Checkpoint | None:
    """The checkpoint to go on from: the newest good one of the run folder, or the one that is named.

    `say` hears of damaged ones that are passed over. None when the run folder has no checkpoint yet. Raises UserError
    for a named one that is damaged or is not the newest of this run, and when all are damaged. Changes nothing.
    """
    parent = run_folder / "checkpoints"
    if isinstance(asked, str):
        folder = Path(asked)
        if not folder.is_dir():
            raise UserError(f"resume_from_checkpoint={asked!r}: no such folder; give true, or a folder of checkpoints/")
        if wrong := damage(folder):
            raise UserError(f"resume_from_checkpoint={asked!r}: {wrong}; true takes the newest good one")
        later = [path.name for path in parent.glob(STEP) if path.name > folder.name]
        if folder.resolve().parent == parent.resolve() and later:
            raise UserError(
                f"resume_from_checkpoint={asked!r}: {max(later)} of the same run is newer; "
                "give true, or another output_dir to branch off from the older one"
            )
        return _open(folder)
    folders = sorted(parent.glob(STEP), reverse=True)
    for folder in folders:
        wrong = damage(folder)
        if wrong is None:
            return _open(folder)
        say(f"resume    {folder.name} is damaged: {wrong}; looking for an earlier one")
    if folders:
        raise UserError(f"resume_from_checkpoint: all {len(folders)} checkpoints of {parent} are damaged; start anew")
    return None


def clear_the_way(run_folder: Path, checkpoint: Checkpoint | None) -> None:
    """Removes what a kill left half written; sets damaged checkpoints aside as `damaged-step-…`."""
    parent = run_folder / "checkpoints"
    for folder in (run_folder, parent):
        remove_partials(folder)
    if checkpoint and checkpoint.folder.resolve().parent == parent.resolve():
        for path in parent.glob(STEP):
            if path.name > checkpoint.folder.name:
                aside = parent / f"damaged-{path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)


def check_same(checkpoint: Checkpoint, identity: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Lines "key: before -> now" for every setting that changed.

    Raises UserError naming the data set, tokenizer or model part that differs, or the batch that no longer adds up.
    """
    before, after = checkpoint.state["identity"], json.loads(json.dumps(identity, default=str))
    for key in [*after, *(key for key in before if key not in after)]:
        if key.startswith("model.") and not (key in before and key in after):
            continue  # a setting that the other version of transformers does not have
        now = after.get(key)
        if before.get(key) != now:
            what, how = key.split(".", 1)[0], "use the one it was trained with, or start a new run"
            if key == "rows_per_step":
                what = "batch"
                how = "keep per_device_train_batch_size x gradient_accumulation_steps x processes as it was"
            raise UserError(
                f"resume_from_checkpoint: the {what} differs from that of {checkpoint.folder.name}: {key} was "
                f"{_short(before.get(key))}, is {_short(now)}; {how}"
            )
    old = checkpoint.state["recipe"]
    same = json.loads(json.dumps(settings, default=str))
    return [f"{key}: {old.get(key)} -> {same[key]}" for key in same if key not in QUIET and old.get(key) != same[key]]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's weights into a model of the same shape, bit for bit, before an engine wraps it."""
    trainable = checkpoint.folder / "trainable.safetensors"
    if trainable.exists():
        with torch.no_grad(), safe_open(trainable, "pt") as file:
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(file.get_tensor(name))
        return model
    saved = type(model).from_pretrained(checkpoint.folder / "model", dtype=torch.float32)
    model.load_state_dict(saved.state_dict())
    return model
