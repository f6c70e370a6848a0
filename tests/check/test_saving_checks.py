"""What comes back from a file: clean but unusual models, tokenizers and adapters are not called broken."""

import subprocess
import sys
import textwrap

import pytest
import torch
from planted.plants_saving import Louder, ScaledAndStored, with_adapter
from tiny import bpe_tokenizer, llama, lm_trainer, sft_trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer

from llmkit.check import runner
from llmkit.check.attach import from_parts
from llmkit.check.report import CheckResult
from llmkit.check.runner import get_check, run_one

FAMILY = (
    "reload-differs",
    "auto-class-differs",
    "tied-head-broken",
    "resize-corrupts",
    "template-lost-on-save",
    "adapter-lost",
)


def result(name: str, **parts) -> CheckResult:
    return run_one(get_check(name), from_parts(**parts))


def fails(**parts) -> list[str]:
    results = (result(name, **parts) for name in FAMILY)
    return [f"{r.id}: {r.status} {r.measured} {r.evidence}" for r in results if r.status in ("fail", "warn", "not_run")]


class OtherLoss(LlamaForCausalLM):
    """Of the user's own, registered nowhere, with Llama's logits."""

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = out.logits.square().mean() if labels is not None else None
        return out


# models


@pytest.mark.parametrize("tied", [True, False])
def test_a_clean_model_comes_back_in_any_dtype(tied):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not fails(model=llama(tie_word_embeddings=tied).to(dtype), tokenizer=bpe_tokenizer())


