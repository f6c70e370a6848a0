"""`--to gguf`: one file, an Ollama Modelfile beside it, and everything that is there to compare them with.

Owns who writes (our writer, or llama.cpp's converter) and who reads back: transformers always, llama.cpp where the
package llama_cpp is installed.   metrics, lines = write_gguf(config, loaded)

Costs the memory of two models in float32. Leaves out 4 bit and smaller: llama.cpp's own `llama-quantize` makes them
of the f16 file.
"""

import contextlib
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .. import model as ours
from ..align.merge import Difference, get_logits
from ..config import UserError
from ..data.tokenizer import save_tokenizer
from ..model.convert import TARGETS, from_plain, to_plain
from ..run import written_beside
from ..verbs import ExportConfig
from . import gguf_file, llama_engine, parity
from .gguf_tokenizer import Refused, Vocabulary, adds_around, ends_of_generation, normalizer_of, vocabulary_of
from .merged import Loaded
from .modelfile import modelfile

CONVERTER = "convert_hf_to_gguf.py"


def _native(loaded: Loaded) -> tuple[PreTrainedModel, Vocabulary]:
    """What our writer takes. Raises Refused with the reason for anything else."""
    model: Any = loaded.model
    try:
        if isinstance(model, ours.LlmkitForCausalLM):
            model = to_plain(model)
        elif model.config.model_type in TARGETS:
            from_plain(model)  # names the options that we do not write
        else:
            raise Refused(f"to='gguf': our writer knows qwen3 and llama, not {model.config.model_type}")
    except ValueError as error:
        raise Refused(str(error) if isinstance(error, UserError) else f"to='gguf': {error}") from None
    gguf_file.check_rope(model.config)
    return model, vocabulary_of(model, loaded.tokenizer)


def _ours_or_theirs(config: ExportConfig, loaded: Loaded) -> tuple[PreTrainedModel, Vocabulary] | None:
    """What our writer takes, None for llama.cpp's converter. Raises UserError where neither can."""
    try:
        return _native(loaded)
    except Refused as error:
        if isinstance(loaded.model, ours.LlmkitForCausalLM):
            raise  # nobody else knows the architecture
        if config.llama_cpp_dir is None:
            raise UserError(f"{error}; llama.cpp's own converter may: --llama_cpp_dir CHECKOUT_OF_LLAMA_CPP") from None
        return None


