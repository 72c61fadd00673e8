"""The language model: embedding, a pattern of mixers on the residual stream, final norm, output projection."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from mamba_kernels import rope_tables
from megatron_mamba.config import ModelConfig
from megatron_mamba.layout import ParallelConfig, Recompute, RecomputeConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.attention import Attention
from megatron_mamba.model.mamba import Mamba
from megatron_mamba.model.mamba2 import Mamba2
from megatron_mamba.model.mlp import MLP
from megatron_mamba.model.module import Cache, LayerState, SequenceInfo, TableModule, recomputed
from megatron_mamba.model.norm import Norm
from megatron_mamba.model.stages import Stage, rank_of
from megatron_mamba.parallel import fsdp, ring_attention, sequence, tensor, vocab
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import all_tokens
from megatron_mamba.parallel.pipeline import Pipeline

MIXERS = {"mamba2": Mamba2, "mamba": Mamba, "attention": Attention, "mlp": MLP}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def master_dtype(precision: str) -> torch.dtype:
    """Of weights, their summed gradients and moments, in a run that computes in `precision`."""
    return torch.float64 if precision == "fp64" else torch.float32


class Layer(nn.Module):
    """``x + mixer(norm(x))`` on the residual stream: `[T, D]`, or `[t, D]` with sequence parallelism."""

    def __init__(
        self, kind: str, config: ModelConfig, context: ParallelContext, dtype: torch.dtype, recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm = Norm(config, context, dtype)
        self.mixer = MIXERS[kind](config, context, dtype)
        self.mixer.recompute = recompute

    def forward(self, x: Tensor, info: SequenceInfo, state: LayerState) -> Tensor:
        full = self.recompute == "full"
        return recomputed(self._forward, x, info, state) if full else self._forward(x, info, state)

    def _forward(self, x: Tensor, info: SequenceInfo, state: LayerState) -> Tensor:
        # A step cannot start a document: a single token after padding takes the chunked path.
        decoding = info.length == 1 and state is not None and info.document_start is None
        normed = self.norm(x)
        mixed: Tensor = self.mixer.step(normed, info, state) if decoding else self.mixer(normed, info, state)  # type: ignore[operator]
        return x + mixed


class Embedding(TableModule):
    """Token embedding `[V, D]`, split over the vocabulary."""

    def forward(self, tokens_T: Tensor) -> Tensor:
        return vocab.embed(tokens_T, self.local("weight"), self.context)


class Output(TableModule):
    """Output projection `[V, D]`, split over the vocabulary: logits, or the loss without ever holding them all."""

    def forward(self, hidden: Tensor, labels_T: Tensor | None, scale: float, chunk_tokens: int) -> Tensor:
        weight = self.local("weight")
        if labels_T is None:
            return vocab.logits(hidden, weight, self.context)
        return vocab.cross_entropy(hidden, weight, labels_T, self.context, scale=scale, chunk_tokens=chunk_tokens)


class LanguageModel(nn.Module):
    """All four architectures: the pattern says which mixers, in which order. Of a pipeline, one stage: its parameters have the
    names that they have in the whole model."""

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype,
        recompute: RecomputeConfig,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        ParallelConfig(tp=context.size("tp")).check_split(config.split_units(), 0, 0, 0)
        self.config, self.context = config, context
        self.stage = stage or Stage(0, 1, range(len(config.layers)))
        if self.stage.is_first:
            self.embedding = Embedding(parameters.vocabulary(config), context, dtype)
        kinds = {i: config.layers[i] for i in self.stage.layers}
        layers = {str(i): Layer(kind, config, context, dtype, getattr(recompute, kind)) for i, kind in kinds.items()}
        self.layers = nn.ModuleDict(layers)
        if self.stage.is_last:
            self.final_norm = Norm(config, context, dtype)
            self.output = Output(parameters.vocabulary(config), context, dtype)
            if config.tie_embeddings:
                self.output.weight = self.embedding.weight

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        labels_BS: Tensor | None = None,
        document_start_BS: Tensor | None = None,
        scale: float = 1.0,
        chunk_tokens: int = 0,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Loss (with labels) or logits (without) of token ids `[B, S]` int64.

        With `labels` `[B, S]` (negative = left out): the fp32 scalar ``scale * sum of cross-entropies`` in nats.
        Without: logits `[B, S, V]`, or `[B, V]` of each row's last position with `last_only`. `document_start` `[B, S]`
        bool resets conv, state and attention where it is True. `cache` continues from, and is advanced by, S tokens.
        Over cp ranks all of these are this rank's pieces, `[B, S / cp]`; so is the loss. A stage of a pipeline but the first
        takes, in place of token ids, and a stage but the last returns, the residual stream `[T, D]` (`[t, D]` with sequence
        parallelism), in the compute dtype; each wants `labels`. Raises ValueError for a number of tokens that sequence
        parallelism cannot split evenly, and for a cache, or `last_only`, over cp ranks.
        """
        shaped = tokens_BS if self.stage.is_first or labels_BS is None else labels_BS
        if self.context.sequence_parallel and shaped.numel() % self.context.size("tp"):
            raise ValueError(
                f"{shaped.numel()} tokens cannot be split over {self.context.size('tp')} ranks by sequence parallelism: "
                "make batch x length a multiple, or use a context without it"
            )
        if self.context.size("cp") > 1 and (cache is not None or last_only):
            raise ValueError("a cache, and last_only, want whole sequences on a rank: generate with a context of cp = 1")
        info = self._sequence_info(shaped, document_start_BS, cache)
        x = self.embedding(tokens_BS.flatten()) if self.stage.is_first else tokens_BS
        for i, layer in enumerate(self.layers.values()):
            x = layer(x, info, cache.layers[i] if cache else None)
        if not self.stage.is_last:
            return x
        if cache is not None:
            cache.offset += info.length
        if labels_BS is not None:
            return self.output(self.final_norm(x), labels_BS.flatten(), scale, chunk_tokens)
        fsdp.read_in_backward(self.output)
        x_BSD = all_tokens(x, self.context).unflatten(0, tokens_BS.shape)
        return self.output(self.final_norm(x_BSD[:, -1] if last_only else x_BSD), None, scale, chunk_tokens)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, start: Tensor | None = None) -> Cache:
        """Empty decoding state for `batch` rows of up to `capacity` tokens; `start` `[B]` int64 marks left padding."""
        device = self.context.device
        states = [layer.mixer.new_state(batch, capacity, device, dtype) for layer in self.layers.values()]  # type: ignore[union-attr,operator]
        return Cache(states, capacity, 0, start)

    def table_parameters(self) -> Iterator[tuple[str, nn.Parameter, parameters.ParameterSpec]]:
        """Every parameter once, with its full name and its row of the table."""
        table = parameters.parameter_table(self.config)
        for name, parameter in self.named_parameters():
            yield name, parameter, table[name]

    def apart(self) -> list[nn.Parameter]:
        """The parameters that stay fp32 in compute and are replicated over data-parallel ranks."""
        return [p for _, p, row in self.table_parameters() if row.fp32]

    def partial_over_tp(self) -> list[nn.Parameter]:
        """The parameters that tp ranks hold whole while each computes its part of the gradient: those of groups that
        several ranks share, and with sequence parallelism every replicated one."""
        found = []
        for _, parameter, row in self.table_parameters():
            whole = not tensor.is_split(row.split_dim, row.units, self.context)
            if whole and (row.split_dim is not None or self.context.sequence_parallel):
                found.append(parameter)
        return found

    def last_backward(self, last: bool) -> None:
        """Say before a micro-batch whether it is the step's last."""
        fsdp.last_backward(self, last, self.context)

    def sum_gradients(self) -> None:
        """After the last backward pass of a step: sum the gradients that FSDP has not."""
        fsdp.sum_replicated_gradients(self.apart(), self.partial_over_tp(), self.context)

    def _sequence_info(self, tokens: Tensor, document_start: Tensor | None, cache: Cache | None) -> SequenceInfo:
        batch, length = tokens.shape
        offset = cache.offset if cache else self.context.rank("cp") * length
        if cache is not None and offset + length > cache.capacity:
            raise ValueError(f"cache of {cache.capacity} tokens is full: {offset} used, {length} more given; make a larger one")
        if cache is not None and document_start is not None:
            raise ValueError("document_start: a cache holds one document a row; run packed documents without a cache")
        rope = None
        attention = self.config.attention
        if "attention" in self.config.layers and attention.rotary_dim:
            positions = torch.arange(offset, offset + length, device=tokens.device)
            dtype = next(iter(self.layers.values())).norm.local("weight").dtype  # type: ignore[union-attr,operator]
            rope = rope_tables(positions, attention.rotary_dim, attention.rope_base, dtype)
        ring = None
        if "attention" in self.config.layers and self.context.size("cp") > 1:
            starts = None
            if document_start is not None:
                whole = sequence.whole_sequence(document_start, self.context).cpu()
                starts = [row.nonzero().flatten().tolist() for row in whole]
            ring = ring_attention.schedule(batch, length, starts, self.context)
        start = cache.start if cache else None
        if start is not None and offset <= int(start.max()):
            # Left padding must leave no trace: each row's first real token starts a document.
            first = torch.arange(offset, offset + length, device=tokens.device) == start[:, None]
            document_start = first if document_start is None else document_start | first
        return SequenceInfo(batch, length, tokens.device, document_start, offset, start, rope, ring)


