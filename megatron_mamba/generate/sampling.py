"""Choosing the next token of every row: greedy, temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mamba.config import require


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How much to generate, and how each token is drawn."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    """Logits are divided by it; 0 = greedy."""
    top_k: int = 0
    """Only the k most probable tokens; 0 = all."""
    top_p: float = 1.0
    """Only the smallest set of most probable tokens (of those top_k leaves) with this much probability; 1 = all."""
    seed: int = 1234
    prefill_length: int = 2048
    """Positions of the prompts computed at one time: bounds memory, changes nothing else."""

    def validate(self) -> None:
        """Raise :class:`~megatron_mamba.config.ConfigError` for a value that cannot work."""
        positive = "must be positive", "Use 1 or more"
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, *positive)
        require(self.prefill_length > 0, "prefill_length", self.prefill_length, *positive)
        require(0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "must be a number >= 0",
                "Use 0 for greedy decoding, 1 for the model's own distribution")  # fmt: skip
        require(self.top_k >= 0, "top_k", self.top_k, "must not be negative", "Use 0 to keep every token")
        require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "must lie in (0, 1]", "Use 1 to keep every token")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2^63)", "Use a small whole number")


class NotFiniteError(ArithmeticError):
    """Logits from which no token can be drawn."""


class Sampler:
    """Draws one token a row and call. Row i has a random stream of its own, which only the seed and i decide: what a row
    draws depends neither on how many rows there are, nor on the device."""

    def __init__(self, settings: GenerationSettings, rows: int) -> None:
        settings.validate()
        self.settings = settings
        root = torch.Generator().manual_seed(settings.seed)
        seeds = [int(torch.randint(2**63 - 1, (), generator=root)) for _ in range(rows)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Token ids `[B]` int64 for logits `[B, V]`. Raises :class:`NotFiniteError` for logits with NaN, or infinite ones."""
        if not bool(logits_BV.amax(dim=-1).isfinite().all()):
            raise NotFiniteError(
                "the model's logits are not finite numbers: no token can be drawn. Use precision=fp32, or another checkpoint"
            )
        if self.settings.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probabilities, tokens = candidates(logits_BV, self.settings)
        draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators]
        # Inverse of the distribution function: one uniform number a token, drawn on the CPU whatever the device.
        cumulative = probabilities.double().cumsum(dim=-1)
        threshold = torch.stack(draws).to(cumulative.device) * cumulative[:, -1]
        choice = torch.searchsorted(cumulative, threshold[:, None], right=True).clamp_(max=tokens.shape[-1] - 1)
        return tokens.gather(1, choice).squeeze(1)


def candidates(logits_BV: Tensor, settings: GenerationSettings) -> tuple[Tensor, Tensor]:
    """The distribution a token is drawn from, at a temperature > 0: probabilities and token ids, both `[B, K]`.

    The K tokens are in falling order of probability wherever top_k or top_p is set. As is usual, top_p counts what top_k
    left as a whole, and the token that crosses it is kept. Probabilities sum to 1, in fp32 (fp64 for fp64 logits).
    """
    logits = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    # Largest logit first, so that a temperature near 0 means greedy and never an overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / settings.temperature
    if settings.top_k:
        logits, tokens = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1)
    elif settings.top_p < 1.0:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    else:
        tokens = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities, tokens
