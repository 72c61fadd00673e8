"""Whether fused kernels compute the right thing on this device: an operator's outputs and every gradient against float64.

A compiler may turn a right kernel into a wrong one, for some shapes and without a warning: docs/kernels.md has an example. So what
counts is what a kernel computes on the device at hand, with the Triton at hand, at the shape at hand. tools/check_kernels.py
looks at a grid of shapes; a run looks at those of its own model before it trains.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import mamba_kernels as ops

Size = int | float | bool | str
Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An operator in one shape and dtype. `sizes` are what its function in `OPERATORS` takes; what is left out has a default."""

    operator: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, Size], ...]

    @classmethod
    def of(cls, operator: str, dtype: torch.dtype, **sizes: Size) -> "Case":
        return cls(operator, dtype, tuple(sizes.items()))

    def __str__(self) -> str:
        shown = " ".join(f"{name}={value}" for name, value in self.sizes)
        return f"{self.operator} {str(self.dtype).removeprefix('torch.')} {shown}"


class Problem(NamedTuple):
    """What is computed twice: by `run` on the inputs as they are, and by `reference` on the same numbers in float64."""

    run: Op
    inputs: Mapping[str, Tensor]
    """Differentiable, except where `gradients` is false."""
    reference: Op | None = None
    """None: `run`, which is the reference implementation in float64."""
    per_token: tuple[str, ...] = ()
    """Parameters that the reference takes one of for each token. Their gradients are sums that may cancel: an error is measured
    against the sum of their terms' squares where that is larger."""
    gradients: bool = True


class Result(NamedTuple):
    """Of one case."""

    errors: Mapping[str, float]
    """By "output 0" or "gradient of x": the larger of the relative root mean square and the largest difference over the largest
    value; infinite where something is not finite."""
    limit: float

    @property
    def wrong(self) -> dict[str, float]:
        """The errors above the limit."""
        return {name: error for name, error in self.errors.items() if not error <= self.limit}

    @property
    def passed(self) -> bool:
        return not self.wrong


def check(case: Case, device: torch.device | str, seed: int = 0) -> Result:
    """Run a case. Raises ValueError for an operator that is not known, and whatever a kernel raises."""
    if case.operator not in OPERATORS:
        raise ValueError(f"{case.operator} is no operator that can be checked: {', '.join(OPERATORS)}")
    draw = Draw(torch.device(device), case.dtype, seed)
    problem = OPERATORS[case.operator](draw, **dict(case.sizes))
    got = _results(problem.run, problem.inputs, problem.gradients)
    wide = {name: t.double() for name, t in problem.inputs.items()}
    tokens = next(iter(wide.values())).shape[:2]
    wide |= {name: wide[name].expand(*tokens, *wide[name].shape).clone() for name in problem.per_token}
    with _any_algorithm():
        want = _results(problem.reference or problem.run, wide, problem.gradients)
    return Result({name: error(got[name], want[name]) for name in want}, limit(case.operator, case.dtype))


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """The reference in float64 need not be the same bit for bit, and torch's deterministic mode refuses its cumulative sums."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def limit(operator: str, dtype: torch.dtype) -> float:
    """The largest error that rounding explains: so many roundings to the dtype, of operands and of the result, as the operator has
    one after the other. float32 sums have another order, and the SSD's of float32 inputs are sums of decays too."""
    roundings, single = ROUNDINGS[operator]
    return single if dtype == torch.float32 else roundings * torch.finfo(dtype).eps / 2 + 1e-5


ROUNDINGS = {
    "ssd": (8, 3e-6), "mamba2_mixer": (16, 4e-6), "selective_scan": (2, 5e-6), "causal_conv1d": (2, 1e-6),
    "gated_norm": (2, 1e-6), "rms_norm": (2, 1e-6), "layer_norm": (2, 1e-6), "swiglu": (2, 1e-6), "squared_relu": (2, 1e-6),
    "gelu": (2, 1e-6), "rope": (2, 1e-6), "loss": (2, 1e-6), "ssd_step": (2, 2e-6), "selective_scan_step": (2, 2e-6),
    "causal_conv1d_step": (2, 2e-6),
}  # fmt: skip
"""By operator: half units in the last place of a 16-bit dtype, and the limit in float32."""


NOTHING = 1e-12
"""What is smaller throughout is zero but for float64's rounding, inputs being about 1: for one token, the gradient of A."""


def error(got: Tensor, want: Tensor) -> float:
    """The larger of the relative root mean square and the largest difference over the largest value. `want` may have dimensions
    before those of `got`, over which it is summed."""
    got, scale = got.double(), want
    if want.dim() > got.dim():
        terms = tuple(range(want.dim() - got.dim()))
        want, squares = want.sum(terms), want.square().sum(terms)
        scale = torch.maximum(want.abs(), squares.sqrt())
    if got.shape != want.shape or not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    off = got - want
    if got.numel() == 0 or not off.any():
        return 0.0
    if scale.abs().max() < NOTHING:
        return off.abs().max().item()
    return max((off.norm() / scale.norm()).item(), (off.abs().max() / scale.abs().max()).item())