def build(
    config: ModelConfig,
    context: ParallelContext,
    *,
    precision: str = "fp32",
    seed: int = 1234,
    device: torch.device | str | None = None,
    recompute: RecomputeConfig | None = None,
    stage: Stage | None = None,
) -> LanguageModel:
    """The model of `config` on this rank's device, sharded over the context's mesh, with its initial weights.

    `precision` is the compute dtype ("bf16", "fp32", "fp64"); weights are kept in fp32 (fp64). `seed` fixes the initial
    weights, which are the same on every mesh. `device="meta"` gives the skeleton without FSDP and memory. `stage`: of a
    pipeline, the part to build (default: all). Raises ValueError for a model that the context's tp cannot share out.
    """
    model = LanguageModel(config, context, master_dtype(precision), recompute or RecomputeConfig(), stage)
    if device is not None and torch.device(device).type == "meta":
        return model
    first = [model.embedding] if model.stage.is_first and not config.tie_embeddings else []
    last = [model.output] if model.stage.is_last and not config.tie_embeddings else []
    # The embedding has no gradient of its input, and the loss computes the output's gradients in the forward pass.
    units = [*first, *model.layers.values(), *last]
    fsdp.shard(units, model, set(model.apart()), [*first, *last], context, DTYPES[precision])
    model.to_empty(device=device or context.device)
    initialize(model, seed)
    return model


