"""What tools/bench_kernels.py measures: the ops in the shapes of the 8B models (arXiv 2406.07887), and what others have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mamba_kernels as ops
from kernel_timing import Call, tensors_in
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.vocab import cross_entropy

Inputs = Mapping[str, Tensor | None]
FORWARD, BOTH = "forward", "forward + backward"
BF16 = torch.bfloat16
SSD: Callable[..., Any] = partial(ops.ssd, dt_softplus=True)
CHUNK = 256  # Of mamba_ssm: its models' default.
PEER_ELEMENTS = 1 << 29  # Of x: where mamba_ssm's 32-bit offsets may overflow, an illegal access would end the run.
REFERENCE_ELEMENTS = 1 << 27  # Of x: above, the reference takes seconds.


@dataclass(frozen=True)
class Peer:
    """An implementation of others: `run(*functions, **inputs)`, the functions being those of `needs`, "module:function"."""

    name: str
    run: Callable[..., Any]
    needs: Sequence[str] = ()
    arrange: Callable[[Inputs], Inputs] = dict
    """Our inputs as it wants them."""
    refused: str = ""
    """Why it is not run in this shape."""
    autotuned: bool = False


@dataclass(frozen=True)
class Case:
    """An op in one shape. Inputs that are floating-point have gradients, but for `constants`."""

    op: str
    shape: str
    make: Callable[[torch.device], Inputs]
    ours: Callable[..., Any]
    flops: float = 0.0
    peers: Sequence[Peer] = ()
    constants: Sequence[str] = ()
    again: Sequence[str] | None = None
    """What the backward formula has of the inputs, and of "output 0" and so on; None: all inputs."""
    same_gradient: Sequence[str] = ()
    """Inputs whose gradient is that of another."""
    in_place: Sequence[str] = ()
    directions: Sequence[str] = (FORWARD, BOTH)
    reference: bool = True
    memory: bool = False
    tuned: bool = False
    """Whether configurations are searched in this shape."""


def bind(run: Callable[..., Any], inputs: Inputs, constants: Sequence[str], direction: str, *, everything: bool = False) -> Call:
    """A call without arguments that returns the outputs, or the gradients of the inputs; both with `everything`."""

    def forward() -> Any:
        with torch.no_grad():
            return run(**inputs)

    if direction == FORWARD:
        return forward
    leaves = {
        name: t.detach().requires_grad_() if t is not None and t.is_floating_point() and name not in constants else t
        for name, t in inputs.items()
    }
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    # Of a loss the gradient is 1, as where it is the end of a model.
    seeds = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in tensors_in(forward())]

    def both() -> Any:
        outputs = tensors_in(run(**leaves))
        gradients = torch.autograd.grad(outputs, wanted, seeds)
        return (*(out.detach() for out in outputs), *gradients) if everything else gradients

    return both


@dataclass(frozen=True)
class Shapes:
    """Sizes in the letters of mamba_kernels."""

    tokens: int = 8192
    hidden: int = 4096
    head_dim: int = 64
    state: int = 128
    scans: Sequence[tuple[int, int, int, int]] = (
        (2, 4096, 128, 8), (1, 16384, 128, 8), (1, 65536, 32, 2), (8, 4096, 32, 2), (1, 2048, 128, 8), (1, 131072, 128, 8),
        *((1, 1 << power, 32, 2) for power in (10, 12, 14, 17, 18, 20)),
    )  # fmt: skip
    """B, L, H, G; the first three are tuned in: they share out heads differently."""
    layer: tuple[int, int, int, int] = (2, 4096, 128, 8)
    selective: Sequence[tuple[int, int, int, int]] = ((1, 4096, 8192, 128), (1, 4096, 8192, 16))
    """B, L, E, N."""
    inner: int = 8192
    groups: int = 8
    channels: int = 10240
    batch_length: tuple[int, int] = (2, 4096)
    feed_forward: int = 16384
    attention: tuple[int, int] = (32, 128)
    loss: tuple[int, int, int] = (4096, 4096, 256_000)
    """T, D, V."""
    batches: Sequence[int] = (1, 16, 128)
    crossing: tuple[int, int, int, int] = (32, 2, 8, 128)
    """H and G of SSD; heads and their dimension of attention."""
    crossing_tokens: int = 1 << 19
    shortest: int = 512


FULL = Shapes()
TINY = Shapes(
    tokens=3, hidden=16, head_dim=16, state=16, scans=((1, 20, 2, 1), (2, 9, 2, 2)), layer=(1, 8, 2, 1),
    selective=((1, 9, 8, 16),), inner=32, groups=2, channels=16, batch_length=(2, 10), feed_forward=32, attention=(2, 16),
    loss=(6, 8, 30), batches=(1, 2), crossing=(2, 1, 2, 16), crossing_tokens=32, shortest=16,
)  # fmt: skip
"""To try the program where there is no GPU."""


def normal(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Random numbers: on zeros a GPU is faster than on data."""
    return torch.randn(shape, device=device, dtype=dtype)


