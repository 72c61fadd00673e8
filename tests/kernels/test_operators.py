"""The fused ops as torch.library operators: what modes and compilers see computes what plain calls do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_testing import AllocationWatch, outputs_and_gradients, randn
from torch.utils._python_dispatch import TorchDispatchMode

import mamba_kernels as ops
from mamba_kernels import backend
from megatron_mamba.model.module import SequenceInfo
from megatron_mamba.parallel import fsdp
from tiny import one_process, random_model, tiny

TOKENS = (2, 9)


def wide(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float32)


def scan_inputs(*of_B):
    return {"dt": wide(*TOKENS, 4), "A": -wide(4).abs(), "B": wide(*TOKENS, *of_B), "C": wide(*TOKENS, *of_B, seed=1), "D": wide(4)}


OPS = {
    "ssd": (lambda **t: ops.ssd(**t, dt_softplus=True, return_final_state=True), {"x": wide(*TOKENS, 4, 3)} | scan_inputs(2, 5)),
    "selective_scan": (
        lambda **t: ops.selective_scan(**t, dt_softplus=True, return_final_state=True),
        {"x": wide(*TOKENS, 4)} | scan_inputs(5) | {"A": -wide(4, 5).abs()},
    ),
    "causal_conv1d": (
        lambda **t: ops.causal_conv1d(**t, activation="silu", return_final_state=True),
        {"x": wide(*TOKENS, 6), "weight": wide(6, 3), "bias": wide(6)},
    ),
    "gated_norm": (
        lambda **t: ops.gated_norm(**t, group_size=3, eps=1e-2), {"y": wide(*TOKENS, 6), "z": wide(*TOKENS, 6), "weight": wide(6)}
    ),
    "norm": (lambda **t: ops.layer_norm(**t, eps=1e-2), {"x": wide(*TOKENS, 6), "weight": wide(6), "bias": wide(6)}),
    "add_norm": (
        lambda **t: ops.rms_norm(**t, eps=1e-2), {"x": wide(*TOKENS, 6), "weight": wide(6), "residual": wide(*TOKENS, 6, seed=1)}
    ),
    "swiglu": (ops.swiglu, {"gate": wide(*TOKENS, 6), "up": wide(*TOKENS, 6, seed=1)}),
    "unary_activation": (ops.gelu, {"x": wide(*TOKENS, 6)}),
    "rope": (ops.rope, {"x": wide(*TOKENS, 2, 8), "cos": wide(9, 3), "sin": wide(9, 3, seed=1)}),
    "mamba2_mixer": (
        lambda **t: ops.mamba2_mixer(**t, state_size=5, group_size=6, eps=1e-2),
        {
            "packed": wide(*TOKENS, 48), "conv_weight": wide(32, 4), "conv_bias": wide(32), "A": -wide(4).abs(), "D": wide(4),
            "dt_bias": wide(4), "norm_weight": wide(12),
        },
    ),
}  # fmt: skip


class Names(TorchDispatchMode):
    """The operators of mamba_kernels that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mamba_kernels":
            self.seen.add(func._schema.name.removeprefix("mamba_kernels::"))
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPS)
def test_operator_equals_a_plain_call(name, fused_device):
    op, inputs = OPS[name]
    inputs = {argument: t.to(fused_device) for argument, t in inputs.items()}
    plain = outputs_and_gradients(op, inputs)
    with Names() as names:
        seen = outputs_and_gradients(op, inputs)
    assert {name, "norm_backward" if name == "add_norm" else f"{name}_backward"} <= names.seen
    assert all(torch.equal(seen[what], plain[what]) for what in plain)
    with Names() as names, torch.no_grad():
        op(**inputs)
    assert name in names.seen


@pytest.mark.parametrize("name", OPS)
def test_operators_are_what_their_schemas_say(name, fused_device):
    """No output shares memory with another or with an input, and fake tensors have the shapes, strides and dtypes of real ones."""
    op, inputs = OPS[name]
    with Names() as names:
        outputs_and_gradients(op, {argument: t.to(fused_device) for argument, t in inputs.items()})
    assert len(names.calls) >= 2
    for operator, arguments in names.calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_reference_can_be_asked_for(fused_device, monkeypatch):
    monkeypatch.setattr(backend, "FUSED", False)
    for op, inputs in OPS.values():
        with Names() as names:
            outputs_and_gradients(op, {argument: t.to(fused_device) for argument, t in inputs.items()})
        assert names.seen == set()


