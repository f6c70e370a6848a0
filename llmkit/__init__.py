"""llmkit: train small language models from scratch or adapt existing ones, so that nothing goes silently wrong."""

__version__ = "0.1.0"
