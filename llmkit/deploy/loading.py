"""A model as its owner names it: run folder, model folder, adapter, Hub id.

Owns what every verb of this folder begins with.   source = find(config.model_name_or_path);  model = source.load()

Leaves out what is done with the model.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..align.lora import adapter_dir, base_of, is_quantized, keep_unpacked, load_base_and_adapter, stored_config
from ..config import UserError
from ..data.tokenizer import load_tokenizer
from ..evaluate.columns import manifest_of, run_of
from ..hardware import Device, use_threads
from ..run import resolve_model_dir

DECODE_SHARE = 100.0  # one row reads every weight once and waits for memory: a thread for 20 M of them


@dataclasses.dataclass(frozen=True)
class Source:
    """`path` holds config.json, or adapter_config.json (`is_adapter`); `run` is the run folder that it belongs to."""

    name: str  # as it was given
    path: str
    is_adapter: bool
    run: Path | None
    trust_remote_code: bool = False

    @property
    def base(self) -> str:
        """The folder or Hub id whose config decides: of an adapter its base."""
        return base_of(Path(self.path)) if self.is_adapter else self.path

    @property
    def is_quantized(self) -> bool:
        """Stored in quantised form, or an adapter on such a base."""
        return "quantization_config" in stored_config(self.base)

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the run; empty without one."""
        return manifest_of(self.run) if self.run else {}

    def load(self, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
        """In eval mode; an adapter on its base, not merged. Raises UserError for what cannot be loaded."""
        if self.is_adapter:
            return load_base_and_adapter(self.path, None, dtype, self.trust_remote_code, None, device)  # type: ignore[return-value]
        where: dict[str, Any] = {"device_map": {"": device}} if self.is_quantized else {}
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, trust_remote_code=self.trust_remote_code, output_loading_info=True, **where
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model_name_or_path={self.name!r}: cannot be loaded ({reason})") from None
        if missing := sorted(found["missing_keys"]):  # drawn at random by now: reward models, encoder-decoders
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"model_name_or_path={self.name!r}: holds no weights for {missing[0]}{more}; allowed: models that "
                "continue text"
            )
        if is_quantized(model):
            keep_unpacked(model)
            return model.eval()
        return model.to(device).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own where it has one, else that of the base. Raises UserError."""
        has_own = not self.is_adapter or (Path(self.path) / "tokenizer_config.json").is_file()
        return load_tokenizer(self.path if has_own else self.base, self.trust_remote_code, "model_name_or_path")


def find(name: str, trust_remote_code: bool = False, key: str = "model_name_or_path") -> Source:
    """What `name` means; nothing is loaded. Raises UserError for a local path that is no model."""
    if not name:
        raise UserError(f"{key} is missing; name a run folder, a model folder or a Hub id")
    path = resolve_model_dir(name)
    is_local = Path(path).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    is_model, folder = (Path(path) / "config.json").is_file(), adapter_dir(path)
    if is_local and not is_model and folder is None:
        found = "no such folder" if not Path(path).exists() else "holds no config.json, model/ or adapter/"
        raise UserError(f"{key}={name!r}: {found}; name a run folder, a model folder or a Hub id")
    is_adapter = folder is not None and not is_model
    at = Path(str(folder)) if is_adapter else Path(path)
    return Source(name, str(at) if is_local else path, is_adapter, run_of(at) if is_local else None, trust_remote_code)


def use_decode_threads(device: Device, model: PreTrainedModel) -> None:
    """As many threads as writing one token of one row keeps busy; see `hardware.use_threads`."""
    use_threads(device, sum(p.numel() for p in model.parameters()) * DECODE_SHARE)