def _convert(loaded: Loaded, path: Path, outtype: str, llama_cpp_dir: str) -> None:
    """By llama.cpp's converter, in a process of its own; what it prints is seen where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = loaded.source.path
        if loaded.source.is_adapter or not Path(folder).is_dir():
            folder = scratch
            loaded.model.save_pretrained(folder)
            save_tokenizer(loaded.tokenizer, Path(folder))
        script = str(Path(llama_cpp_dir) / CONVERTER)
        argv = [sys.executable, script, folder, "--outfile", str(path), "--outtype", outtype]
        done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode or not path.is_file():
        print(done.stdout + done.stderr, file=sys.stderr, end="")
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{CONVERTER} failed ({lines[-1] if lines else f'exit code {done.returncode}'})")


def _notes(tokenizer: Any, vocabulary: Vocabulary | None, kept: list[str]) -> list[str]:
    notes = []
    if kept:
        notes.append(f"f16 stays for {', '.join(kept)}: their width is no multiple of {gguf_file.BLOCK}")
    if normalizer := normalizer_of(tokenizer):
        notes.append(f"llama.cpp has no {normalizer}: texts that the tokenizer normalises get other ids")
    if vocabulary and vocabulary.more_ends:
        notes.append(f"llama.cpp ends an answer at {', '.join(vocabulary.more_ends)} too, by its text")
    return notes


def _how_to_run(folder: Path, file: str, name: str) -> list[str]:
    """Lines that a shell takes as they are; names in Ollama are of ASCII letters, digits and, between them, _ . -"""
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"
    return [
        f"run it    llama-cli -m {shlex.quote(str(folder / file))}",
        f"ollama    cd {shlex.quote(str(folder))} && ollama create {model} -f Modelfile",
    ]


def write_gguf(config: ExportConfig, loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    """Writes the folder once everything that reads the file agrees with the model; figures, and what to print."""
    folder, outtype = Path(config.output_dir), config.outtype or "f16"
    file, native = f"{loaded.name}-{outtype}.gguf", _ours_or_theirs(config, loaded)
    plain, vocabulary = native or (None, None)
    kept: list[str] = []
    with written_beside(folder) as partial:
        path = partial / file
        if plain is not None and vocabulary is not None:
            kept = gguf_file.write(path, plain, vocabulary, outtype, loaded.name)
        else:
            _convert(loaded, path, outtype, str(config.llama_cpp_dir))
        size = path.stat().st_size
        metrics, lines = _compare(loaded, plain, path, outtype, vocabulary, str(folder / file))
        text, more = _modelfile(loaded, file)
        (partial / "Modelfile").write_text(text, encoding="utf-8")
    how = "our writer" if vocabulary else f"llama.cpp's {CONVERTER}"
    lines = [f"wrote     {folder / file}: {outtype}, {size / 1e6:.1f} MB, by {how}", *lines]
    lines += [f"note      {note}" for note in _notes(loaded.tokenizer, vocabulary, kept) + more]
    lines += _how_to_run(folder, file, loaded.name)
    return metrics | {"num_bytes": size}, lines


def _modelfile(loaded: Loaded, file: str) -> tuple[str, list[str]]:
    tokenizer: Any = loaded.tokenizer
    ends = [tokenizer.decode([i]) for i in ends_of_generation(loaded.model, tokenizer)]
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    return modelfile(file, tokenizer, ends, adds_around(tokenizer)[0], context)


def _compare(
    loaded: Loaded, plain: PreTrainedModel | None, path: Path, outtype: str, vocabulary: Vocabulary | None, what: str
) -> tuple[dict[str, Any], list[str]]:
    """Figures and lines of all comparisons there are. Raises UserError where one fails."""
    probe = parity.probe_of(loaded.model, loaded.tokenizer)
    limit, normalizer = parity.LIMITS[outtype], normalizer_of(loaded.tokenizer)
    metrics: dict[str, Any] = {}
    lines: list[str] = []
    try:
        with _no_bars():
            again, tokenizer = gguf_file.read(path, None if vocabulary else loaded.model.config)
    except (ValueError, KeyError, NotImplementedError) as error:
        if vocabulary:  # ours they can read
            raise
        lines.append(f"logits    not compared: transformers cannot read it ({str(error).splitlines()[0]})")
    else:
        worst = parity.check_weights(plain or loaded.model, again, limit.weights, what)
        found = parity.check_logits(probe, get_logits(again, probe.rows), limit.logits, what)
        num_texts, num_chats = parity.check_tokens(loaded.tokenizer, tokenizer, what, normalizer)
        lines += [_line("transformers", found), parity.say_tokens(num_texts, num_chats)]
        metrics |= {"max_logit_difference": found.max, "mean_logit_difference": found.mean, "top1": found.top1}
        metrics |= {"max_weight_difference": worst, "num_texts": num_texts, "num_chats": num_chats}
    if llama_engine.is_installed():
        found = _compare_in_llama_cpp(loaded, path, probe, limit.engine, normalizer, f"{what} in llama.cpp")
        lines.append(_line("llama.cpp", found))
        metrics |= {"llama_cpp_max_logit_difference": found.max, "llama_cpp_top1": found.top1}
    return metrics, lines


def _compare_in_llama_cpp(
    loaded: Loaded, path: Path, probe: parity.Probe, limit: float, normalizer: str | None, what: str
) -> Difference:
    with llama_engine.opened(path, max(row.shape[1] for row in probe.rows)) as engine:
        parity.check_ids(loaded.tokenizer, engine.encode, what, normalizer)
        logits: Tensor = engine.logits(probe.rows)
    return parity.check_logits(probe, logits, limit, what)


@contextlib.contextmanager
def _no_bars() -> Any:
    """transformers' reader shows a bar per file, whatever its logging says."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown, reader.tqdm = reader.tqdm, lambda rows, **_: rows
    try:
        yield
    finally:
        reader.tqdm = shown


def _line(who: str, found: Difference) -> str:
    return (
        f"logits    in {who} differ by {found.max:.2g} at most, {found.mean:.2g} on average (deviation "
        f"{found.deviation:.2g}); the likeliest token is the same at {found.top1:.1%} of {found.positions} positions"
    )
