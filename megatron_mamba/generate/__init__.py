"""Text generation: prompts of any lengths in one batch through the chunked path, then one token of every row a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mamba.generate.sampling import GenerationSettings, Sampler
from megatron_mamba.model.lm import LanguageModel
from megatron_mamba.model.module import Cache

__all__ = ["GenerationSettings", "Sampler", "generate", "prefill"]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    eos_id: int | None,
    on_token: Callable[[int, int], None] | None = None,
    *,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids) by up to `settings.max_new_tokens` tokens; returns the new ones of each row.

    A row ends before the first `eos_id` it draws (None: never), which is not returned; an empty prompt starts from
    `eos_id`, the token that every document follows in training. `on_token(row, token)` is called as tokens are made.
    Rows do not affect each other. Only ids below `vocab_size` are drawn, the tokenizer's: a model may have more, which no text
    gives. `dtype` is the model's compute dtype, by default that of its weights (a model under
    mixed precision computes in another). Raises ConfigError for bad settings and ValueError for bad prompts.
    """
    settings.validate()
    prompts = _checked(prompts, model.config.vocab_size, eos_id)
    sampler = Sampler(settings, len(prompts))
    new: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    training = model.training
    model.eval()
    try:
        logits, cache = prefill(model, prompts, settings.max_new_tokens, settings.prefill_length, dtype)
        for step in range(settings.max_new_tokens):
            next_B = sampler(logits[:, :vocab_size])
            for row, token in enumerate(next_B.tolist()):
                running[row] = running[row] and token != eos_id
                if running[row]:
                    new[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
            if not any(running) or step == settings.max_new_tokens - 1:
                break
            logits = model(next_B[:, None], cache=cache, last_only=True)
    finally:
        model.train(training)
    return new


@torch.no_grad()
def prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    room: int,
    length: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Cache]:
    """Read the prompts, `length` positions at a time: logits `[B, V]` after each prompt's last token, and the state there.

    Prompts of different lengths are padded on the left; padding leaves no trace. The cache has room for `room` more tokens.
    """
    device = model.context.device
    longest = max(len(prompt) for prompt in prompts)
    start = torch.tensor([longest - len(prompt) for prompt in prompts])
    tokens_BS = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
    padded = start.to(device) if bool(start.any()) else None
    cache = model.new_cache(len(prompts), longest + room, dtype or model.embedding.local("weight").dtype, padded)
    for piece in tokens_BS.to(device).split(length, dim=1):
        logits = model(piece, cache=cache, last_only=True)
    return logits, cache


def _checked(prompts: Sequence[Sequence[int]], vocab_size: int, eos_id: int | None) -> list[Sequence[int]]:
    if not prompts:
        raise ValueError("prompts: the list is empty; give at least one prompt")
    if eos_id is None and not all(prompts):
        raise ValueError("prompts: one is empty and eos_id is None; give a prompt, or an eos_id to start from")
    document_start = [] if eos_id is None else [eos_id]
    filled = [prompt or document_start for prompt in prompts]
    for row, prompt in enumerate(filled):
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"prompts[{row}]: token {wrong[0]} is not in the model's vocabulary [0, {vocab_size}); "
                             "encode it with the tokenizer the model was trained with")  # fmt: skip
    return filled
