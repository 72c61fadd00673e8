"""What the tests of every op share: inputs, an op's outputs and gradients, and their error against an oracle.

An op under test and its oracle are functions of tensors by name that return a tensor or a tuple. The oracles are written
from the definitions, token by token, in float64 and with torch's own autograd.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_kernels import backend, common

EXACT = 1e-10  # Largest relative error in float64.
ONE_BF16_ROUNDING = 2.0**-8 + 1e-5  # Of the result, as everything before is float32.
LENGTHS = [1, 63, 100, 257]

# Of sequences spread over ranks: the lengths of the pieces, and where documents start (`starts_in_pieces`).
PIECES = [(9,), (1, 1), (33, 33), (5, 5, 5), (1, 1, 1, 1), (40, 2, 17, 1)]
DOCUMENTS = [None, "few", "many", "borders"]
SEQUENCES = ("x", "dt", "B", "C")  # The arguments that have a length; ranks share the others.

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """The same normal numbers whatever the dtype and device, but for rounding."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def document_starts(batch: int, length: int, device: str) -> Tensor:
    """Boundaries at t = 0, one after the other, at usual chunk borders and at the last token; differing over the batch.

    The second sequence continues the document before it for a while, and the last is one document.
    """
    starts = torch.zeros(batch, length, dtype=torch.bool)
    starts[0, [t for t in (0, 15, 16, 17, 64, 65, length - 1) if t < length]] = True
    if batch > 1:
        starts[1, [t for t in (length // 3, length // 3 + 1, length // 3 + 2, 128) if 0 < t < length]] = True
    starts[batch - 1 if batch > 2 else batch :] = False
    return starts.to(device)


def starts_in_pieces(documents: str | None, batch: int, pieces: tuple[int, ...]) -> Tensor | None:
    """One document, few (one boundary a sequence, the last without), many, or boundaries at the borders of pieces.

    The latter: at the first token of every piece, at the last of every piece, and at all of the second piece alone.
    """
    if documents is None:
        return None
    length, generator = sum(pieces), torch.Generator().manual_seed(sum(pieces))
    starts = torch.zeros(batch, length, dtype=torch.bool)
    if documents == "few":
        starts.scatter_(1, torch.randint(length, (batch, 1), generator=generator), True)
        starts[batch - 1] = False
    elif documents == "many":
        starts = torch.rand(batch, length, generator=generator) < 0.3
    else:
        ends = list(accumulate(pieces))
        starts[0, [0, *ends[:-1]]] = True
        starts[1, [end - 1 for end in ends]] = True
        starts[2, pieces[0] : sum(pieces[:2])] = True
    return starts


def one_launch_at_a_time(monkeypatch, *modules: ModuleType) -> None:
    """Let threads, which play the ranks, wait for each other's kernels: the interpreter is not made for threads."""
    lock, launch = threading.Lock(), backend.launch

    def locked(*arguments, **meta) -> None:
        with lock:
            launch(*arguments, **meta)

    for module in modules:
        monkeypatch.setattr(module, "launch", locked)


class EchoRanks:
    """Ranks of which every one sends what this one does; lists what was sent, and when it was waited for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.events: list[str] = []
        self.sent: list[Tensor] = []

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        self.events.append("start")
        self.sent.append(x)

        def wait() -> Tensor:
            self.events.append("wait")
            return x.expand(self.size, -1)

        return wait


class ThreadRanks:
    """One of the ranks that threads of this process play; `sent` is what they share."""

    def __init__(self, rank: int, size: int, sent: "Sent") -> None:
        self.rank, self.size = rank, size
        self._sent, self._calls = sent, 0

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        call, self._calls = self._calls, self._calls + 1
        self._sent.future(call, self.rank).set_result(x.clone())
        return lambda: torch.stack([self._sent.future(call, rank).result(timeout=200.0) for rank in range(self.size)])


class Sent:
    """What each rank sent, or will have, by number of the call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[tuple[int, int], Future[Tensor]] = {}

    def future(self, call: int, rank: int) -> "Future[Tensor]":
        with self._lock:
            return self._futures.setdefault((call, rank), Future())


def _whole_outputs_and_gradients(
    op: Op, inputs: dict[str, Tensor], pieces: tuple[int, ...], document_start: Tensor | None
) -> dict[str, Tensor]:
    """y and the state after every piece, and the gradients, of a scan in one process: one op on every prefix."""

    def on_prefixes(**inputs: Tensor) -> tuple[Tensor, ...]:
        results = []
        for end in accumulate(pieces):
            prefix = {name: t[:, :end] if name in SEQUENCES else t for name, t in inputs.items()}
            results.append(op(**prefix, document_start=None if document_start is None else document_start[:, :end]))
        return results[-1][0], *(state for _, state in results)

    return outputs_and_gradients(on_prefixes, inputs)


def _spread_outputs_and_gradients(
    op: Op, inputs: dict[str, Tensor], pieces: tuple[int, ...], document_start: Tensor | None
) -> dict[str, Tensor]:
    """What `_whole_outputs_and_gradients` returns, from ranks that hold a piece each; of shared inputs the ranks' sum.

    On the CPU only: its backward runs in the thread that asks for it, so that ranks can wait for each other.
    """
    ends, sent = list(accumulate(pieces)), Sent()

    def on_rank(rank: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        piece = slice(ends[rank] - pieces[rank], ends[rank])
        values = {name: t[:, piece] if name in SEQUENCES else t for name, t in inputs.items()}
        leaves = {name: t.clone().requires_grad_() for name, t in values.items()}
        starts = None if document_start is None else document_start[:, piece]
        y, state = op(**leaves, document_start=starts, ranks=ThreadRanks(rank, len(pieces), sent))
        g_y = _output_gradient(0, y.new_empty(len(y), ends[-1], *y.shape[2:]))[:, piece]
        seeds = [g_y, _output_gradient(1 + rank, state)]
        gradients = torch.autograd.grad((y, state), list(leaves.values()), seeds)
        assert all(torch.equal(leaf, values[name]) for name, leaf in leaves.items()), "an input was modified"
        return [y.detach(), state.detach()], gradients

    with ThreadPoolExecutor(len(pieces)) as pool:
        outputs, gradients = zip(*pool.map(on_rank, range(len(pieces))), strict=True)
    results = {f"output {1 + rank}": state for rank, (_, state) in enumerate(outputs)}
    results["output 0"] = torch.cat([y for y, _ in outputs], 1)
    for name, of_ranks in zip(inputs, zip(*gradients, strict=True), strict=True):
        results[f"gradient of {name}"] = torch.cat(of_ranks, 1) if name in SEQUENCES else sum(of_ranks)
    return results


def assert_spread_close(
    op: Op, inputs: dict[str, Tensor], pieces: tuple[int, ...], document_start: Tensor | None, tolerance: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """y, the state after every piece and every gradient of a scan over ranks, and of one process in float64: both."""
    got = _spread_outputs_and_gradients(op, inputs, pieces, document_start)
    want = _whole_outputs_and_gradients(op, in_float64(inputs), pieces, document_start)
    assert_close(got, want, tolerance)
    return got, want


def rounded_once(got: Tensor, want: Tensor) -> bool:
    """Whether nearly every element is the float64 one, rounded: after two roundings a good part is not."""
    return (got == want.to(got.dtype)).double().mean().item() > 0.98


def use_blocks(monkeypatch, elements: int) -> None:
    """Let the reference ops work in blocks of so many elements, on any device."""
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(common, "DEVICE_BLOCK_ELEMENTS", elements)


def strided(t: Tensor) -> Tensor:
    """The same values with the dimensions reversed in memory, and NaN between any two."""
    base = torch.full((*reversed(t.shape), 2), torch.nan, dtype=t.dtype, device=t.device)
    view = base[..., 0].permute(*reversed(range(t.dim())))
    view.copy_(t)
    assert t.numel() < 2 or not view.is_contiguous()
    return view


def outputs_and_gradients(op: Op, inputs: dict[str, Tensor], *, strides: bool = False) -> dict[str, Tensor]:
    """The outputs of an op by number, and the gradient of every input under a fixed random gradient of every output.

    Asserts that neither inputs nor output gradients were modified, and that gradients have the dtype of their input.
    """
    arrange = strided if strides else torch.clone
    leaves = {name: arrange(t.detach()).requires_grad_() for name, t in inputs.items()}
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [arrange(_output_gradient(i, out)) for i, out in enumerate(outputs)]
    kept = [seed.clone() for seed in seeds]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds, materialize_grads=True)
    assert all(torch.equal(leaf, inputs[name]) for name, leaf in leaves.items()), "an input was modified"
    assert all(torch.equal(seed, was) for seed, was in zip(seeds, kept, strict=True)), "an output gradient was modified"
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        results[f"gradient of {name}"] = gradient
    return results


def _output_gradient(index: int, output: Tensor) -> Tensor:
    """The same numbers in any dtype: bfloat16 holds them."""
    return randn(*output.shape, seed=7 + index, device=output.device.type, dtype=torch.bfloat16).to(output.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted; infinite where either is not finite."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if got.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    difference = (got - want).abs().max().item()
    scale = want.abs().max().item()
    if not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    return difference / scale if scale > 0.0 else float(difference > 0.0)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every output and gradient within a relative error, all of them reported if one is not."""
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance, f"relative errors above {tolerance}: {errors}"


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in inputs.items()}


class AllocationWatch(TorchDispatchMode):
    """Sizes, in elements, of the tensors that operations made while it was active, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.largest[t.dtype] = max(self.largest.get(t.dtype, 0), t.numel())
        return out


def saved_elements(op: Op, inputs: dict[str, Tensor]) -> int:
    """How many elements an op keeps for its backward beside its inputs."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = op(**leaves)  # Held, so that no storage is freed and its address used again.
    del out
    return sum(kept.values())
