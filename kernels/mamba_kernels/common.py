"""What several ops share: argument checks with readable errors, the accumulation dtype, the step size, SiLU's gradient,
and how the scans carry their state over the ranks of a spread sequence."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

# log1p(exp(-v)) = softplus(v) - v is below half a unit in the last place of v in float64 from here on. torch's default
# of 20 is good for float32 only.
SOFTPLUS_IS_IDENTITY_ABOVE = 40.0

# Elements of a block of rows: temporaries of a block stay in a CPU's cache and are not returned to the system between
# operations, which for whole tensors takes several times longer than computing them.
BLOCK_ELEMENTS = 1 << 17

# Elsewhere a block costs kernel launches, so it is as large as its fp32 temporaries (256 MiB each) may be.
DEVICE_BLOCK_ELEMENTS = 1 << 26

Sizes = dict[str, Any]  # of dimension letters


class SequenceRanks(Protocol):
    """The ranks over which a sequence is spread, in order: rank i holds the i-th contiguous piece."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to collect `x` [n] (same shape on all ranks) of all ranks; the function returned waits and returns [size, n]."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << max(n - 1, 0).bit_length()


def unit_stride(t: Tensor) -> Tensor:
    """With the elements of the last dimension next to each other: the tensor itself where they are."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_rows(t: Tensor) -> Tensor:
    """[..., F] as [T, F] with the elements of a row next to each other: a view where the strides allow one."""
    t = unit_stride(t)
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def contiguous(t: Tensor | None) -> Tensor | None:
    """`t.contiguous()` of a tensor that may be missing."""
    return None if t is None else t.contiguous()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op on `dtype` computes and keeps its state: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def row_blocks(matrix: Tensor) -> list[slice]:
    """Slices that cut the rows of a matrix into blocks: of a cache's size on a CPU, few and large elsewhere."""
    rows, columns = matrix.shape
    step = max((BLOCK_ELEMENTS if matrix.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS) // max(columns, 1), 1)
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def check_tensors(op: str, sizes: Sizes, **arguments: tuple[Tensor | None, str]) -> None:
    """Check shape, dtype and device of floating-point arguments given as `name=(tensor, "B S H")`; None is skipped.

    A letter stands for the size of its first appearance, collected in `sizes`; `W-1` for one less than W; a leading
    `...` for any dimensions, the same each time. Raises ValueError naming op and argument, what it has and what is wanted.
    """
    device = None
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        _check_shape(op, name, tensor, letters, sizes)
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, wanted a floating-point dtype")
        device = device or tensor.device
        _check_device(op, name, tensor, device)


def check_index(op: str, sizes: Sizes, name: str, tensor: Tensor, letters: str, device: torch.device) -> None:
    """Check shape and device of an integer argument, and that it is one."""
    _check_shape(op, name, tensor, letters, sizes)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, wanted an integer dtype")
    _check_device(op, name, tensor, device)


def check_document_start(op: str, sizes: Sizes, document_start: Tensor | None, device: torch.device) -> None:
    """Check that document boundaries are a bool tensor [B, S]; None is skipped."""
    if document_start is None:
        return
    _check_shape(op, "document_start", document_start, "B S", sizes)
    if document_start.dtype != torch.bool:
        raise ValueError(f"{op}: document_start has dtype {document_start.dtype}, wanted torch.bool")
    _check_device(op, "document_start", document_start, device)


def check_groups(op: str, sizes: Sizes) -> None:
    """Check that the H heads split evenly over the G groups of B and C."""
    heads, groups = sizes["H"], sizes["G"]
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: B and C have {groups} groups, wanted a divisor of the {heads} heads of x")


def check_group_size(op: str, channels: int, group_size: int, *, spread: bool) -> None:
    """Check that groups of channels of the gated norm are whole here or, if they are `spread`, that here is a whole part of one."""
    if not spread and (group_size < 1 or channels % group_size):
        raise ValueError(f"{op}: group_size is {group_size}, wanted a divisor of the {channels} channels of y")
    if spread and (group_size < 1 or group_size % channels):
        raise ValueError(f"{op}: group_size is {group_size}, wanted a multiple of the {channels} channels of its part y")


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that an option has one of its values."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, wanted {' or '.join(repr(choice) for choice in choices)}")