def _decays(device: torch.device, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """A in -16 to -1, D, and dt_bias so that steps are a few hundredths, float32; D and dt_bias as long as A."""
    A = -1 - 15 * torch.rand(shape, device=device)
    return A, normal(device, shape[0], dtype=torch.float32), normal(device, shape[0], dtype=torch.float32) * 0.5 - 4


def _ssd_flops(tokens: int, heads: int, groups: int, s: Shapes) -> float:
    """Of the forward pass in chunks of 128: states in and out, and the causal halves of C B^T and of its product with x."""
    inside = 128 * (groups * s.state + heads * s.head_dim)
    return float(tokens * (4 * heads * s.head_dim * s.state + inside))


def ssd_inputs(device: torch.device, shape: tuple[int, int, int, int], s: Shapes) -> dict[str, Tensor]:
    """Of one scan, B L H G."""
    batch, length, heads, groups = shape
    A, D, bias = _decays(device, heads)
    x, dt = normal(device, batch, length, heads, s.head_dim), normal(device, batch, length, heads)
    B, C = (normal(device, batch, length, groups, s.state) for _ in range(2))
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias}


def _chunk_scan(elements: int) -> Peer:
    return Peer(
        "mamba_ssm", lambda f, x, dt, A, B, C, D, dt_bias: f(x, dt, A, B, C, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True),
        ["mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined"], autotuned=True,
        refused="its 32-bit offsets may overflow at this size" if elements > PEER_ELEMENTS else "",
    )  # fmt: skip