def test_a_model_that_was_loaded_in_bfloat16_and_resized_comes_back(tmp_path):
    llama(tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(450)
    assert model.dtype == torch.bfloat16 and not fails(model=model)


def test_a_compiled_model_is_checked_as_the_model_inside():
    assert not fails(model=torch.compile(llama(), backend="eager"))


def test_a_stored_buffer_and_an_own_class_are_no_difference_on_reload():
    assert result("reload-differs", model=ScaledAndStored(llama().config)).status == "pass"
    assert result("auto-class-differs", model=ScaledAndStored(llama().config)).status == "warn"


def test_a_subclass_with_another_loss_is_the_same_model_for_others():
    assert not fails(model=OtherLoss(llama().config))


def test_a_registered_class_is_what_the_auto_class_makes(monkeypatch):
    class Config(type(llama().config)):
        model_type = "llmkit_test_louder"

    class Model(Louder):
        config_class = Config

    AutoConfig.register("llmkit_test_louder", Config, exist_ok=True)
    AutoModelForCausalLM.register(Config, Model, exist_ok=True)
    model = Model(Config(**llama().config.to_diff_dict()))
    assert result("auto-class-differs", model=model).status == "pass"


def test_accelerates_autocast_around_the_forward_is_not_a_difference():
    trainer = lm_trainer(bf16=True, max_steps=1)
    trainer.train()
    forward = vars(trainer.model)["forward"]
    assert not fails(trainer=trainer)
    report = runner.run(from_parts(trainer), runner.Selection(only=("model", "loss")))
    assert not [c for c in report.checks if c.status in ("fail", "not_run")]
    assert vars(trainer.model)["forward"] is forward


def test_a_trainer_with_trls_head_and_checkpointing_comes_back():
    assert not fails(trainer=sft_trainer(gradient_checkpointing=True))


def test_an_adapter_of_a_trainer_comes_back():
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    assert not fails(trainer=sft_trainer(peft_config=config))
    trainer = sft_trainer(peft_config=config, bf16=True, max_steps=1)
    trainer.train()  # accelerate leaves its autocast on the model
    assert result("adapter-lost", trainer=trainer).status == "pass"


def test_a_trainer_that_saves_something_else_is_not_judged():
    class Pickling(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            torch.save(self.model.state_dict(), f"{output_dir}/state.pt")

    assert result("reload-differs", trainer=lm_trainer(cls=Pickling)).status == "not_run"


def test_saving_leaves_the_trainer_and_its_folder_as_they_were():
    trainer = lm_trainer()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    folder = trainer.args.output_dir
    run_one(get_check("reload-differs"), from_parts(trainer))
    after = trainer.model.state_dict()
    assert trainer.args.output_dir == folder and all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.slow
def test_travelling_code_that_misses_a_module_is_found_in_a_fresh_process(tmp_path):
    """The class imports a module that only this process has on its path; twice 4 s."""
    for is_broken in (False, True):
        folder = tmp_path / str(is_broken)
        folder.mkdir()
        (folder / "own_helper.py").write_text("FACTOR = 2.0\n")
        (folder / "own_model.py").write_text(
            textwrap.dedent(
                f"""
                from transformers import LlamaConfig, LlamaForCausalLM
                {"from own_helper import FACTOR" if is_broken else "FACTOR = 2.0"}

                class OwnConfig(LlamaConfig):
                    model_type = "own"

                class OwnModel(LlamaForCausalLM):
                    config_class = OwnConfig

                    def forward(self, *args, **kwargs):
                        out = super().forward(*args, **kwargs)
                        out.logits = out.logits * FACTOR
                        return out

                OwnConfig.register_for_auto_class()
                OwnModel.register_for_auto_class("AutoModelForCausalLM")
                """
            )
        )
        code = """
            import sys; sys.path.insert(0, sys.argv[1])
            import own_model
            from llmkit.check.attach import from_parts
            from llmkit.check.runner import get_check, run_one
            config = own_model.OwnConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2)
            result = run_one(get_check("auto-class-differs"), from_parts(model=own_model.OwnModel(config)))
            print("STATUS", result.status, result.measured, result.evidence)
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        status = next(line for line in done.stdout.splitlines() if line.startswith("STATUS"))
        assert ("fail" if is_broken else "pass") in status, status


# heads and rows


def test_a_head_that_is_not_tied_by_the_config_is_not_asked():
    assert result("tied-head-broken", model=llama()).status == "not_applicable"


def test_tying_that_does_nothing_is_found_in_a_class_without_tied_keys():
    class Undeclared(LlamaForCausalLM):
        _tied_weights_keys = None

    assert result("tied-head-broken", model=Undeclared(llama(tie_word_embeddings=True).config)).status == "fail"


def test_new_rows_of_zeros_are_too_short(monkeypatch):
    resize = LlamaForCausalLM.resize_token_embeddings

    def zeros(self, count, *args, **kwargs):
        before = self.get_input_embeddings().num_embeddings
        out = resize(self, count, *args, **kwargs)
        self.get_input_embeddings().weight.data[before:] = 0
        return out

    monkeypatch.setattr(LlamaForCausalLM, "resize_token_embeddings", zeros)
    assert result("resize-corrupts", model=llama()).status == "fail"


# templates


def test_a_tokenizer_without_template_is_not_asked_and_another_than_the_references_is_a_warning(tmp_path):
    assert result("template-lost-on-save", tokenizer=bpe_tokenizer(chat=False)).status == "not_applicable"
    other = bpe_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_start|>", "<s>")
    other.save_pretrained(tmp_path)
    assert result("template-lost-on-save", tokenizer=bpe_tokenizer(), reference=tmp_path).status == "warn"


def test_several_named_templates_and_one_that_refuses_system_messages_are_clean():
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    assert result("template-lost-on-save", tokenizer=tokenizer).status == "pass"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    )
    assert result("template-lost-on-save", tokenizer=tokenizer).status == "pass"


# adapters


def adapters() -> dict:
    from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig

    lora = dict(r=2, task_type="CAUSAL_LM")
    return {
        "all": LoraConfig(target_modules="all-linear", **lora),
        "modules to save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], **lora),
        "token rows": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4], **lora),
        "embedding": LoraConfig(target_modules=["embed_tokens"], **lora),
        "dora": LoraConfig(target_modules=["q_proj"], use_dora=True, **lora),
        "one layer": LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], **lora),
        "pissa": LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", **lora),
        "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "vera": VeraConfig(target_modules=["q_proj"], **lora),
        "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=100, **lora),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }


@pytest.mark.parametrize("kind", adapters())
def test_every_kind_of_adapter_comes_back_untrained_as_it_is(kind):
    from peft import get_peft_model

    found = result("adapter-lost", model=get_peft_model(llama(), adapters()[kind]))
    assert found.status == ("not_applicable" if kind == "pissa" else "pass"), found


def test_an_adapter_of_another_name_is_found_in_its_folder():
    from peft import LoraConfig

    model = with_adapter()
    model.add_adapter("mine", LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("mine")
    assert result("adapter-lost", model=model).status == "pass"


def test_an_adapter_that_trains_a_copy_of_a_tied_embedding_is_warned_of():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    assert result("tied-head-broken", model=model).status == "warn"
    rows = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM")
    model = get_peft_model(llama(tie_word_embeddings=True), rows)
    assert result("tied-head-broken", model=model).status == "pass"


def test_a_model_whose_constructor_wants_more_than_a_config_is_a_warning():
    class Wide(LlamaForCausalLM):
        def __init__(self, config, extra):
            super().__init__(config)
            self.extra = nn.Linear(2, extra)

    assert result("reload-differs", model=Wide(llama().config, 3)).status == "warn"
