"""`gated_norm` against its definition in float64."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, assert_close, in_float64, outputs_and_gradients, randn, saved_elements, use_blocks

from mamba_kernels import backend, gated_norm

CHANNELS = 24
EPS = 1e-5


def oracle(y, z, weight, *, group_size, eps):
    """Gate before norm, and each group by itself."""
    gated = y * z * torch.sigmoid(z)
    groups = [group / (group.pow(2).mean(-1, keepdim=True) + eps).sqrt() for group in gated.split(group_size, -1)]
    return weight * torch.cat(groups, -1)


class Parts:
    """`gated_norm` of groups in parts of `part` channels, one call a part as on one process each, in this process.

    A call's argument of sum_parts is right once the sums before it were: what the parts gave is added up afterwards, for the
    next run. The first run learns the sums of the forward, the second those of the backward, the third has both.
    """

    def __init__(self, part: int, *, group_size: int, eps: float):
        self.part, self.options = part, {"group_size": group_size, "eps": eps}
        self.given: list[list[torch.Tensor]] = []
        self.sums: list[list[torch.Tensor]] = []

    def sum_parts(self, index: int, own: torch.Tensor) -> torch.Tensor:
        call, group = len(self.given[index]), index * self.part // self.options["group_size"]
        self.given[index].append(own.clone())
        return self.sums[call][group] if call < len(self.sums) else own

    def __call__(self, y, z, weight):
        self.given = [[] for _ in weight.split(self.part)]
        slices = zip(y.split(self.part, -1), z.split(self.part, -1), weight.split(self.part), strict=True)
        outs = [gated_norm(*t, **self.options, sum_parts=partial(self.sum_parts, i)) for i, t in enumerate(slices)]
        return torch.cat(outs, -1)

    def run(self, inputs, *, strides=False):
        """Outputs and gradients of the whole, with the right sums."""
        parts_a_group = self.options["group_size"] // self.part
        for known in range(3):
            got = outputs_and_gradients(self, inputs, strides=strides)
            assert [len(given) for given in self.given] == [2] * len(self.given), "one sum each way"
            calls = [[given[call] for given in self.given] for call in range(min(known + 1, 2))]
            self.sums = [[sum(call[i : i + parts_a_group]) for i in range(0, len(call), parts_a_group)] for call in calls]
        return got


def make_inputs(*shape, device="cpu", dtype=torch.float64):
    draw = partial(randn, device=device, dtype=dtype)
    return {"y": draw(*shape, CHANNELS), "z": draw(*shape, CHANNELS, seed=1), "weight": draw(CHANNELS)}


@contextmanager
def looping():
    """Two programs a group, of four rows at a time."""
    from mamba_kernels.gated_norm import fused

    meta = {"PROGRAMS": 2, "BLOCK_T": 4, "STAGES": 2, "num_warps": 4}
    with fused.FORWARD.forced(meta), fused.BACKWARD.forced(meta):
        yield


@pytest.mark.parametrize("group_size", [1, 6, CHANNELS])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
def test_float64_outputs_and_gradients(shape, group_size, device, monkeypatch):
    use_blocks(monkeypatch, 2 * CHANNELS)
    inputs, options = make_inputs(*shape, device=device), {"group_size": group_size, "eps": EPS}
    want = outputs_and_gradients(partial(oracle, **options), inputs)
    for strides in (False, True):
        got = outputs_and_gradients(partial(gated_norm, **options), inputs, strides=strides)
        assert_close(got, want, EXACT)


@pytest.mark.parametrize(("group_size", "part"), [(CHANNELS, CHANNELS), (CHANNELS, 8), (12, 6), (6, 1)])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
def test_groups_in_parts(shape, group_size, part, device, monkeypatch):
    """Parts that share the sums of their group: outputs and gradients are those of the whole group."""
    use_blocks(monkeypatch, 2 * part)
    inputs, options = make_inputs(*shape, device=device), {"group_size": group_size, "eps": EPS}
    want = outputs_and_gradients(partial(oracle, **options), inputs)
    for strides in (False, True):
        parts = Parts(part, **options)
        assert_close(parts.run(inputs, strides=strides), want, EXACT)
        rows = inputs["y"].numel() // CHANNELS
        assert {given.shape for call in parts.given for given in call} == {(rows,)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_groups_in_parts_in_low_precision(dtype, tolerance, device):
    """The sums that travel are float32."""
    inputs, options = make_inputs(50, device=device, dtype=dtype), {"group_size": 12, "eps": EPS}
    inputs["weight"] = inputs["weight"].float()
    want = outputs_and_gradients(partial(oracle, **options), in_float64(inputs))
    parts = Parts(6, **options)
    assert_close(parts.run(inputs), want, tolerance)
    assert {given.dtype for call in parts.given for given in call} == {torch.float32}


def test_gradcheck(device):
    tensors = [t[..., :4].requires_grad_() for t in make_inputs(3, device=device).values()]
    assert torch.autograd.gradcheck(partial(gated_norm, group_size=2, eps=EPS), tensors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_low_precision(dtype, tolerance, device):
    """The weight stays float32; error against float64 on the same rounded inputs."""
    inputs, options = make_inputs(50, device=device, dtype=dtype), {"group_size": 6, "eps": EPS}
    inputs["weight"] = inputs["weight"].float()
    want = outputs_and_gradients(partial(oracle, **options), in_float64(inputs))
    got = outputs_and_gradients(partial(gated_norm, **options), inputs)
    assert got["output 0"].dtype == dtype
    assert_close(got, want, tolerance)


fused_precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)]
)


@fused_precisions
@pytest.mark.parametrize("group_size", [6, CHANNELS])
def test_fused(group_size, dtype, tolerance, fused_device, poisoned):
    """Groups that do not fill a block, and programs that loop over blocks of rows that do not fill the last."""
    inputs, options = make_inputs(3, 7, device=fused_device, dtype=dtype), {"group_size": group_size, "eps": EPS}
    inputs["weight"] = inputs["weight"].float()
    want = outputs_and_gradients(partial(oracle, **options), in_float64(inputs))
    for strides, loops in ((False, nullcontext), (True, looping)):
        with loops():
            got = outputs_and_gradients(partial(gated_norm, **options), inputs, strides=strides)
        assert got["output 0"].dtype == dtype
        assert_close(got, want, tolerance)


@fused_precisions
@pytest.mark.parametrize(("group_size", "part", "strides"), [(CHANNELS, 12, False), (12, 6, True)])
def test_fused_groups_in_parts(group_size, part, strides, dtype, tolerance, fused_device, poisoned):
    inputs, options = make_inputs(7, device=fused_device, dtype=dtype), {"group_size": group_size, "eps": EPS}
    want = outputs_and_gradients(partial(oracle, **options), in_float64(inputs))
    with looping():
        parts = Parts(part, **options)
        assert_close(parts.run(inputs, strides=strides), want, tolerance)
        assert {(given.shape, given.dtype) for call in parts.given for given in call} == {((7,), torch.float32)}


def test_fused_reads_z_where_it_is(fused_device):
    """Of wider rows nothing beside z is read, and a weight of any dtype has its gradient in that dtype."""
    packed = torch.full((2, 5, 40), torch.nan, device=fused_device)
    z = packed[..., 8:32]
    z.copy_(randn(2, 5, CHANNELS, dtype=torch.float32, device=fused_device))
    inputs = make_inputs(2, 5, device=fused_device, dtype=torch.float32)
    y, weight = inputs["y"], inputs["weight"].half().requires_grad_()
    out = gated_norm(y, z, weight, group_size=6, eps=EPS)
    torch.testing.assert_close(out, oracle(y, z, weight.float(), group_size=6, eps=EPS))
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float16

    from mamba_kernels.norm.fused import as_rows

    assert as_rows(z).data_ptr() == z.data_ptr()


@pytest.mark.parametrize("stride", [1 << 9, pytest.param(1 << 29, marks=pytest.mark.gpu)])
def test_fused_rows_far_apart(stride, fused_device):
    """z with elements past the 2^31st."""
    if stride > 1 << 9 and fused_device == "cpu":
        pytest.skip("takes 4 GiB of a GPU")
    z = torch.empty(4 * stride + CHANNELS, dtype=torch.bfloat16, device=fused_device).as_strided((5, CHANNELS), (stride, 1))
    inputs, options = make_inputs(5, device=fused_device, dtype=torch.bfloat16), {"group_size": 6, "eps": EPS}
    z.copy_(inputs.pop("z"))
    got = outputs_and_gradients(lambda y, weight: gated_norm(y, z, weight, **options), inputs)
    want = outputs_and_gradients(lambda y, weight: oracle(y, z.double(), weight, **options), in_float64(inputs))
    assert_close(got, want, ONE_BF16_ROUNDING)


def test_fused_without_tokens(fused_device):
    inputs = make_inputs(0, device=fused_device, dtype=torch.float32)
    got = outputs_and_gradients(partial(gated_norm, group_size=6, eps=EPS), inputs)
    assert got["output 0"].shape == (0, CHANNELS)
    assert not got["gradient of weight"].any()


def test_fused_keeps_only_inputs(fused_device):
    inputs = make_inputs(50, device=fused_device, dtype=torch.float32)
    assert saved_elements(partial(gated_norm, group_size=6, eps=EPS), inputs) == 0


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_extreme_values(kernels, request):
    """Closed gates and zero groups: the size of eps is what keeps them finite."""
    device = request.getfixturevalue("fused_device") if kernels == "fused" else "cpu"
    inputs = make_inputs(4, device=device, dtype=torch.float32)
    inputs["z"][0], inputs["z"][1], inputs["y"][2] = -200.0, 200.0, 0.0
    want = outputs_and_gradients(partial(oracle, group_size=6, eps=EPS), in_float64(inputs))
    assert_close(outputs_and_gradients(partial(gated_norm, group_size=6, eps=EPS), inputs), want, 1e-6)


def test_keeps_only_inputs():
    inputs = make_inputs(50)
    assert saved_elements(partial(gated_norm, group_size=6, eps=EPS), inputs) == 0
    # Of a part, also its group's sum of each row.
    assert saved_elements(partial(gated_norm, group_size=2 * CHANNELS, eps=EPS, sum_parts=torch.clone), inputs) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 3, 5)}, r"gated_norm: z has shape \(2, 3, 5\), wanted \[..., E\] = \(\(2, 3\), 4\)"),
        ({"z": torch.zeros(3, 4)}, r"gated_norm: z has shape \(3, 4\)"),
        ({"weight": torch.zeros(5)}, r"gated_norm: weight has shape \(5,\), wanted \[E\] = \(4\)"),
        ({"group_size": 3}, "gated_norm: group_size is 3, wanted a divisor of the 4 channels"),
        ({"group_size": 0}, "gated_norm: group_size is 0"),
        (
            {"group_size": 6, "sum_parts": torch.clone},
            "gated_norm: group_size is 6, wanted a multiple of the 4 channels of its part y",
        ),
        ({"group_size": 2, "sum_parts": torch.clone}, "gated_norm: group_size is 2, wanted a multiple"),
        ({"group_size": 0, "sum_parts": torch.clone}, "gated_norm: group_size is 0, wanted a multiple"),
    ],
)
def test_rejects(change, message):
    arguments = {"y": torch.zeros(2, 3, 4), "z": torch.zeros(2, 3, 4), "weight": torch.zeros(4), "group_size": 2, "eps": EPS}
    gated_norm(**arguments)
    with pytest.raises(ValueError, match=message):
        gated_norm(**arguments | change)


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    kernels = backend.KERNELS
    y, weight = torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta"), torch.empty(8192, device="meta")
    z = torch.empty(8192, 18560, dtype=torch.bfloat16, device="meta")[:, :8192]
    yield "gated_norm", lambda: kernels["gated_norm"](y, z, weight, None, 1024, EPS)
    yield "backward", lambda: kernels["gated_norm_backward"](y, z, weight, y, None, None, 1024, EPS)
    part, z_part, weight_part, sums = y[:, :512], z[:, :512], weight[:512], torch.empty(8192, device="meta")
    yield "squares of a part", lambda: kernels["gated_norm_squares"](part, z_part, weight_part, 1024, EPS)
    yield "part", lambda: kernels["gated_norm"](part, z_part, weight_part, sums, 1024, EPS)
    yield "projections of a part", lambda: kernels["gated_norm_projections"](part, z_part, weight_part, part, sums, 1024, EPS)
    yield "backward of a part", lambda: kernels["gated_norm_backward"](part, z_part, weight_part, part, sums, sums, 1024, EPS)
