"""Federated LoRA fine-tuning of language models, simulated on Ray with privacy that can be checked."""

__version__ = "0.1.0"