def build_pipeline(
    config: ModelConfig,
    stages: Sequence[Stage],
    context: ParallelContext,
    *,
    precision: str = "fp32",
    seed: int = 1234,
    recompute: RecomputeConfig | None = None,
) -> Pipeline:
    """This rank's part of the model, cut into `stages` (as many as the context's pipeline has, see stages.stages_of), and
    what runs it together with the other ranks; arguments as of :func:`build`."""
    layout = ParallelConfig(pp=context.size("pp"), schedule=context.schedule)
    ranks = [rank_of(stage.index, layout) for stage in stages]
    here = [stage for stage in stages if ranks[stage.index] == context.rank("pp")]
    modules = [
        build(config, context, precision=precision, seed=seed, recompute=recompute, stage=stage) for stage in here
    ]
    return Pipeline(modules, ranks, config.hidden_size, DTYPES[precision], context)


def initialize(model: LanguageModel, seed: int) -> None:
    """Fill every parameter with its slice of the global initial tensor of `seed`."""

    def fill(entry: tuple[str, nn.Parameter, parameters.ParameterSpec]) -> None:
        _, parameter, row = entry
        index = tensor.owned_slices(row.shape, row.split_dim, row.units, model.context, sharded=not row.fp32)
        fsdp.local(parameter).detach().copy_(parameters.initial_values(row, seed, index, parameter.dtype))

    entries = list(model.table_parameters())
    drawn = [entry for entry in entries if entry[2].init.kind in parameters.DRAWN]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        filled = pool.map(fill, drawn)
        # A process' first logarithms and exponentials (MKL's), if several threads take them at once, can be wrong by 6e-5.
        for entry in entries:
            if entry[2].init.kind not in parameters.DRAWN:
                fill(entry)
        list(filled)
