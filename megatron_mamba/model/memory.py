"""What a layer holds and sends, without a device: the layer's own code is run on meta tensors and its storages are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamba_kernels.common
from mamba_kernels import backend
from megatron_mamba.config import MIXER_KINDS, Config, ModelConfig
from megatron_mamba.layout import ParallelConfig, Recompute, RecomputeConfig
from megatron_mamba.model.lm import DTYPES, LanguageModel, master_dtype
from megatron_mamba.parallel import ring_attention, torch_private
from megatron_mamba.parallel.dry_run import Ledger, allocated, dry_context, group_names
from megatron_mamba.parallel.fsdp import local

SCANS = {"mamba2": (1024, 2048), "mamba": (128, 256)}
"""Layers whose reference kernels loop over the sequence are run on two shorter ones, of whole chunks: what they hold grows
linearly with length. The fused kernels need no such thing."""


@dataclass(frozen=True)
class Piece:
    """A part of the model in one micro-batch on one rank, in bytes."""

    forward: int
    """Most alive during the forward pass, the input included."""
    kept: int
    """Alive from the forward to the backward pass (the input if it is kept; not the output: the next piece's input)."""
    backward: int
    """Most alive during the backward pass: what was kept, the gradients of output, weights and input, temporaries."""
    widening: int
    """The same where autograd turns each weight's gradient into the dtype in which gradients are summed, once it is there."""
    adding: int
    """The same where autograd adds each to an earlier one, which does not count."""
    gradients: int
    """Gradients of the weights that FSDP shards, as the backward pass leaves them: whole, in the compute dtype."""
    deferred: int
    """Kept after the backward pass where it puts the weights' gradients off (zero-bubble schedules)."""
    weights: int
    """Most alive above all that while what was put off is computed; includes the gradients."""
    left: int
    """Alive after the backward pass besides gradients of weights: the gradient of the input."""
    shapes: tuple[tuple[int, ...], ...]
    """This tp rank's part of each weight that FSDP shards."""
    apart: tuple[int, ...]
    """Elements of each parameter that FSDP does not shard."""
    sent: dict[str, dict[str, Counter[str]]] = field(hash=False)
    """Bytes sent to other ranks: "tp" or "cp" -> pass -> collective -> bytes."""
    peaks_at: dict[str, Counter[str]] = field(hash=False, repr=False)
    """Most alive at each kind of allocation: pass -> operation -> bytes."""


class _Enter(torch.autograd.Function):
    """The input of a piece, which only the piece keeps alive; calls `ended` when its gradient is there."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype, ended: Callable[[], None]) -> Tensor:
        ctx.ended = ended
        return seed.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.ended()
        return None, None, None, None


class _Leave(torch.autograd.Function):
    """The end of a piece: makes the gradient of its output when the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, seed: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return seed.view_as(seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.new_empty(ctx.shape, dtype=ctx.dtype), None


class _FusedAttention(torch.autograd.Function):
    """Allocates what the flash kernels (arXiv 2307.08691) behind F.scaled_dot_product_attention do, in `[B, H, S, P]`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sum_exp = _fused_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return _fused_backward(grad, *ctx.saved_tensors)


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fused_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, causal: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    # The kernels want `[B, S, H, P]`. The sum for q's gradient is fp32; those of k and v are made for every query head.
    work = [_like(t) for t in (grad, out) if not t.transpose(1, 2).is_contiguous()]
    work += [_like(q, torch.float32), torch.empty_like(log_sum_exp)]
    shared = q.shape[1] // k.shape[1]
    work += [_like(t, shared=shared) for t in (k, v)] if shared > 1 else []
    return _like(q), _like(k), _like(v)


def _like(t: Tensor, dtype: torch.dtype | None = None, shared: int = 1) -> Tensor:
    batch, heads, length, size = t.shape
    return t.new_empty((batch, length, heads * shared, size), dtype=dtype or t.dtype).transpose(1, 2)


@contextmanager
def _as_on_a_gpu(shortened: int, fused_kernels: bool) -> Iterator[None]:
    """Fused kernels if asked for; attention computed as there (on meta tensors torch would make the S x S matrix, or leave
    out what its kernels use); and for a sequence `shortened` times, references that work in blocks take that much smaller ones."""
    common, attend = mamba_kernels.common, F.scaled_dot_product_attention
    cores = ring_attention._core, ring_attention._core_backward
    blocks = common.DEVICE_BLOCK_ELEMENTS

    def fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        has_kernel = q.dtype.itemsize == 2 or (q.dtype == torch.float32 and q.shape == k.shape)
        return _FusedAttention.apply(q, k, v) if has_kernel else attend(q, k, v, **options)

    def core(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return (_fused_forward if q.dtype.itemsize == 2 else cores[0])(q, *rest)

    def core_backward(grad: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (_fused_backward if q.dtype.itemsize == 2 else cores[1])(grad, q, *rest)

    try:
        common.DEVICE_BLOCK_ELEMENTS = max(blocks // shortened, 1)
        setattr(F, attend.__name__, fused)
        vars(ring_attention).update(_core=core, _core_backward=core_backward)
        with backend.meta_stands_for("cuda" if fused_kernels else "cpu"):
            yield
    finally:
        common.DEVICE_BLOCK_ELEMENTS = blocks
        setattr(F, attend.__name__, attend)
        vars(ring_attention).update(_core=cores[0], _core_backward=cores[1])


def one_layer(config: ModelConfig, kind: str) -> ModelConfig:
    """The model with one layer of `kind`; of another part ("embedding", "output"), with an MLP."""
    return replace(config, pattern=next((letter for letter, name in MIXER_KINDS.items() if name == kind), "-"))


def measure(config: Config, kind: str) -> Piece:
    """Run one layer of `kind` ("mamba2", ...), the "embedding", or the final norm and "output", forward and backward on the
    meta device as one of the tp and cp ranks of `config` does."""
    parallel, trainer = config.parallel, config.trainer
    layout = ParallelConfig(
        cp=parallel.cp,
        tp=parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        schedule="zero_bubble" if parallel.defers_weights else "1f1b",
    )
    batch, length = trainer.micro_batch_size, config.data.seq_length // parallel.cp
    recompute = getattr(config.recompute, kind, "none")
    model = replace(one_layer(config.model, kind), name="")
    fused = backend.AVAILABLE and trainer.kernels == "fused" and trainer.device != "cpu"
    fused = fused and DTYPES[trainer.precision] in backend.FUSED_DTYPES
    adds = torch_private.FREES_EARLY and not parallel.defers_weights
    arguments = (model, kind, layout, recompute, trainer.precision, trainer.loss_chunk_tokens, batch, fused, adds)
    lengths = (length, length) if fused else SCANS.get(kind, (length, length))
    if length <= lengths[1]:
        return _run(*arguments, length, 1)
    small, large = (_run(*arguments, short, length // short) for short in lengths)
    steps = (length - lengths[1]) / (lengths[1] - lengths[0])

    def grown(a: int, b: int) -> int:
        return round(b + (b - a) * steps)

    def most(when: str) -> int:
        # The moment that is the worst in a long sequence need not be it in a short one.
        return max(grown(small.peaks_at[when][what], peak) for what, peak in large.peaks_at[when].items())

    return replace(
        large,
        forward=most("forward"),
        kept=grown(small.kept, large.kept),
        backward=most("backward"),
        widening=most("widening" if adds else "backward"),
        adding=most("adding" if adds else "backward"),
        left=grown(small.left, large.left),
        deferred=grown(small.deferred, large.deferred),
        weights=grown(small.weights, large.weights),
        sent=combined(small.sent, large.sent, grown),
    )


Sent = dict[str, dict[str, Counter[str]]]


def combined(a: Sent, b: Sent, of: Callable[[int, int], int]) -> Sent:
    """What is sent in two runs, number by number."""
    return {
        name: {when: Counter({op: of(a[name][when][op], n) for op, n in ops.items()}) for when, ops in passes.items()}
        for name, passes in b.items()
    }


@cache
def _run(
    config: ModelConfig,
    kind: str,
    layout: ParallelConfig,
    recompute: Recompute,
    precision: str,
    chunk_tokens: int,
    batch: int,
    fused: bool,
    adds: bool,
    length: int,
    shortened: int,
) -> Piece:
    dtype, master = DTYPES[precision], master_dtype(precision)
    with dry_context(layout) as context:
        ledger = Ledger(group_names(context))
        uniform = RecomputeConfig(**{name: recompute for name in MIXER_KINDS.values()})
        model = LanguageModel(config, context, master, uniform)
        sharded, apart = cast_weights(model, dtype)
        tokens = torch.zeros(batch, length, dtype=torch.int64, device="meta")
        info = model._sequence_info(tokens, None, None)
        seed, one = torch.zeros((), dtype=master, device="meta", requires_grad=True), torch.ones((), dtype=master, device="meta")
        shape = (batch * length // (layout.tp if layout.sequence_parallel else 1), config.hidden_size)
        at_end: list[int] = []

        def there_and_back(forward: str, backward: str) -> int:
            ledger.moment = forward
            x = _Enter.apply(seed, shape, dtype, lambda: at_end.append(ledger.now))
            if kind == "embedding":
                x = model.embedding(tokens.flatten())
                loss = _Leave.apply(x, seed)
            elif kind == "output":
                loss = model.output(model.final_norm(x), tokens.flatten(), 1.0, chunk_tokens)
            else:
                loss = _Leave.apply(next(model.layers.children())(x, info, None), seed)
            del x
            kept, ledger.moment = ledger.now, backward
            loss.backward(one)
            return kept

        with _as_on_a_gpu(shortened, fused), ledger:
            kept = there_and_back("forward", "backward")
            at_end.append(ledger.now)
            put_off, ledger.moment = context.deferred or [], "weights"
            after, deferred = ledger.now, ledger.now - _storage_bytes([*sharded, *apart]) if put_off else 0
            for compute in put_off:
                compute()
            gradients, sent, ledger.sent = _storage_bytes(sharded), ledger.sent, {}
            if adds:
                for parameter in sharded:
                    parameter.grad, parameter.grad_dtype = None, master
                for again in ("widening", "adding"):
                    before = ledger.now
                    there_and_back("rest", again)
                    ledger.peaks[again] -= before
                    ledger.peaks_at[again] = Counter({what: peak - before for what, peak in ledger.peaks_at[again].items()})
    used, whole = ([p for p in ps if p.grad is not None] for ps in (sharded, apart))
    return Piece(
        forward=ledger.peaks["forward"],
        kept=kept,
        backward=ledger.peaks["backward"],
        widening=ledger.peaks["widening" if adds else "backward"],
        adding=ledger.peaks["adding" if adds else "backward"],
        gradients=gradients,
        deferred=deferred,
        weights=max(ledger.peaks["weights"] - after, 0),
        left=at_end[0] - after,
        shapes=tuple(tuple(local(p).shape) for p in used),
        apart=tuple(local(p).numel() for p in whole),
        sent=sent,
        peaks_at=ledger.peaks_at,
    )


def cast_weights(model: LanguageModel, dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Bring the weights into the compute dtype, as FSDP gathers them; returns those that it shards and those that it does not."""
    apart = set(model.apart())
    sharded = []
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in apart:
                sharded.append(nn.Parameter(parameter.detach().to(dtype)))
                module.register_parameter(name, sharded[-1])
    return sharded, list(apart)


def _storage_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the storages that hold the parameters' gradients."""
    storages = [local(p.grad).untyped_storage() for p in parameters if p.grad is not None]
    return sum({storage._cdata: allocated(storage.nbytes()) for storage in storages}.values())