def positive_dt(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """The step size the recurrence uses: dt (+ dt_bias over the last dimension), through softplus if asked."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return functional.softplus(dt, threshold=SOFTPLUS_IS_IDENTITY_ABOVE) if dt_softplus else dt


def spread_ranks(op: str, ranks: SequenceRanks | None, initial_state: Tensor | None) -> SequenceRanks | None:
    """The ranks, or None where there is but one and so nothing to exchange.

    Raises ValueError for an initial state beside several ranks: it comes from decoding, which does not spread a sequence.
    """
    if ranks is None or ranks.size == 1:
        return None
    if initial_state is not None:
        raise ValueError(f"{op}: initial_state with a sequence spread over {ranks.size} ranks, wanted None, or one rank")
    return ranks


def start_state_before(
    ranks: SequenceRanks, decay: Tensor, final_state: Tensor, as_decay: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Begin to compute the state before this rank's piece (Mamba-2, arXiv 2405.21060, section 8.2).

    With f_i `final_state`, the state after piece i scanned from a zero state, and D_i = as_decay(decay), what the piece
    leaves of the state before it, that is h_i = sum_{j<i} (prod_{j<k<i} D_k) f_j. Every rank sends f_i and `decay`, as
    one vector. The function returned waits for the others' and returns h_i, a new tensor.
    """
    return _start_carry(ranks, range(ranks.rank), decay, final_state, as_decay)


def start_gradient_after(
    ranks: SequenceRanks, decay: Tensor, gradient: Tensor, as_decay: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Begin to compute the gradient that this rank's final state has from the ranks after it.

    The transpose of `start_state_before`: with g_j `gradient`, that of the state before piece j through the outputs of
    piece j alone, it is sum_{j>i} (prod_{i<k<j} D_k) g_j. Every rank sends g_i and `decay`.
    """
    return _start_carry(ranks, range(ranks.size - 1, ranks.rank, -1), decay, gradient, as_decay)


def _start_carry(
    ranks: SequenceRanks, passed: Iterable[int], decay: Tensor, state: Tensor, as_decay: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Send state and decay; then run state <- D_j state + state_j over the ranks passed on the way to this one."""
    wait = ranks.start_gather(torch.cat([state.flatten(), decay.flatten()]))

    def carried() -> Tensor:
        states, decays = wait().split([state.numel(), decay.numel()], dim=1)
        total = torch.zeros_like(state)
        for j in passed:
            total = torch.addcmul(states[j].view(state.shape), as_decay(decays[j].view(decay.shape)), total)
        return total

    return carried


def silu_gradient(g_out: Tensor, v: Tensor) -> Tensor:
    """The gradient of v from that of silu(v), as a new tensor."""
    return torch.ops.aten.silu_backward(g_out, v)


def _check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, wanted {device}, where the first argument is")


def _check_shape(op: str, name: str, tensor: Tensor, letters: str, sizes: Sizes) -> None:
    tokens = _tokens(letters)
    shape: list[Any] = list(tensor.shape)
    if tokens[0] == "..." and len(shape) >= len(tokens) - 1:
        leading = len(shape) - len(tokens) + 1
        shape = [tuple(shape[:leading]), *shape[leading:]]
    if len(shape) == len(tokens):
        for token, size in zip(tokens, shape, strict=True):
            if _size(token, sizes, size) != size:
                break
        else:
            sizes.update(zip(tokens, shape, strict=True))
            return
    wanted = ", ".join(str(_size(token, sizes, token)) for token in tokens)
    raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, wanted [{', '.join(tokens)}] = ({wanted})")


@cache
def _tokens(letters: str) -> list[str]:
    return letters.split()


def _size(token: str, sizes: Sizes, default: object) -> Any:
    """The size a token stands for, or `default` while its letter is unbound."""
    return sizes[token[:-2]] - 1 if token.endswith("-1") else sizes.get(token, default)
