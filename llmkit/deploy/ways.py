"""The three ways in which a card says to load a model, each as it is pasted.

    lines = ways(known)

Owns which commands fit what kind of model. Leaves out the rest of the card (card.py).
"""

from ..report.runs import Facts
from .facts import Known

RANKS = (8, 16, 32, 64, 128, 256)  # that vLLM can set aside room for; 16 unless told


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


def _shell(*lines: str) -> list[str]:
    return ["```sh", *lines, "```", ""]


def _target(config: Facts) -> str | None:
    """The stock architecture that a model of ours can be written as; None: none computes the same."""
    if config.get("model_type") != "llmkit" or "quantization_config" in config:
        return None
    if config.get("hidden_act", "silu") != "silu" or config.get("final_logit_softcapping") is not None:
        return None
    return "qwen3" if config.get("qk_norm", True) else "llama"


def ways(known: Known) -> list[str]:
    if known.kind == "gguf":
        return _of_gguf(known)
    code = ", trust_remote_code=True" if "auto_map" in known.config else ""
    if known.is_reward:
        lines = _of_reward(known, code)
    else:
        lines = _of_adapter(known, code) if known.kind == "adapter" else _of_model(known, code)
    if code:
        whose = "this repository" if known.kind == "model" else "the base's repository"
        lines += [f"`trust_remote_code` runs the code in {whose}: read it first.", ""]
    return lines


def _of_gguf(known: Known) -> list[str]:
    repo, file = known.repo_id, next(path for path in known.files if path.endswith(".gguf"))
    ollama = [f"ollama run hf.co/{repo}"]
    if "Modelfile" in known.files:
        name = repo.split("/")[1].lower()
        ollama = [f"hf download {repo} --local-dir model", f"cd model && ollama create {name} -f Modelfile"]
        ollama.append(f"ollama run {name}")
    return [
        "With llama.cpp:", "", *_shell(f"hf download {repo} {file} --local-dir model", f"llama-cli -m model/{file}"),
        "With Ollama:", "", *_shell(*ollama),
        "With Python (`pip install llama-cpp-python`):", "",
        *_python("from llama_cpp import Llama", "", f'model = Llama.from_pretrained("{repo}", filename="{file}")'),
    ]  # fmt: skip


def _tokenizer(known: Known, code: str) -> str:
    """Also where there is no code to be run: its repository has some, and transformers asks before it looks."""
    where = known.repo_id if known.has_tokenizer else known.base_model or known.repo_id
    return f'tokenizer = AutoTokenizer.from_pretrained("{where}"{code})'


def _of_model(known: Known, code: str) -> list[str]:
    repo, target = known.repo_id, _target(known.config)
    is_ours = known.config.get("model_type") == "llmkit"
    lines = ["With transformers:", ""]
    lines += _python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}"{code})', _tokenizer(known, code),
    )  # fmt: skip
    chat = ' --apply_chat_template --prompt "Hello"' if known.has_chat_template else ' --prompt "Hello"'
    trust = " --trust_remote_code" if code and not is_ours else ""
    lines += ["With llmkit:", "", *_shell(f"llmkit generate --model_name_or_path {repo}{chat}{trust}")]
    if gguf := next((path for path in known.files if path.endswith(".gguf")), None):
        here = [f"hf download {repo} {gguf} --local-dir model", f"llama-cli -m model/{gguf}"]
        return [*lines, "With llama.cpp:", "", *_shell(*here)]
    if target:
        export = f"llmkit export --model_name_or_path {repo} --to {target} --output_dir plain"
        said = f"With vLLM and all that read {target.capitalize()}, without code of ours:"
        return [*lines, said, "", *_shell(export, "vllm serve plain")]
    if is_ours or "quantization_config" in known.config:
        call = f'pipeline("text-generation", "{repo}"{code})'
        return [*lines, "As a pipeline:", "", *_python("from transformers import pipeline", "", f"writer = {call}")]
    return [*lines, "With vLLM:", "", *_shell(f"vllm serve {repo}" + (" --trust-remote-code" if code else ""))]


