"""SSD on the kernels of `fused`: which runs on what, the operators `mamba_kernels::ssd` and `ssd_backward`, and ranks.

The backward pass keeps of the forward's work the step sizes, their sums and the state before each chunk, in the dtype of x: as
much memory as x for Q = N, and one sweep less than to compute them again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import (
    SequenceRanks,
    cdiv,
    contiguous,
    next_power_of_2,
    start_gradient_after,
    start_state_before,
    unit_stride,
)
from mamba_kernels.ssd import fused
from mamba_kernels.ssd.reference import halves, over_state

MULTIPROCESSORS = 132  # Of the GPU the kernels were tuned on; with more or fewer, programs are shared out less evenly.
ALL = slice(None)


def chunk_length(dtype: torch.dtype) -> int:
    """Q: tokens of a chunk. Twice as many halve the states in memory, and need more of each program's registers."""
    return 32 if dtype == torch.float32 else 128


def least_columns(dtype: torch.dtype) -> int:
    """Of a tile in a matrix product. Those of 16-bit numbers have rows of 128 bytes or more, and so all lie alike in shared memory.

    Hopper's matrix instructions are told how a tile lies by a descriptor, and ptxas 12.8, the assembler of Triton up to 3.7,
    confuses the descriptors of tiles that lie at one address in different ways. With narrower tiles beside these, outputs or
    gradients were wrong without a warning: docs/kernels.md.
    """
    return 16 if dtype == torch.float32 else 64


