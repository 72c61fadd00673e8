"""Pipeline parallelism: the stages that lie on this rank, and the order in which their micro-batches run.

Stages pass the residual stream on in the compute dtype, and its gradient back. What else a stage needs, labels and document
starts, every pipeline rank reads for itself. The schedules are those of torch.distributed.pipelining; without a pipeline one
micro-batch runs after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from megatron_mamba.parallel import collectives, fsdp
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.torch_private import Stage

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Position(Protocol):
    """Which of the stages a module is."""

    @property
    def index(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    @property
    def is_last(self) -> bool: ...


class MicroBatch(Protocol):
    """Token ids, labels and document starts, `[B, S]` each (over cp ranks, this rank's pieces)."""

    @property
    def inputs_BS(self) -> Tensor: ...
    @property
    def labels_BS(self) -> Tensor: ...
    @property
    def document_start_BS(self) -> Tensor | None: ...


Phase = Callable[[str], AbstractContextManager[object]]


class Pipeline:
    """The stages of a model on this rank, in order, as modules that turn token ids or a residual stream into a residual stream
    or the loss (model.LanguageModel). `ranks`: the pipeline rank of every stage of the model."""

    def __init__(
        self, modules: Sequence[Any], ranks: Sequence[int], hidden_size: int, dtype: torch.dtype, context: ParallelContext
    ) -> None:
        self.modules, self.context = list(modules), context
        self._ranks, self._hidden_size, self._dtype = list(ranks), hidden_size, dtype
        self._shape: tuple[int, ...] = ()
        self._schedule: Any = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of this rank's stages, by their names in the whole model."""
        return [entry for module in self.modules for entry in module.named_parameters()]

    def step(
        self, batches: Sequence[MicroBatch], *, scale: float, chunk_tokens: int, phase: Phase = nullcontext
    ) -> Tensor:
        """Forward and backward passes of a step's micro-batches, which are all of one shape; gradients are complete then.

        Returns the fp64 sum of their losses, times `scale`, over the tokens of this rank: zero but on the last stage's
        (see :meth:`total`). `phase` is told what is timed.
        """
        if len(self._ranks) == 1:
            loss = self._one_after_the_other(batches, scale, chunk_tokens, phase)
        else:
            with phase("forward and backward"):
                loss = self._scheduled(batches, scale, chunk_tokens)
        for module in self.modules:
            module.sum_gradients()
        return loss

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, *, chunk_tokens: int) -> Tensor:
        """The fp64 loss of one micro-batch, summed over the tokens of this rank: zero but on the last stage's. Every rank
        evaluates its batches in the same order; call :meth:`reshard` after the last."""
        loss = torch.zeros((), dtype=torch.float64, device=self.context.device)
        x, group = batch.inputs_BS, self.context.group("pp")
        for module in self.modules:
            stage: Position = module.stage
            # A stage that follows the one before it on the same rank goes on with what that one returned.
            if not stage.is_first and self._ranks[stage.index - 1] != self.context.rank("pp"):
                x = torch.empty(self._stream_shape(batch.labels_BS), dtype=self._dtype, device=self.context.device)
                dist.recv(x, group=group, group_src=self._ranks[stage.index - 1])
            x = module(
                x, labels_BS=batch.labels_BS, document_start_BS=batch.document_start_BS, scale=1.0, chunk_tokens=chunk_tokens
            )
            if stage.is_last:
                loss += x
            elif self._ranks[stage.index + 1] != self.context.rank("pp"):
                dist.send(x.contiguous(), group=group, group_dst=self._ranks[stage.index + 1])
        return loss

    def total(self, loss: Tensor) -> Tensor:
        """What the ranks' losses sum to, over tokens and stages, in place: the same on every rank."""
        return collectives.reduce_(self.context.sum_over_tokens(loss), self.context.group("pp"))

    def reshard(self) -> None:
        """Give up gathered weights that forward passes without backward passes left behind."""
        for module in self.modules:
            fsdp.reshard(module)

    def _one_after_the_other(self, batches: Sequence[MicroBatch], scale: float, chunk_tokens: int, phase: Phase) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=self.context.device)
        (model,) = self.modules
        for i, batch in enumerate(batches):
            model.last_backward(i == len(batches) - 1)
            with phase("forward"):
                starts = batch.document_start_BS
                part = model(
                    batch.inputs_BS, labels_BS=batch.labels_BS, document_start_BS=starts, scale=scale, chunk_tokens=chunk_tokens
                )
                loss += part.detach()
            with phase("backward"):
                part.backward()
        return loss

    def _scheduled(self, batches: Sequence[MicroBatch], scale: float, chunk_tokens: int) -> Tensor:
        labels = torch.cat([batch.labels_BS for batch in batches])
        shape = (len(batches), *batches[0].labels_BS.shape)
        if shape != self._shape:
            # One at a time: each holds a buffer for every micro-batch and stage border.
            self._schedule = None
            self._schedule, self._shape = self._new_schedule(len(batches), batches[0].labels_BS), shape
        inputs = {"labels_BS": labels, "scale": scale, "chunk_tokens": chunk_tokens}
        starts = [batch.document_start_BS for batch in batches if batch.document_start_BS is not None]
        if starts:
            inputs["document_start_BS"] = torch.cat(starts)
        first, last = self.modules[0].stage.is_first, self.modules[-1].stage.is_last
        tokens = [torch.cat([batch.inputs_BS for batch in batches])] if first else []
        losses: list[Tensor] = []
        self._schedule.step(*tokens, target=labels if last else None, losses=losses, return_outputs=False, **inputs)
        zero = torch.zeros((), dtype=torch.float64, device=self.context.device)
        return sum((loss.detach().double() for loss in losses), zero)

    def _new_schedule(self, count: int, labels_BS: Tensor) -> Any:
        """The schedule of `count` micro-batches, over buffers of their shape."""
        stages = [self._new_stage(module, labels_BS) for module in self.modules]
        kind = SCHEDULES[self.context.schedule]
        given: Any = stages[0] if kind is Schedule1F1B else stages
        return kind(given, count, loss_fn=lambda loss, _: loss, scale_grads=False)

    def _new_stage(self, module: Any, labels_BS: Tensor) -> Stage:
        """`module` as torch sees it: told what it takes and returns, so that nothing is run to find out."""
        at: Position = module.stage
        stream = torch.empty(self._stream_shape(labels_BS), dtype=self._dtype, device="meta", requires_grad=True)
        wide = torch.promote_types(self._dtype, torch.float32)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        return Stage(
            module,
            at.index,
            len(self._ranks),
            self.context.device,
            input_args=torch.empty_like(labels_BS, device="meta") if at.is_first else stream,
            output_args=loss if at.is_last else stream,
            group=self.context.group("pp"),
            dw_builder=None if self.context.deferred is None else lambda: self._take_deferred(module),
        )

    def _take_deferred(self, module: nn.Module) -> Callable[[], None]:
        """What computes the gradients of weights that the backward pass just run has put off."""
        assert self.context.deferred is not None
        put_off = self.context.deferred.copy()
        self.context.deferred.clear()

        def run() -> None:
            for compute in put_off:
                compute()
            put_off.clear()
            fsdp.keep_deferred(module)

        return run

    def _stream_shape(self, labels_BS: Tensor) -> tuple[int, int]:
        """Of the residual stream on this rank, `[T, D]` or `[t, D]`."""
        tp = self.context.size("tp") if self.context.sequence_parallel else 1
        return labels_BS.numel() // tp, self._hidden_size