def _of_adapter(known: Known, code: str) -> list[str]:
    repo, target = known.repo_id, _target(known.config)
    how, imports = known.base_quantization, "from transformers import AutoTokenizer"
    quantized, dequantize = "", ""
    if how and "quantization_config" not in known.config:
        given = ", ".join(f"{key}={value!r}" for key, value in sorted(how.items()))
        imports = "from transformers import AutoTokenizer, BitsAndBytesConfig"
        quantized, dequantize = f", quantization_config=BitsAndBytesConfig({given})", " --dequantize true"
    lines = ["With PEFT, which fetches the base, too:", ""]
    lines += _python(
        "from peft import AutoPeftModelForCausalLM", imports, "",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}"{code}{quantized})', _tokenizer(known, code),
    )  # fmt: skip
    if quantized:
        lines += ["It was trained on that quantised base; on full-precision weights it is another model.", ""]
    is_ours = known.config.get("model_type") == "llmkit"
    trust = " --trust_remote_code true" if code and not is_ours else ""
    merge = f"llmkit merge --model_name_or_path adapter --output_dir merged{dequantize}{trust}"
    lines += ["With llmkit, as one model with its base:", ""]
    lines += _shell(f"hf download {repo} --local-dir adapter", merge)
    if target:
        plain = f"llmkit export --model_name_or_path merged --to {target} --output_dir plain"
        said = f"Then with vLLM and all that read {target.capitalize()}, without code of ours:"
        return [*lines, said, "", *_shell(plain, "vllm serve plain")]
    if is_ours:
        call = "llmkit generate --model_name_or_path adapter"
        return [*lines, "Or on its base as it is:", "", *_shell(call)]
    rank = next((rank for rank in RANKS if rank >= known.rank), known.rank)
    room = f" --max-lora-rank {rank}" if rank > 16 else ""
    served = f"vllm serve {known.base_model} --enable-lora --lora-modules tuned={repo}{room}"
    return [*lines, "With vLLM:", "", *_shell(served + (" --trust-remote-code" if code else ""))]


def _of_reward(known: Known, code: str) -> list[str]:
    """Of an adapter in two steps: PEFT's own class loses trust_remote_code and num_labels on the way."""
    repo, cls = known.repo_id, "AutoModelForSequenceClassification"
    imports = [f"from transformers import AutoTokenizer, {cls}"]
    load = [f'model = {cls}.from_pretrained("{repo}"{code})']
    where = f'"{repo}"{code}'
    keep, folder = [f"hf download {repo} --local-dir reward"], "reward"
    if known.kind == "adapter":
        imports.insert(0, "from peft import PeftModel")
        load = [
            f'base = {cls}.from_pretrained("{known.base_model}", num_labels=1{code})',
            f'model = PeftModel.from_pretrained(base, "{repo}").merge_and_unload()',
        ]
        where, keep = "model=model, tokenizer=tokenizer", []
    lines = ["With transformers:" if known.kind == "model" else "With PEFT:", ""]
    ask = [
        'chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]',
        'ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)',
    ]
    ask = ask if known.has_chat_template else ['ids = tokenizer("Hello. Good day.", return_tensors="pt")']
    lines += _python(*imports, "", *load, _tokenizer(known, code), *ask,
                     "print(model(**ids).logits)  # the higher, the better the answer")  # fmt: skip
    call = f'pipeline("text-classification", {where}, function_to_apply="none")'
    lines += ["As a pipeline:", "", *_python("from transformers import pipeline", "", f"scorer = {call}")]
    lines += ["With llmkit, as a reward of reinforcement:", ""]
    if known.kind == "adapter":
        lines += _python(f'model.save_pretrained("{folder}")', f'tokenizer.save_pretrained("{folder}")')
    return [*lines, *_shell(*keep, f"llmkit grpo recipe.yaml --reward_funcs '[{folder}]'")]