def _state_candidates(dtype: torch.dtype, head_dim: int, state_size: int, waves: int) -> list[Meta]:
    """`waves`: 2 where heads are more than multiprocessors, 1 where smaller tiles may keep more of those at work, 0 where heads are
    fewer than half of those: long sequences are then swept in segments. Two heads of a program share what they read of B or C."""
    length, block_p, block_n = chunk_length(dtype), min(head_dim, 64), min(state_size, 64 if dtype == torch.float32 else 128)
    least = min(state_size, least_columns(dtype))
    tiles = [(length, block_p, block_n, 8, stages) for stages in (3, 2, 4)]
    tiles += [(length // 2, block_p, block_n, 4, stages) for stages in (3, 2)]
    tiles += [(length // 2, block_p, max(block_n // 2, least), 4, stages) for stages in (3, 2)]
    alone = [
        {"STEP": step, "HEADS": 1, "BP": p, "BN": n, "num_warps": warps, "num_stages": stages}
        for step, p, n, warps, stages in tiles
    ]
    if dtype == torch.float32 or block_p != head_dim:
        return alone
    return [*alone, *(meta | {"HEADS": 2, "num_warps": 8} for meta in alone[:5] if meta["num_stages"] < 4)]


def _state_gradient_candidates(dtype: torch.dtype, head_dim: int, state_size: int, waves: int) -> list[Meta]:
    """Those of the states, half a chunk a step first; and one more: a few spilled registers may cost less than a program less at a
    time."""
    candidates = _state_candidates(dtype, head_dim, state_size, waves)
    return [*sorted(candidates, key=lambda meta: meta["STEP"]), candidates[1] | {"maxnreg": 128}]


def _pair_candidates(dtype: torch.dtype, head_dim: int, state_size: int) -> list[Meta]:
    block_p = min(head_dim, 64)
    return [{"BP": block_p, "num_warps": warps, "num_stages": stages} for warps in (4, 8) for stages in (3, 2, 4, 1)]


def _token_candidates(dtype: torch.dtype, head_dim: int, state_size: int) -> list[Meta]:
    block_p, most = min(head_dim, 64), _stages_that_fit(dtype, head_dim, state_size)
    blocks = [(block_p, warps, stages) for warps in (4, 8) for stages in (3, 2, 1) if stages <= most]
    blocks += [(32, 4, min(2, most))] if block_p > 32 >= least_columns(dtype) else []  # Fewer registers: none are spilled.
    return [{"BP": block, "num_warps": warps, "num_stages": stages} for block, warps, stages in blocks]


def _stages_that_fit(dtype: torch.dtype, head_dim: int, state_size: int) -> int:
    """How many heads may be asked for ahead: each takes shared memory for its state and two halves of a chunk of v, beside what is
    there of u and w. A rough count, which leaves room on every architecture."""
    half = chunk_length(dtype) // 2
    fixed, ahead = dtype.itemsize * 3 * half * state_size + 16384, dtype.itemsize * head_dim * (state_size + 2 * half)
    return max((stages for stages in (1, 2, 3) if fixed + (stages - 1) * ahead <= 200_000), default=1)


def _group_candidates(dtype: torch.dtype, head_dim: int, state_size: int) -> list[Meta]:
    length, block_p = chunk_length(dtype), min(head_dim, 64)
    shapes = ((length // 2, 4), (length, 8), (length, 4))
    few = [{"ROWS": rows, "BP": block_p, "num_warps": warps, "num_stages": n} for n in (1, 2, 3) for rows, warps in shapes]
    if block_p > 32 >= least_columns(dtype):
        few += [meta | {"BP": 32} for meta in few if meta["num_warps"] == 4 and meta["num_stages"] > 1]
    # Two programs of eight warps fit a multiprocessor.
    return few + [few[0] | {"num_warps": 8, "num_stages": stages, "maxnreg": 128} for stages in (1, 2)]


STATES = Tunable("ssd_states", _state_candidates)
STATE_GRADIENTS = Tunable("ssd_state_gradients", _state_gradient_candidates)
OUTPUT = Tunable("ssd_output", _token_candidates)
PAIR_GRADIENT = Tunable("ssd_pair_gradient", _pair_candidates)
C_GRADIENT = Tunable("ssd_c_gradient", _group_candidates)
B_GRADIENT = Tunable("ssd_b_gradient", _group_candidates)
X_GRADIENT = Tunable("ssd_x_gradient", _token_candidates)


class Scan:
    """A problem as the kernels take it, and what follows from its sizes."""

    def __init__(
        self, x: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None, kept: tuple[Tensor, Tensor, Tensor],
        document: Tensor | None,
    ) -> None:  # fmt: skip
        """x [B, S, H, P]; B, C [B, S, G, N]; A, D [H]; document [B, S] int32, how many documents have started up to each token.

        `kept` are float32 [B, H, S]: dt as the recurrence uses it; cs, sums of dt A log2(e) from the chunk's start; and, of float32
        inputs, what the rounding of cs lost, of others cs - log2(dt).
        """
        self.x, self.B, self.C = unit_stride(x), unit_stride(B), unit_stride(C)
        self.A, self.D, self.kept, self.document = A.contiguous(), contiguous(D), kept, document
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = B.shape[2:]
        self.per_group, self.chunk = self.heads // self.groups, chunk_length(x.dtype)
        self.chunks = cdiv(self.length, self.chunk)
        least = least_columns(x.dtype)
        padded_p, padded_n = padded(self.head_dim, least), padded(self.state_size, least)
        self.key = (x.dtype, padded_p, padded_n)
        # Enough programs to fill a GPU, by sharing out the heads of a group; what they add up is then summed.
        self.splits = 1
        programs = self.chunks * 2 * self.batch * self.groups
        while programs * self.splits < MULTIPROCESSORS and self.per_group % (2 * self.splits) == 0:
            self.splits *= 2
        self.sizes = (
            self.length, self.heads, self.groups, self.per_group, self.head_dim, self.state_size, self.chunks,
            self.per_group // self.splits,
        )  # fmt: skip
        self.decays = (*kept, document)
        self.of_x, self.of_B, self.of_C = (t.stride()[:3] for t in (self.x, self.B, self.C))
        self.of_decays = (kept[1].stride(0), 0 if document is None else document.stride(0))
        self.constants = {
            "HAS_DOCS": document is not None,
            "PRECISE": x.dtype == torch.float32,
            "EVEN": self.length % self.chunk == 0 and (padded_p, padded_n) == (self.head_dim, self.state_size),
            "Q": self.chunk,
        }
        self.padding = {"PADDED_P": padded_p, "PADDED_N": padded_n, **self.constants}

    def part(self, heads: slice, groups: slice) -> "Scan":
        """Views of some heads, and of the groups they belong to."""
        if heads == ALL:
            return self
        step, cs, fine = self.kept
        kept = (step[:, heads], cs[:, heads], fine[:, heads])
        D = None if self.D is None else self.D[heads]
        return Scan(self.x[:, :, heads], self.B[:, :, groups], self.C[:, :, groups], self.A[heads], D, kept, self.document)

    def grid(self, blocks: int) -> tuple[int, int, int]:
        """Of programs that take one of so many blocks of a chunk, and some heads of a group."""
        return self.chunks * blocks, self.batch * self.groups, self.splits

    def new(self, *shape: int) -> Tensor:
        """Room for float32 numbers."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def new_states(self) -> Tensor:
        """Room for a state before or after each chunk, in the dtype of the matrix products."""
        return self.x.new_empty(self.batch, self.chunks, self.heads, self.head_dim, self.state_size)


def of_heads(t: Tensor, heads: slice) -> Tensor:
    """Some heads, or groups, of [B, S, H, ...]."""
    return t if heads == ALL else t[:, :, heads]


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds a dimension of a matrix product, which has at least 16."""
    return max(next_power_of_2(size), least)


def count_documents(document_start: Tensor | None) -> Tensor | None:
    """How many documents have started up to each token, [B, S]."""
    return None if document_start is None else document_start.cumsum(1, dtype=torch.int32)


def prepare(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, document: Tensor | None,
    softplus: bool,
) -> Scan:  # fmt: skip
    """The problem with its step sizes and decays computed."""
    batch, length, heads, _ = x.shape
    step, cs, fine = (torch.empty(batch, heads, length, dtype=torch.float32, device=x.device) for _ in range(3))
    scan = Scan(x, B, C, A, D, (step, cs, fine), document)
    block, dt = min(32, padded(heads)), unit_stride(dt)
    launch(
        fused.decays_kernel, (batch * scan.chunks, cdiv(heads, block)),
        dt, contiguous(dt_bias), scan.A, step, cs, fine, length, heads, scan.chunks, dt.stride(0), dt.stride(1),
        SOFTPLUS=softplus, HAS_BIAS=dt_bias is not None, PRECISE=x.dtype == torch.float32, Q=scan.chunk, BH=block, num_warps=4,
    )  # fmt: skip
    return scan


class Sweep(NamedTuple):
    """What a pass over the chunks leaves."""

    final: Tensor  # [B, H, P, N] float32: the state after the last token, or the gradient of the one before the first
    decay: Tensor  # [B, parts, H]: what each segment leaves of a state
    log_decay: Tensor  # [tiles, B, H, C]: parts of the gradient of the logarithm of each chunk's decay; in reverse only


def sweep(
    scan: Scan, start: Tensor | None, states: Tensor | None, g_y: Tensor | None = None, before: Tensor | None = None
) -> Sweep:
    """Carry the state from `start` [B, H, P, N], or zero, over the chunks, and write it before each to `states`; with `g_y` the
    gradient of the state in reverse, written for the state after each chunk, `before` being the states themselves."""
    reverse = g_y is not None
    v, w = (scan.x, scan.B) if g_y is None else (g_y, scan.C)
    sequences = scan.batch * scan.heads
    waves = 2 if sequences > MULTIPROCESSORS else int(2 * sequences >= MULTIPROCESSORS)
    meta = (STATE_GRADIENTS if reverse else STATES)(*scan.key, waves)
    side_by_side = v.stride(2) == scan.head_dim == meta["BP"]
    if scan.per_group % meta["HEADS"] or not side_by_side:
        meta = meta | {"HEADS": 1}
    tiles = cdiv(scan.head_dim, meta["BP"]) * cdiv(scan.state_size, meta["BN"])
    programs = tiles * scan.batch * scan.heads // meta["HEADS"]
    # A second pass costs more than some idle multiprocessors.
    parts = 1 if 2 * programs >= MULTIPROCESSORS else min(2 * MULTIPROCESSORS // programs, cdiv(scan.chunks, 4))
    segment = cdiv(scan.chunks, parts)
    parts = cdiv(scan.chunks, segment)
    decay = scan.new(scan.batch, parts, scan.heads)
    log_decay = scan.new(tiles, scan.batch, scan.heads, scan.chunks) if reverse and states is not None else decay
    sizes = (scan.length, scan.heads, scan.per_group, scan.head_dim, scan.state_size, scan.chunks, segment)

    def run(start: Tensor | None, states: Tensor | None) -> Tensor:
        state = (scan.heads, scan.head_dim, scan.state_size)
        final = scan.new(scan.batch, *state) if parts == 1 else scan.new(scan.batch, parts, *state)
        launch(
            fused.states_kernel, (programs, parts),
            v, w, *scan.decays, start, final, states, before, log_decay, decay,
            *sizes, *v.stride()[:3], *w.stride()[:3], *scan.of_decays,
            REVERSE=reverse, HAS_FROM=start is not None, WRITE=states is not None, **scan.constants, **meta,
        )  # fmt: skip
        return final

    start = contiguous(start)
    if parts == 1:
        return Sweep(run(start, states), decay, log_decay)
    ends = run(None, None)
    starts, final = torch.empty_like(ends), scan.new(scan.batch, scan.heads, scan.head_dim, scan.state_size)
    elements = scan.head_dim * scan.state_size
    launch(
        fused.carry_kernel, (scan.batch * scan.heads, cdiv(elements, 1024)),
        start, ends, decay, starts, final, scan.heads, elements, parts,
        REVERSE=reverse, HAS_FROM=start is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    if states is not None:
        run(starts, states)
    return Sweep(final, decay, log_decay)


def write_output(scan: Scan, states: Tensor, y: Tensor) -> None:
    """Write y [B, S, H, P], of which the last dimension has unit stride."""
    launch(
        fused.output_kernel, scan.grid(2),
        scan.x, scan.C, scan.B, scan.D, *scan.decays, states, y,
        *scan.sizes, *scan.of_x, *scan.of_C, *scan.of_B, *y.stride()[:3], *scan.of_decays,
        REVERSE=False, HAS_D=scan.D is not None, **scan.padding, **OUTPUT(*scan.key),
    )  # fmt: skip


class Gradients(NamedTuple):
    """Where gradients go: [B, S, ...] with unit last stride."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


def write_gradients(
    scan: Scan, states: Tensor, g: Gradients, dt: Tensor, dt_bias: Tensor | None, softplus: bool, g_y: Tensor,
    g_final: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradients of x, dt, B and C; the sums [3, H] for A, dt_bias and D, and the gradient of the state at the start."""
    batch, heads, splits, g_y, dt = scan.batch, scan.heads, scan.splits, unit_stride(g_y), unit_stride(dt)
    g_states, of_g_y = scan.new_states(), g_y.stride()[:3]
    swept = sweep(scan, g_final, g_states, g_y, states)
    g_BC = scan.x.new_empty(batch, scan.chunks, scan.groups, splits, scan.chunk, scan.chunk)
    g_start, g_inside, g_row, g_column, g_end, g_after, g_D = scan.new(7, batch, heads, scan.length).unbind()
    g_B, g_C = (t.unsqueeze(0) if splits == 1 else scan.new(splits, *t.shape) for t in (g.B, g.C))
    launch(
        fused.pair_gradient_kernel, scan.grid(3),
        scan.x, scan.B, scan.C, g_y, *scan.decays, g_BC, g_inside, g_row, g_column, g_after, g_D,
        *scan.sizes, *scan.of_x, *scan.of_B, *scan.of_C, *of_g_y, *scan.of_decays,
        HAS_D=scan.D is not None, **scan.padding, **PAIR_GRADIENT(*scan.key),
    )  # fmt: skip
    for_C = (g_y, scan.C, scan.B, states, g_C, g_start)
    for_B = (scan.x, scan.B, scan.C, g_states, g_B, g_end)
    for of_B, tunable, (v, u, w, of, out, g_edge) in ((False, C_GRADIENT, for_C), (True, B_GRADIENT, for_B)):
        meta = tunable(*scan.key)
        launch(
            fused.group_gradient_kernel, scan.grid(scan.chunk // meta["ROWS"]),
            v, u, w, *scan.decays, of, g_BC, out, g_edge,
            *scan.sizes, *v.stride()[:3], *u.stride()[:3], *w.stride()[:3], *out.stride()[:4], *scan.of_decays,
            OF_B=of_B, **scan.padding, **meta,
        )  # fmt: skip
    launch(
        fused.output_kernel, scan.grid(2),
        g_y, scan.B, scan.C, scan.D, *scan.decays, g_states, g.x,
        *scan.sizes, *of_g_y, *scan.of_B, *scan.of_C, *g.x.stride()[:3], *scan.of_decays,
        REVERSE=True, HAS_D=scan.D is not None, **scan.padding, **X_GRADIENT(*scan.key),
    )  # fmt: skip
    if splits > 1:
        g.B.copy_(g_B.sum(0))
        g.C.copy_(g_C.sum(0))
    sums, block, log_decay = scan.new(3, batch * scan.chunks, heads), min(16, padded(heads)), swept.log_decay
    launch(
        fused.dt_gradient_kernel, (batch * scan.chunks, cdiv(heads, block)),
        dt, contiguous(dt_bias), scan.A, scan.kept[0], g_start, g_inside, g_row, g_column, g_end, g_after, g_D, log_decay,
        g.dt, sums,
        scan.length, heads, scan.chunks, len(log_decay), log_decay.stride(0),
        dt.stride(0), dt.stride(1), g.dt.stride(0), g.dt.stride(1), scan.of_decays[0], sums.stride(0),
        SOFTPLUS=softplus, HAS_BIAS=dt_bias is not None, HAS_D=scan.D is not None, Q=scan.chunk, BH=block, num_warps=4,
    )  # fmt: skip
    return sums.sum(1), swept.final


def forward_into(
    scan: Scan, initial_state: Tensor | None, ranks: SequenceRanks | None, y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Write y; returns the final state, and the states before chunks for the backward. Over ranks the heads are worked in two
    parts, and the exchange of one overlaps the work on the other."""
    parts = halves(scan.heads, scan.groups, ranks)
    scans, starts = [scan.part(*part) for part in parts], list[Callable[[], Tensor | None]]()
    for of_part in scans:
        if ranks is None:
            starts.append(lambda: initial_state)
        else:
            swept = sweep(of_part, None, None)
            starts.append(start_state_before(ranks, swept.decay.prod(1), swept.final, over_state))
    states, finals = [of_part.new_states() for of_part in scans], list[Tensor]()
    for (heads, _), of_part, before, start in zip(parts, scans, states, starts, strict=True):
        finals.append(sweep(of_part, start(), before).final)
        write_output(of_part, before, of_heads(y, heads))
    return finals[0] if len(finals) == 1 else torch.cat(finals, 1), states


def backward_into(
    scan: Scan, states: list[Tensor], g: Gradients, dt: Tensor, dt_bias: Tensor | None, softplus: bool, g_y: Tensor,
    g_final: Tensor | None, ranks: SequenceRanks | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `write_gradients` does, over ranks too, where no gradient of an initial state is returned that means anything."""
    if ranks is None:
        return write_gradients(scan, states[0], g, dt, dt_bias, softplus, g_y, g_final)
    parts, g_y, dt_bias = halves(scan.heads, scan.groups, ranks), unit_stride(g_y), contiguous(dt_bias)
    g_final = scan.new(scan.batch, scan.heads, scan.head_dim, scan.state_size).zero_() if g_final is None else g_final
    scans, arriving = [scan.part(*part) for part in parts], list[Callable[[], Tensor]]()
    for (heads, _), of_part in zip(parts, scans, strict=True):
        swept = sweep(of_part, g_final[:, heads], None, of_heads(g_y, heads))
        arriving.append(start_gradient_after(ranks, swept.decay.prod(1), swept.final, over_state))
    shared, sums, of_groups = len(parts) > 1 and scan.groups == 1, list[Tensor](), list[tuple[Tensor, Tensor]]()
    for (heads, groups), of_part, before, arrived in zip(parts, scans, states, arriving, strict=True):
        # Of the sum of two parts' gradients, only the result is rounded to the dtype of B and C.
        g_B, g_C = (torch.empty_like(t, dtype=torch.float32) if shared else of_heads(t, groups) for t in (g.B, g.C))
        g_part = Gradients(of_heads(g.x, heads), of_heads(g.dt, heads), g_B, g_C)
        bias, g_last = None if dt_bias is None else dt_bias[heads], arrived() + g_final[:, heads]
        of_decays, g_initial = write_gradients(
            of_part, before, g_part, of_heads(dt, heads), bias, softplus, of_heads(g_y, heads), g_last
        )
        sums.append(of_decays)
        of_groups.append((g_B, g_C))
    if shared:
        for whole, (first, second) in zip((g.B, g.C), zip(*of_groups, strict=True), strict=True):
            whole.copy_(first + second)
    return torch.cat(sums, 1), g_initial


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    document_start: Tensor | None, softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, the final state, and what the backward keeps: step, cs, fine (see `Scan`) and the states before each chunk."""
    scan = prepare(x, dt, A, B, C, D, dt_bias, count_documents(document_start), softplus)
    y = x.new_empty(x.shape)
    final, (states,) = forward_into(scan, initial_state, None, y)
    return y, final, *scan.kept, states


def forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    document_start: Tensor | None, softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `_forward` returns, uninitialised."""
    (batch, length, heads, head_dim), state_size = x.shape, B.shape[3]
    step, cs, fine = (x.new_empty(batch, heads, length, dtype=torch.float32) for _ in range(3))
    chunks = -(-length // chunk_length(x.dtype))
    final, states = cs.new_empty(batch, heads, head_dim, state_size), x.new_empty(batch, chunks, heads, head_dim, state_size)
    return x.new_empty(x.shape), final, step, cs, fine, states


def _backward(
    g_y: Tensor, g_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None, step: Tensor, cs: Tensor, fine: Tensor,
    states: Tensor, softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, B, C, the sums [3, H] for A, dt_bias and D, and the gradient of the initial state."""
    scan = Scan(x, B, C, A, D, (step, cs, fine), count_documents(document_start))
    g = Gradients(*(t.new_empty(t.shape) for t in (x, dt, B, C)))
    return *g, *write_gradients(scan, states, g, dt, dt_bias, softplus, g_y, g_final)


def _backward_fake(
    g_y: Tensor, g_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None, step: Tensor, cs: Tensor, fine: Tensor,
    states: Tensor, softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    gradients = (t.new_empty(t.shape) for t in (x, dt, B, C))
    return *gradients, cs.new_empty(3, x.shape[2]), cs.new_empty(x.shape[0], *x.shape[2:], B.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _autograd(ctx: Any, g_y: Tensor | None, g_final: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    x, _, A, _, _, D, dt_bias, initial_state, *_ = saved = ctx.saved_tensors
    g_y = torch.zeros_like(x) if g_y is None else g_y
    g_x, g_dt, g_B, g_C, sums, g_initial = _gradients(g_y, g_final, *saved, ctx.softplus)
    g_A, g_bias, g_D = sums.unbind()
    return (
        g_x, g_dt, g_A.to(A.dtype), g_B, g_C, None if D is None else g_D.to(D.dtype),
        None if dt_bias is None else g_bias.to(dt_bias.dtype),
        None if initial_state is None else g_initial.to(initial_state.dtype), None, None,
    )  # fmt: skip


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? document_start"
)
_KEPT = "Tensor step, Tensor cs, Tensor fine, Tensor states"
_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_gradients = register(
    "ssd_backward", f"(Tensor g_y, Tensor? g_final, {_INPUTS}, {_KEPT}, bool softplus) -> {_SIX}", _backward, _backward_fake
)
_ssd = register(
    "ssd", f"({_INPUTS}, bool softplus) -> {_SIX}", _forward, forward_fake, setup_context=_setup_context, backward=_autograd
)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, softplus: bool,
    initial_state: Tensor | None, document_start: Tensor | None, ranks: SequenceRanks | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mamba_kernels.ssd` on checked arguments; y and the final state. `ranks` are several, without an initial state, or None."""
    if ranks is not None:
        return _SpreadSSD.apply(x, dt, A, B, C, D, dt_bias, document_start, softplus, ranks)
    y, final_state, *_ = _ssd(x, dt, A, B, C, D, dt_bias, initial_state, document_start, softplus)
    return y, final_state


class _SpreadSSD(torch.autograd.Function):
    """A sequence spread over ranks, as in `reference`: no operator can hold what they exchange with."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
        document_start: Tensor | None, softplus: bool, ranks: SequenceRanks,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scan = prepare(x, dt, A, B, C, D, dt_bias, count_documents(document_start), softplus)
        y = x.new_empty(x.shape)
        final_state, states = forward_into(scan, None, ranks, y)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, document_start, *scan.kept, *states)
        ctx.softplus, ctx.ranks = softplus, ranks
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, dt_bias, document_start, step, cs, fine, *states = ctx.saved_tensors
        scan = Scan(x, B, C, A, D, (step, cs, fine), count_documents(document_start))
        g = Gradients(*(t.new_empty(t.shape) for t in (x, dt, B, C)))
        sums, _ = backward_into(scan, states, g, dt, dt_bias, ctx.softplus, g_y, g_final, ctx.ranks)
        g_A, g_bias, g_D = sums.unbind()
        return (
            g.x, g.dt, g_A.to(A.dtype), g.B, g.C, None if D is None else g_D.to(D.dtype),
            None if dt_bias is None else g_bias.to(dt_bias.dtype), None, None, None,
        )  # fmt: skip