def ssd(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """The Mamba-2 scan."""
    return [
        Case(
            "ssd", f"B{b} L{n} H{h} G{g} P{s.head_dim} N{s.state}", partial(ssd_inputs, shape=(b, n, h, g), s=s), SSD,
            _ssd_flops(b * n, h, g, s), [_chunk_scan(b * n * h * s.head_dim)], tuned=(b, n, h, g) in s.scans[:3],
            reference=b * n * h * s.head_dim <= REFERENCE_ELEMENTS,
        )
        for b, n, h, g in s.scans
    ]  # fmt: skip


def selective_scan(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """The Mamba (S6) scan."""

    def make(device: torch.device, shape: tuple[int, int, int, int]) -> Inputs:
        b, n, e, state = shape
        A, D, bias = _decays(device, e, state)
        x, dt = (normal(device, b, n, e) for _ in range(2))
        B, C = (normal(device, b, n, state) for _ in range(2))
        return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias}

    def channels_first(inputs: Inputs) -> Inputs:
        return {k: t.transpose(1, 2).contiguous() if k in ("x", "dt", "B", "C") and t is not None else t for k, t in inputs.items()}

    peer = Peer(
        "mamba_ssm", lambda f, _, x, dt, A, B, C, D, dt_bias: f(x, dt, A, B, C, D, None, dt_bias, True),
        ["mamba_ssm.ops.selective_scan_interface:selective_scan_fn", "selective_scan_cuda:fwd"], channels_first,
    )  # fmt: skip
    return [
        Case(
            "selective_scan", f"B{shape[0]} L{shape[1]} E{shape[2]} N{shape[3]}", partial(make, shape=shape),
            partial(ops.selective_scan, dt_softplus=True), 9.0 * shape[0] * shape[1] * shape[2] * shape[3], [peer], tuned=True,
        )
        for shape in s.selective
    ]  # fmt: skip


def conv1d(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """The convolution with bias and SiLU, of whole sequences and of documents of about a fifth of one."""
    batch, length = s.batch_length

    def make(device: torch.device, documents: bool) -> Inputs:
        starts = torch.zeros(batch, length, dtype=torch.bool, device=device)
        starts[:, :: length // 5 + 1] = True
        x, weight, bias = normal(device, batch, length, s.channels), normal(device, s.channels, 4), normal(device, s.channels)
        return {"x": x, "weight": weight, "bias": bias, "document_start": starts if documents else None}

    def theirs(inputs: Inputs) -> Inputs:
        starts = inputs["document_start"]
        return {**inputs, "document_start": None if starts is None else starts.cumsum(1, dtype=torch.int32)}

    def run(f: Any, x: Tensor, weight: Tensor, bias: Tensor, document_start: Tensor | None) -> Any:
        return f(x.transpose(1, 2), weight, bias, seq_idx=document_start, activation="silu").transpose(1, 2)

    peer = Peer("causal_conv1d", run, ["causal_conv1d.causal_conv1d_interface:causal_conv1d_fn"], theirs)
    return [
        Case(
            "conv1d", f"B{batch} L{length} C{s.channels} W4{' documents' if documents else ''}",
            partial(make, documents=documents),
            partial(ops.causal_conv1d, activation="silu"), 2.0 * 4 * batch * length * s.channels, [peer], tuned=not documents,
        )
        for documents in (False, True)
    ]  # fmt: skip


def norms(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """RMSNorm, with the residual addition before it too, LayerNorm, and the gated norm of a Mamba-2 mixer."""
    size, shape = s.inner // s.groups, f"{s.tokens} x {s.hidden}"

    def make(device: torch.device, columns: int, rows: Sequence[str], vectors: Sequence[str]) -> Inputs:
        large = {name: normal(device, s.tokens, columns) for name in rows}
        return {**large, **{name: normal(device, columns, dtype=torch.float32) for name in vectors}}

    def narrow(inputs: Inputs) -> Inputs:
        """torch has one kernel for the whole only where the weight has the dtype of x."""
        return {name: None if t is None else t.to(BF16) for name, t in inputs.items()}

    def added(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        h = x + residual
        return F.rms_norm(h, (s.hidden,), weight, 1e-5), h

    def gated(f: Any, y: Tensor, z: Tensor, weight: Tensor) -> Any:
        return f(y, weight, None, z=z, eps=1e-5, group_size=size, norm_before_gate=False)

    rms = Peer("torch", lambda x, weight: F.rms_norm(x, (s.hidden,), weight, 1e-5), arrange=narrow)
    layer = Peer("torch", lambda x, weight, bias: F.layer_norm(x, (s.hidden,), weight, bias, 1e-5), arrange=narrow)
    mamba = Peer("mamba_ssm", gated, ["mamba_ssm.ops.triton.layernorm_gated:rmsnorm_fn"])
    return [
        Case(
            "rms_norm", shape, lambda device: make(device, s.hidden, "x", ["weight"]),
            partial(ops.rms_norm, eps=1e-5), peers=[rms], tuned=True,
        ),
        Case(
            "rms_norm + residual", shape, lambda device: make(device, s.hidden, ["x", "residual"], ["weight"]),
            partial(ops.rms_norm, eps=1e-5), peers=[Peer("torch", added, arrange=narrow)], again=["output 1", "weight"],
            same_gradient=["residual"],
        ),
        Case(
            "layer_norm", shape, lambda device: make(device, s.hidden, "x", ["weight", "bias"]),
            partial(ops.layer_norm, eps=1e-5), peers=[layer], again=["x", "weight"], tuned=True,
        ),
        Case(
            "gated_norm", f"{s.tokens} x {s.inner}, groups of {size}", lambda device: make(device, s.inner, "yz", ["weight"]),
            partial(ops.gated_norm, group_size=size, eps=1e-5), peers=[mamba], tuned=True,
        ),
    ]  # fmt: skip


def activations(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """Those of the MLP, and the rotary embedding of half of each head."""
    shape, (heads, dim), (batch, length) = f"{s.tokens} x {s.feed_forward}", s.attention, s.batch_length

    def make(*names: str) -> Callable[[torch.device], Inputs]:
        return lambda device: {name: normal(device, s.tokens, s.feed_forward) for name in names}

    def turned(device: torch.device) -> Inputs:
        cos, sin = ops.rope_tables(torch.arange(length, device=device), dim // 2, 10000.0)
        return {"x": normal(device, batch, length, heads, dim), "cos": cos, "sin": sin}

    return [
        Case(
            "swiglu", shape, make("gate", "up"), ops.swiglu, peers=[Peer("torch", lambda gate, up: F.silu(gate) * up)], tuned=True
        ),
        Case("squared_relu", shape, make("x"), ops.squared_relu, peers=[Peer("torch", lambda x: F.relu(x).square())]),
        Case("gelu", shape, make("x"), ops.gelu, peers=[Peer("torch", lambda x: F.gelu(x))], tuned=True),
        Case(
            "rope", f"B{batch} L{length} H{heads} P{dim}", turned, ops.rope, constants=["cos", "sin"], again=["cos", "sin"],
            tuned=True,
        ),
    ]  # fmt: skip


def loss(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """Output projection and cross-entropy, as training runs them: gradients are computed while logits exist."""
    tokens, hidden, vocabulary = s.loss

    def make(device: torch.device) -> Inputs:
        weight = normal(device, vocabulary, hidden) * hidden**-0.5
        return {"x": normal(device, tokens, hidden), "w": weight, "labels": torch.randint(vocabulary, (tokens,), device=device)}

    def ours(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        assert context is not None
        return cross_entropy(x, w, labels, context, scale=1 / tokens)

    torch_ce = Peer("torch", lambda x, w, labels: F.cross_entropy(F.linear(x, w).float(), labels))
    return [
        Case(
            "loss", f"T{tokens} D{hidden} V{vocabulary}", make, ours, 2.0 * tokens * hidden * vocabulary, [torch_ce], again=[],
            memory=True, tuned=True,
        )
    ]  # fmt: skip


def decode(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """One token: SSD, the selective scan and the convolution, each updating its state."""
    _, _, heads, groups = s.scans[0]
    _, _, channels, state = s.selective[0]

    def ssd_make(device: torch.device, b: int) -> Inputs:
        token = {name: t[:, 0] if t.dim() > 1 else t for name, t in ssd_inputs(device, (b, 1, heads, groups), s).items()}
        return {"state": normal(device, b, heads, s.head_dim, s.state, dtype=torch.float32), **token}

    def scan_make(device: torch.device, b: int) -> Inputs:
        A, D, bias = _decays(device, channels, state)
        x, dt, B, C = (normal(device, b, size) for size in (channels, channels, state, state))
        kept = normal(device, b, channels, state, dtype=torch.float32)
        return {"state": kept, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias}

    def conv_make(device: torch.device, b: int) -> Inputs:
        weight, bias = normal(device, s.channels, 4), normal(device, s.channels)
        return {"state": normal(device, b, 3, s.channels), "x": normal(device, b, s.channels), "weight": weight, "bias": bias}

    def by_head(inputs: Inputs) -> Inputs:
        """Numbers of a head as views of as many as it has channels: so its kernel knows that they are the same."""

        def spread(t: Any, *sizes: int) -> Tensor:
            return t[(..., *(None for _ in sizes))].expand(*t.shape, *sizes)

        wide = {name: spread(inputs[name], s.head_dim) for name in ("dt", "D", "dt_bias")}
        return {**inputs, **wide, "A": spread(inputs["A"], s.head_dim, s.state)}

    def update(f: Any, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Any:
        return f(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)

    def last_first(inputs: Inputs) -> Inputs:
        state = inputs["state"]
        assert state is not None
        return {**inputs, "state": state.transpose(1, 2).contiguous()}

    update_of = ["mamba_ssm.ops.triton.selective_state_update:selective_state_update"]
    conv_peer = Peer(
        "causal_conv1d", lambda f, state, x, weight, bias: f(x, state, weight, bias, "silu"),
        ["causal_conv1d.causal_conv1d_interface:causal_conv1d_update"], last_first,
    )  # fmt: skip
    cases = []
    for b in s.batches:
        common: dict[str, Any] = {"in_place": ["state"], "directions": [FORWARD], "tuned": b == max(s.batches)}
        cases += [
            Case(
                "ssd_step", f"B{b} H{heads} G{groups} P{s.head_dim} N{s.state}", partial(ssd_make, b=b),
                partial(ops.ssd_step, dt_softplus=True), peers=[Peer("mamba_ssm", update, update_of, by_head)], **common,
            ),
            Case(
                "selective_scan_step", f"B{b} E{channels} N{state}", partial(scan_make, b=b),
                partial(ops.selective_scan_step, dt_softplus=True), peers=[Peer("mamba_ssm", update, update_of)], **common,
            ),
            Case(
                "causal_conv1d_step", f"B{b} C{s.channels} W4", partial(conv_make, b=b),
                partial(ops.causal_conv1d_step, activation="silu"), peers=[conv_peer], **common,
            ),
        ]  # fmt: skip
    return cases


def path(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """What lies between the projections of a Mamba-2 mixer, on the packed output of the first: z, x, B, C, dt."""
    batch, length, heads, groups = s.layer
    inner, wide = heads * s.head_dim, groups * s.state
    total = inner + 2 * wide

    def make(device: torch.device) -> Inputs:
        A, D, bias = _decays(device, heads)
        packed = normal(device, batch, length, inner + total + heads)
        conv = {"weight": normal(device, total, 4), "bias": normal(device, total)}
        return {"packed": packed, **conv, "A": A, "D": D, "dt_bias": bias, "norm": normal(device, inner, dtype=torch.float32)}

    def ours(packed: Tensor, weight: Tensor, bias: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, norm: Tensor) -> Any:
        size = inner // groups
        return ops.mamba2_mixer(packed, weight, bias, A, D, dt_bias, norm, state_size=s.state, group_size=size, eps=1e-5)[0]

    def theirs(f: Any, _: Any, packed: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, **scan: Tensor) -> Any:
        options = {"activation": "silu", "rmsnorm_eps": 1e-5, "ngroups": groups, "norm_before_gate": False, "headdim": s.head_dim}
        return f(packed, weight, bias, scan["dt_bias"], scan["A"], scan["D"], CHUNK, rmsnorm_weight=norm, **options)

    needs = ["mamba_ssm.ops.triton.ssd_combined:mamba_split_conv1d_scan_combined", "causal_conv1d:causal_conv1d_fn"]
    flops = _ssd_flops(batch * length, heads, groups, s) + 8.0 * batch * length * total
    shape = f"B{batch} L{length} H{heads} G{groups} P{s.head_dim} N{s.state}"
    return [Case("conv + ssd + gated norm", shape, make, ours, flops, [Peer("mamba_ssm", theirs, needs)])]


def crossover(s: Shapes, context: ParallelContext | None) -> list[Case]:
    """SSD and causal attention of as many tokens in longer and longer sequences."""
    heads, groups, attention_heads, dim = s.crossing

    def attention(name: str, backend: SDPBackend, batch: int, length: int) -> Peer:
        def arrange(inputs: Inputs) -> Inputs:
            device = inputs["x"].device  # type: ignore[union-attr]
            return {part: normal(device, batch, attention_heads, length, dim) for part in "qkv"}

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return Peer(name, run, arrange=arrange)

    cases, length = [], s.shortest
    while length <= s.crossing_tokens:
        batch = s.crossing_tokens // length
        kinds = (("FlashAttention-2", SDPBackend.FLASH_ATTENTION), ("cuDNN attention", SDPBackend.CUDNN_ATTENTION))
        cases.append(
            Case(
                "ssd, attention", f"B{batch} L{length} H{heads} G{groups}, heads {attention_heads} x {dim}",
                partial(ssd_inputs, shape=(batch, length, heads, groups), s=s), SSD,
                _ssd_flops(batch * length, heads, groups, s), [attention(*kind, batch, length) for kind in kinds], reference=False,
            )
        )  # fmt: skip
        length *= 2
    return cases


SECTIONS: dict[str, Callable[[Shapes, ParallelContext | None], list[Case]]] = {
    "ssd": ssd, "selective_scan": selective_scan, "conv1d": conv1d, "norms": norms, "activations": activations, "loss": loss,
    "decode": decode, "path": path, "crossover": crossover,
}  # fmt: skip
