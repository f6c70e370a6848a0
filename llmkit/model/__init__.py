"""llmkit's GPT; importing this registers it, so that `AutoModelForCausalLM.from_pretrained` knows it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_llmkit import LlmkitConfig
from .modeling_llmkit import LlmkitForCausalLM, LlmkitForSequenceClassification, LlmkitModel

AutoConfig.register("llmkit", LlmkitConfig, exist_ok=True)
AutoModel.register(LlmkitConfig, LlmkitModel, exist_ok=True)
AutoModelForCausalLM.register(LlmkitConfig, LlmkitForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LlmkitConfig, LlmkitForSequenceClassification, exist_ok=True)
LlmkitConfig.register_for_auto_class()  # save_pretrained then copies the code beside the weights
LlmkitModel.register_for_auto_class("AutoModel")
LlmkitForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LlmkitForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["LlmkitConfig", "LlmkitForCausalLM", "LlmkitForSequenceClassification", "LlmkitModel"]