def _results(run: Op, inputs: Mapping[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in inputs.items()}
    outputs = run(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if gradients:
        seeds = [Draw(out.device, torch.bfloat16, 7 + i).normal(*out.shape).to(out.dtype) for i, out in enumerate(outputs)]
        found = torch.autograd.grad(outputs, list(leaves.values()), seeds)
        results |= {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}
    return results


@dataclass
class Draw:
    """Random inputs on a device, the same for a seed."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, with deviation 1."""
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def single(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.float32)

    def columns(self, rows: tuple[int, ...], layout: str, **widths: int) -> dict[str, Tensor]:
        """Tensors [*rows, width]: each by itself, or "packed" as neighbours in one, between columns of NaN."""
        if layout != "packed":
            return {name: self.normal(*rows, width) for name, width in widths.items()}
        parts = [self.normal(*rows, sum(widths.values())), torch.full((*rows, 8), torch.nan, device=self.device, dtype=self.dtype)]
        wide = torch.cat([parts[1], *parts], -1)
        return dict(zip(widths, wide.split([8, *widths.values(), 8], -1)[1:-1], strict=True))

    def starts(self, batch: int, length: int, documents: bool) -> Tensor | None:
        """Where documents start: at about every 40th token, and at the borders of blocks; the last sequence is one document."""
        if not documents:
            return None
        starts = torch.rand(batch, length, generator=self.generator, device=self.device) < 0.025
        starts[0, [t for t in (0, 1, 31, 32, 63, 64, 127, 128, length - 1) if t < length]] = True
        if batch > 1:
            starts[batch - 1] = False
        return starts


def _ssd_wide(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None, *, softplus: bool, starts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """SSD with an A, D and dt_bias for each token [B, S, H]: what decays is a = dt A, what is added dt x = a (x / A)."""
    dt = dt if dt_bias is None else dt + dt_bias
    a = (functional.softplus(dt, threshold=1e9) if softplus else dt) * A
    ones = torch.ones(x.shape[2], dtype=x.dtype, device=x.device)
    y, state = ops.ssd(x / A[..., None], a, ones, B, C, initial_state=initial_state, document_start=starts, return_final_state=True)
    return y if D is None else y + D[..., None] * x, state


def _heads(draw: Draw, heads: int) -> dict[str, Tensor]:
    """Some forget in a few tokens, others hardly at all."""
    return {"A": -draw.single(heads).exp(), "D": draw.single(heads), "dt_bias": draw.single(heads) - 1.0}


def ssd(
    draw: Draw, *, B: int = 2, S: int, H: int, P: int, G: int, N: int, documents: bool = False, state: bool = False,
    options: bool = True, layout: str = "",
) -> Problem:  # fmt: skip
    """`options`: D, dt_bias and softplus."""
    parts = draw.columns((B, S), layout, x=H * P, B=G * N, C=G * N)
    inputs = {
        "x": parts["x"].unflatten(-1, (H, P)), "dt": draw.columns((B, S), layout, dt=H)["dt"], **_heads(draw, H),
        "B": parts["B"].unflatten(-1, (G, N)), "C": parts["C"].unflatten(-1, (G, N)).div_(N**0.5),
    }  # fmt: skip
    if state:
        inputs["initial_state"] = draw.single(B, H, P, N)
    if not options:
        inputs["dt"].abs_()
        del inputs["D"], inputs["dt_bias"]
    starts = draw.starts(B, S, documents)

    def run(**t: Any) -> Any:
        return ops.ssd(**t, dt_softplus=options, document_start=starts, return_final_state=True)

    def reference(**t: Tensor) -> Any:
        return _ssd_wide(**t, softplus=options, starts=starts)

    return Problem(run, inputs, reference, ("A", "D", "dt_bias") if options else ("A",))


def mamba2_mixer(
    draw: Draw, *, B: int = 2, S: int, H: int, P: int, G: int, N: int, W: int = 4, documents: bool = False, state: bool = False,
    layout: str = "", eps: float = 0.1, group_size: int = 0,
) -> Problem:  # fmt: skip
    """`group_size` of the norm, 0 for a G-th of the channels. With the usual small `eps` the norm of a group that is nearly zero
    would multiply what the scan before it has rounded."""
    inner, wide = H * P, H * P + 2 * G * N
    inputs = {
        **draw.columns((B, S), layout, packed=inner + wide + H), "conv_weight": draw.normal(wide, W) / W**0.5,
        "conv_bias": draw.normal(wide), **_heads(draw, H), "norm_weight": draw.single(inner),
    }  # fmt: skip
    if state:
        inputs |= {"conv_state": draw.normal(B, W - 1, wide), "ssm_state": draw.single(B, H, P, N)}
    starts, size = draw.starts(B, S, documents), group_size or inner // G

    def run(**t: Any) -> Any:
        return ops.mamba2_mixer(**t, state_size=N, group_size=size, eps=eps, document_start=starts)

    def reference(packed: Tensor, conv_weight: Tensor, conv_bias: Tensor, norm_weight: Tensor, **t: Tensor) -> Any:
        z, x, dt = packed.split([inner, wide, H], -1)
        x, conv_state = ops.causal_conv1d(
            x, conv_weight, conv_bias, activation="silu", initial_state=t.pop("conv_state", None), document_start=starts,
            return_final_state=True,
        )  # fmt: skip
        x, B_, C = x.split([inner, G * N, G * N], -1)
        B_, C = B_.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        before = t.pop("ssm_state", None)
        y, after = _ssd_wide(x.unflatten(-1, (H, P)), dt, B=B_, C=C, initial_state=before, softplus=True, starts=starts, **t)
        return ops.gated_norm(y.flatten(2), z, norm_weight, group_size=size, eps=eps), conv_state, after

    return Problem(run, inputs, reference, ("A", "D", "dt_bias"))


def selective_scan(
    draw: Draw, *, B: int = 2, S: int, E: int, N: int, documents: bool = False, state: bool = False, options: bool = True,
    layout: str = "",
) -> Problem:  # fmt: skip
    """`options`: D, dt_bias and softplus."""
    parts = {**draw.columns((B, S), layout, x=E, dt=E), **draw.columns((B, S), layout, B=N, C=N)}
    inputs = {**parts, "A": -draw.single(E, N).exp(), "D": draw.single(E), "dt_bias": draw.single(E) - 1.0}
    if state:
        inputs["initial_state"] = draw.single(B, E, N)
    if not options:
        inputs["dt"].abs_()
        del inputs["D"], inputs["dt_bias"]
    starts = draw.starts(B, S, documents)

    def run(**t: Any) -> Any:
        return ops.selective_scan(**t, dt_softplus=options, document_start=starts, return_final_state=True)

    return Problem(run, inputs)


def causal_conv1d(
    draw: Draw, *, B: int = 2, S: int, C: int, W: int = 4, documents: bool = False, state: bool = False, options: bool = True,
    layout: str = "",
) -> Problem:  # fmt: skip
    """`options`: bias and SiLU."""
    inputs = {**draw.columns((B, S), layout, x=C), "weight": draw.normal(C, W) / W**0.5}
    if options:
        inputs["bias"] = draw.normal(C)
    if state:
        inputs["initial_state"] = draw.normal(B, W - 1, C)
    starts, activation = draw.starts(B, S, documents), "silu" if options else None

    def run(**t: Any) -> Any:
        return ops.causal_conv1d(**t, activation=activation, document_start=starts, return_final_state=True)

    return Problem(run, inputs)


def gated_norm(draw: Draw, *, T: int, E: int, groups: int = 1, eps: float = 1e-5, layout: str = "") -> Problem:
    """y and z [T, E], normalised in `groups` of E / groups channels."""
    inputs = {**draw.columns((T,), layout, y=E, z=E), "weight": draw.single(E)}
    return Problem(lambda **t: ops.gated_norm(**t, group_size=E // groups, eps=eps), inputs)


def _norm(draw: Draw, op: Op, T: int, D: int, residual: str, layout: str, **parameters: Tensor) -> Problem:
    """`residual`: "", "same" for one of the dtype of x, or "float32". What is normalised is the sum as it is rounded."""
    inputs = {**draw.columns((T,), layout, x=D), **parameters}
    if residual:
        inputs["residual"] = draw.normal(T, D, dtype=draw.dtype if residual == "same" else torch.float32)
    dtype = inputs["residual"].dtype if residual else draw.dtype

    def reference(**t: Tensor) -> Any:
        if residual:
            h = (t["x"] + t["residual"]).detach()
            t["residual"] = t["residual"] + (h.to(dtype).double() - h)
        return op(**t)

    return Problem(op, inputs, reference)


def rms_norm(draw: Draw, *, T: int, D: int, residual: str = "", eps: float = 1e-5, layout: str = "") -> Problem:
    """x [T, D], with or without a `residual` (see `_norm`)."""
    return _norm(draw, lambda **t: ops.rms_norm(**t, eps=eps), T, D, residual, layout, weight=draw.single(D))


def layer_norm(draw: Draw, *, T: int, D: int, residual: str = "", eps: float = 1e-5, layout: str = "") -> Problem:
    """LayerNorm-1p, with a bias."""
    op = lambda **t: ops.layer_norm(**t, eps=eps, zero_centered=True)  # noqa: E731
    return _norm(draw, op, T, D, residual, layout, weight=draw.single(D), bias=draw.single(D))


def swiglu(draw: Draw, *, T: int, F: int, layout: str = "") -> Problem:
    """gate and up [T, F]."""
    return Problem(ops.swiglu, draw.columns((T,), layout, gate=F, up=F))


def squared_relu(draw: Draw, *, T: int, F: int, layout: str = "") -> Problem:
    """x [T, F]."""
    return Problem(ops.squared_relu, draw.columns((T,), layout, x=F))


def gelu(draw: Draw, *, T: int, F: int, approximate: str = "none", layout: str = "") -> Problem:
    """x [T, F]; `approximate` as torch has it."""
    return Problem(lambda x: ops.gelu(x, approximate=approximate), draw.columns((T,), layout, x=F))


def rope(draw: Draw, *, B: int = 2, S: int, H: int, P: int, rotary: int, layout: str = "") -> Problem:
    """x [B, S, H, P], of which the first `rotary` dimensions of each head turn."""
    x = draw.columns((B, S), layout, x=H * P)["x"].unflatten(-1, (H, P))
    cos, sin = ops.rope_tables(torch.arange(S, device=draw.device), rotary, 10000.0)
    return Problem(lambda x: ops.rope(x, cos, sin), {"x": x}, lambda x: ops.rope(x, cos.double(), sin.double()))


def loss(draw: Draw, *, T: int, V: int, start: int = 0, layout: str = "") -> Problem:
    """Statistics of one shard of logits, and the gradient of the loss: their targets may be in other shards."""
    logits = draw.columns((T,), layout, logits=V)["logits"]
    targets = torch.randint(-1, 2 * V, (T,), generator=draw.generator, device=draw.device)
    scale = draw.single(T)
    log_sum_exp = logits.double().logsumexp(-1)

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        kind = torch.promote_types(logits.dtype, torch.float32)
        gradient = ops.softmax_gradient(logits, targets, log_sum_exp.to(kind), scale.to(kind), start)
        return *ops.softmax_statistics(logits, targets, start), gradient

    return Problem(run, {"logits": logits}, gradients=False)


def _step(op: Op, state: Tensor, inputs: Mapping[str, Tensor], **options: Any) -> Problem:
    def run(state: Tensor, **t: Tensor) -> tuple[Tensor, Tensor]:
        after = state.clone()
        y = op(after, **t, **options)
        assert isinstance(y, Tensor)
        return y, after

    return Problem(run, {"state": state, **inputs}, gradients=False)


def ssd_step(draw: Draw, *, B: int, H: int, P: int, G: int, N: int, layout: str = "") -> Problem:
    """One token of `ssd`: x [B, H, P], B and C [B, G, N]; y and the new state."""
    parts = draw.columns((B,), layout, x=H * P, B=G * N, C=G * N)
    inputs = {
        "x": parts["x"].unflatten(-1, (H, P)), "dt": draw.normal(B, H), **_heads(draw, H),
        "B": parts["B"].unflatten(-1, (G, N)), "C": parts["C"].unflatten(-1, (G, N)),
    }  # fmt: skip
    return _step(ops.ssd_step, draw.single(B, H, P, N), inputs, dt_softplus=True)


def selective_scan_step(draw: Draw, *, B: int, E: int, N: int, layout: str = "") -> Problem:
    """One token of `selective_scan`: x [B, E], B and C [B, N]; y and the new state."""
    inputs = {**draw.columns((B,), layout, x=E, dt=E), **draw.columns((B,), layout, B=N, C=N)}
    inputs |= {"A": -draw.single(E, N).exp(), "D": draw.single(E), "dt_bias": draw.single(E) - 1.0}
    return _step(ops.selective_scan_step, draw.single(B, E, N), inputs, dt_softplus=True)


def causal_conv1d_step(draw: Draw, *, B: int, C: int, W: int = 4, layout: str = "") -> Problem:
    """One token of `causal_conv1d`: x [B, C], a filter of W; y and the new state."""
    inputs = {**draw.columns((B,), layout, x=C), "weight": draw.normal(C, W), "bias": draw.normal(C)}
    return _step(ops.causal_conv1d_step, draw.normal(B, W - 1, C), inputs, activation="silu")


OPERATORS: Mapping[str, Callable[..., Problem]] = {
    function.__name__: function
    for function in (
        ssd, mamba2_mixer, selective_scan, causal_conv1d, gated_norm, rms_norm, layer_norm, swiglu, squared_relu, gelu, rope, loss,
        ssd_step, selective_scan_step, causal_conv1d_step,
    )
}  # fmt: skip
"""What makes the problem of each operator, with the sizes of a case in the dimension letters of its docstring."""
