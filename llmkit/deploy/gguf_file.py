"""Our model, or a stock Qwen3 or Llama, as one GGUF file for llama.cpp, Ollama and LM Studio; and read back.

Owns names, metadata, number types, and the order of the query and key rows.

    kept = write(path, qwen3, vocabulary_of(qwen3, tokenizer), "f16", "toy-sft");  model, tokenizer = read(path)

Reading goes through transformers' own reader, which nobody here wrote: one mistake cannot hide behind its inverse.
Leaves out what of a tokenizer can be written (`gguf_tokenizer.py`), and other architectures.
"""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..config import UserError
from ..model.convert import TARGETS
from .gguf_tokenizer import Refused, Vocabulary

BLOCK = 32  # numbers that share one scale in q8_0: the width of a matrix must be a multiple
ROPE = {"default", "linear", "yarn"}
YARN_KEYS = {"rope_theta", "rope_type", "factor", "original_max_position_embeddings"}


def check_rope(config: PreTrainedConfig) -> None:
    """Raises Refused for a scaling that is not written."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] not in ROPE:
        raise Refused(f"to='gguf': rope_type={rope['rope_type']!r} is not written; allowed: {', '.join(sorted(ROPE))}")
    more = {key for key, value in rope.items() if value is not None} - YARN_KEYS
    if more:
        raise Refused(f"to='gguf': {', '.join(sorted(more))} of rope_parameters cannot be written")


def _add_rope(writer: Any, config: PreTrainedConfig) -> None:
    import gguf

    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(trained)


def _add_shape(writer: Any, config: PreTrainedConfig, num_rows: int) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(num_rows)
    _add_rope(writer, config)


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """(H * K, D) with the halves of each head interleaved: llama.cpp turns neighbours in Llama, halves in Qwen3."""
    size = weight.shape[0] // num_heads
    return weight.reshape(num_heads, 2, size // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _stored(key: str, array: np.ndarray, outtype: str) -> tuple[np.ndarray, Any]:
    """A matrix as `outtype` says, in f16 where q8_0's blocks do not fit; vectors are always f32. Raises UserError."""
    import gguf

    if array.ndim < 2 or outtype == "f32":
        return array, gguf.GGMLQuantizationType.F32
    if outtype == "q8_0" and array.shape[-1] % BLOCK == 0:
        return gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    if (largest := np.abs(array).max()) > np.finfo(np.float16).max:
        raise UserError(f"outtype={outtype!r}: {key} reaches {largest:.3g}, and f16 ends at 65504; use --outtype f32")
    return array.astype(np.float16), gguf.GGMLQuantizationType.F16


def write(path: Path, model: PreTrainedModel, vocabulary: Vocabulary, outtype: str, name: str) -> list[str]:
    """Writes `model`, a Qwen3 or a Llama without options that ours lacks; the tensors that q8_0 left in f16.

    Raises Refused for what the file cannot say.
    """
    import gguf

    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config, len(vocabulary.tokens))
    vocabulary.add_to(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    kept = []
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if arch == "llama" and (end := ".".join(key.split(".")[-2:])) in heads:
            array = _interleaved(array, heads[end])
        data, kind = _stored(key, np.ascontiguousarray(array), outtype)
        if outtype == "q8_0" and kind == gguf.GGMLQuantizationType.F16:
            kept.append(key)
        writer.add_tensor(str(names.get_name(key, try_suffixes=(".weight",))), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    try:
        writer.write_tensors_to_file()
    except OSError as error:  # numpy says only how many numbers went
        raise error if error.errno else OSError(errno.ENOSPC, str(error)) from None
    writer.close()
    return kept


def metadata(path: Path) -> dict[str, Any]:
    """All there is but the vocabulary, which is long."""
    import gguf

    long = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key not in long}


def config_of(path: Path) -> PreTrainedConfig:
    """What the metadata of one of our files says; transformers' reader guesses the size of a head and drops RoPE's."""
    import gguf

    reader, found = gguf.GGUFReader(path), metadata(path)
    arch = found["general.architecture"]
    said = {key.removeprefix(f"{arch}."): value for key, value in found.items()}
    rope = {"rope_type": said.get("rope.scaling.type", "default"), "rope_theta": said["rope.freq_base"]}
    if rope["rope_type"] != "default":
        rope["factor"] = said["rope.scaling.factor"]
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = said["rope.scaling.original_context_length"]
    return TARGETS[arch][0](
        vocab_size=said["vocab_size"],
        hidden_size=said["embedding_length"],
        intermediate_size=said["feed_forward_length"],
        num_hidden_layers=said["block_count"],
        num_attention_heads=said["attention.head_count"],
        num_key_value_heads=said["attention.head_count_kv"],
        head_dim=said["attention.key_length"],
        max_position_embeddings=said["context_length"],
        rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
        rope_parameters=rope,
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def read(path: Path, config: PreTrainedConfig | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """In float32, by transformers' reader; `config`: null for one of our files, whose metadata say it."""
    where: Any = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, config=config or config_of(path), dtype=torch.float32, **where
    )
    # not AutoTokenizer: for Qwen3 it takes a class that composes accents first, which neither ours nor llama.cpp does
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, **where)
    if metadata(path).get("tokenizer.ggml.pre") == "smollm":  # the reader does not know it, and splits as GPT-2 does
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return model.eval(), tokenizer
