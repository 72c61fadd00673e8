"""The model: a pattern of mixers, built from one table of parameters."""

from megatron_mamba.model.lm import LanguageModel, build, build_pipeline

__all__ = ["LanguageModel", "build", "build_pipeline"]