@pytest.mark.parametrize("name", OPS)
def test_no_second_derivative(name, fused_device):
    """Asked for, it is refused: the kernels of a backward pass would give a wrong one in silence."""
    op, inputs = OPS[name]
    leaves = {argument: t.to(fused_device).requires_grad_() for argument, t in inputs.items()}
    for mode in (AllocationWatch(), torch.enable_grad()):
        with mode:
            out = op(**leaves)
            out = out[0] if isinstance(out, tuple) else out
            first = torch.autograd.grad(out.sum(), next(iter(leaves.values())), create_graph=True, retain_graph=True)[0]
            with pytest.raises(RuntimeError):
                torch.autograd.grad(first.sum(), list(leaves.values()), allow_unused=True)


@pytest.mark.parametrize("pattern", ["M", "m", "*", "-"])
def test_a_layer_compiles_to_one_graph(pattern, fused_device):
    """Norm, projections, mixer and residual of each kind, forward and backward, without a graph break."""
    if fused_device == "cuda":
        pytest.skip("the model is made for a CPU here; on GPUs, tools/bench_kernels.py compile has one")
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    with one_process() as context:
        layer = random_model(tiny(pattern), context, precision="fp32", sharded=False).layers["0"]
        info, x = SequenceInfo(2, 9, torch.device("cpu")), wide(18, 24)
        parameters = list(layer.parameters())

        def run(module):
            leaf = x.clone().requires_grad_()
            out = module(leaf, info, None)
            return [fsdp.local(t) for t in (out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *parameters]))]

        want = run(layer)
        got = run(torch.compile(layer, backend=compiler, fullgraph=True))
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))
    operator = {"M": "mamba2_mixer", "m": "selective_scan", "*": "norm", "-": "unary_activation"}[pattern]
    assert any(operator in str(node.target) for node in graphs[0].graph.nodes), graphs[0].code


class FakeKernel:
    """A Triton kernel that compiles at its first launch, which notes what each later one is given."""

    def __init__(self, *arg_names):
        self.arg_names, self.compiled, self.launched, self.options = list(arg_names), 0, [], []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **meta):
        self.compiled += 1
        self.options.append(meta)
        return SimpleNamespace(run=self.run, function=self.compiled, packed_metadata="metadata")

    def run(self, *given):
        self.launched.append(given)


def test_a_launch_finds_what_was_compiled(monkeypatch):
    """Once for every dtype, alignment, number and configuration; then with addresses, numbers and constants in order."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream {device}", raising=False)
    kernel, x = FakeKernel("x_ptr", "y_ptr", "N", "s", "BLOCK"), torch.zeros(64)
    variants = [
        ((x, x, 8, 3), {"BLOCK": 16}), ((x, None, 8, 3), {"BLOCK": 16}), ((x, x.double(), 8, 3), {"BLOCK": 16}),
        ((x, x[1:], 8, 3), {"BLOCK": 16}), ((x, x, 9, 3), {"BLOCK": 16}), ((x, x, 8, 3), {"BLOCK": 32}),
        ((x, x, 8, 3), {"BLOCK": 16, "num_warps": 8}),
    ]  # fmt: skip
    for _ in range(2):
        for arguments, meta in variants:
            backend.launch(kernel, (5,), *arguments, **meta)
    backend.launch(kernel, (5, 0), x, x, 8, 3, BLOCK=16)
    backend.launch(kernel, (5,), x.to("meta"), None, 8, 3, BLOCK=16)
    assert kernel.compiled == len(kernel.launched) == len(variants)
    address = x.data_ptr()
    assert kernel.launched[0] == (5, 1, 1, "stream -1", 1, "metadata", None, None, None, address, address, 8, 3, 16)
    assert kernel.launched[1][-5:] == (address, None, 8, 3, 16)
    assert kernel.launched[3][-5:] == (address, address + 4, 8, 3, 16)
    assert [given[4] for given in kernel.launched] == list(range(1, len(variants) + 1))
    # Triton's default is to change, and with it every kernel's numbers.
    assert [options["enable_fp_fusion"] for options in kernel.options] == [True] * len(variants)
