"""The parts of a sharded cross-entropy, put together, and the loss of a model made of them, against log-softmax in float64."""

from itertools import pairwise

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, AllocationWatch, assert_close, randn, use_blocks

from mamba_kernels import backend, softmax_gradient, softmax_statistics
from mamba_kernels.cross_entropy import scale_
from megatron_mamba.config import ParallelConfig
from megatron_mamba.parallel import vocab
from megatron_mamba.parallel.context import ParallelContext

TOKENS, VOCAB = 9, 23
SHARDS = {"whole": [0, 23], "halves": [0, 12, 23], "uneven": [0, 1, 20, 22, 23]}


def make_targets(device):
    """Including both ends of the vocabulary, and two tokens to ignore."""
    return torch.tensor([0, 22, 11, 12, -100, 1, 19, -1, 5], device=device)


def oracle(logits, targets, scale):
    """Loss of every token, 0 where ignored, and the gradient of sum(scale * loss)."""
    logits = logits.double().detach().requires_grad_()
    chosen = torch.log_softmax(logits, 1)[range(TOKENS), targets.long().clamp(min=0)]
    loss = torch.where(targets >= 0, -chosen, 0.0)
    (gradient,) = torch.autograd.grad((scale.double() * loss).sum(), logits)
    return {"loss": loss.detach(), "gradient": gradient}


def sharded(logits, targets, scale, borders, in_place=False):
    """Loss and gradient from the op, with the reductions that a caller does over ranks; and its statistics."""
    shards = [(logits[:, a:b], a) for a, b in pairwise(borders)]
    maxima, sums, target_logits = zip(*(softmax_statistics(shard, targets, a) for shard, a in shards), strict=True)
    largest = torch.stack(maxima).amax(0)
    sum_exp = sum(s * torch.exp(m - largest) for s, m in zip(sums, maxima, strict=True))
    log_sum_exp = largest + torch.log(sum_exp)
    loss = torch.where(targets >= 0, log_sum_exp - sum(target_logits), 0.0)
    gradients = [softmax_gradient(shard, targets, log_sum_exp, scale, a, out=shard if in_place else None) for shard, a in shards]
    return {"loss": loss, "gradient": torch.cat(gradients, 1)}


def make_scale(targets, dtype):
    return torch.where(targets >= 0, randn(TOKENS, device=targets.device.type, dtype=dtype), 0.0)


@pytest.mark.parametrize("borders", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "blocks"])
def test_float64_loss_and_gradient(borders, layout, device, monkeypatch):
    logits, targets = 5.0 * randn(TOKENS, VOCAB, device=device), make_targets(device)
    if layout == "strided":
        logits = logits.T.contiguous().T
    if layout == "blocks":
        use_blocks(monkeypatch, 2 * VOCAB)
    scale = make_scale(targets, torch.float64)
    assert_close(sharded(logits, targets, scale, borders), oracle(logits, targets, scale), EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_low_precision(dtype, tolerance, index_dtype, device):
    """Statistics in float32: only the gradient is rounded to the dtype of the logits."""
    logits, targets = 5.0 * randn(TOKENS, VOCAB, device=device, dtype=dtype), make_targets(device).to(index_dtype)
    scale = make_scale(targets, torch.float32)
    got, want = sharded(logits, targets, scale, SHARDS["uneven"]), oracle(logits, targets, scale)
    assert got["loss"].dtype == torch.float32
    assert got["gradient"].dtype == dtype
    assert_close({"loss": got["loss"]}, {"loss": want["loss"]}, 1e-6)
    assert_close({"gradient": got["gradient"]}, {"gradient": want["gradient"]}, tolerance)


def test_statistics_of_a_shard(device):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-torch.inf, -torch.inf, -torch.inf], [1e4, -1e4, 0.0]], device=device)
    largest, sum_exp, target_logit = softmax_statistics(logits, torch.tensor([12, 5, 13], device=device), 10)
    assert largest.tolist() == [3.0, -torch.inf, 1e4]
    expected = torch.tensor([1.0 + 2.718281828**-1 + 2.718281828**-2, 0.0, 1.0], device=device)
    torch.testing.assert_close(sum_exp, expected)
    assert target_logit.tolist() == [2.0, 0.0, 0.0]


def test_shard_of_padding(device):
    """A shard that holds nothing but -inf changes neither the loss nor the other gradients."""
    logits, targets = randn(TOKENS, VOCAB, device=device), make_targets(device)
    padded = torch.cat([logits, torch.full((TOKENS, 4), -torch.inf, device=device)], 1)
    scale = make_scale(targets, torch.float64)
    got = sharded(padded, targets, scale, [0, 12, VOCAB, VOCAB + 4])
    want = oracle(logits, targets, scale)
    assert got["gradient"][:, VOCAB:].abs().max() == 0.0
    assert_close({"loss": got["loss"], "gradient": got["gradient"][:, :VOCAB]}, want, EXACT)


def test_no_float32_copy_of_logits():
    logits, targets = randn(64, 4096, dtype=torch.bfloat16), torch.arange(64)
    with AllocationWatch() as watch:
        largest, sum_exp, _ = softmax_statistics(logits, targets, 0)
        softmax_gradient(logits, targets, largest + sum_exp.log(), torch.ones(64), 0)
    assert watch.largest[torch.float32] <= logits.numel() // 2


FUSED_TARGETS = [0, 99, 31, 32, -100, 64, 95, -1, 96]
FUSED = [
    ([0, 23], "contiguous"), ([0, 1, 65, 97, 100], "contiguous"), ([0, 100], "padded rows"), ([0, 100], "columns"),
    ([0, 64, 100], "in place"),
]  # fmt: skip


@pytest.fixture
def poisoned(monkeypatch):
    """New memory holds NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filling(getattr(owner, name)))


def filling(make):
    def filled(*given, **options):
        t = make(*given, **options)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    return filled


def small_blocks(monkeypatch):
    """Blocks of which rows of 100 are three and a part."""
    from mamba_kernels.cross_entropy import fused

    for tunable in (fused.STATISTICS, fused.GRADIENT, fused.SCALING):
        monkeypatch.setattr(tunable, "_forced", {"BLOCK": 32, "num_warps": 1})
    monkeypatch.setattr(fused, "SCALING_PROGRAMS", 2)


@pytest.mark.parametrize(("borders", "layout"), FUSED, ids=str)
@pytest.mark.parametrize(
    ("dtype", "index_dtype", "tolerance"),
    [(torch.float32, torch.int32, 1e-6), (torch.bfloat16, torch.int64, ONE_BF16_ROUNDING)],
)
def test_fused(borders, dtype, index_dtype, tolerance, layout, fused_device, poisoned, monkeypatch):
    if borders[-1] > 23:
        small_blocks(monkeypatch)
    logits = 5.0 * randn(TOKENS, borders[-1], device=fused_device, dtype=dtype)
    targets = torch.tensor(FUSED_TARGETS, device=fused_device).clamp(max=borders[-1] - 1).to(index_dtype)
    scale = make_scale(targets, torch.float32)
    want = oracle(logits, targets, scale)
    if layout == "padded rows":
        logits = torch.nn.functional.pad(logits, (0, 7), value=torch.nan)[:, :-7]
    if layout == "columns":
        logits, targets, scale = logits.T.contiguous().T, targets.repeat_interleave(2)[::2], scale.repeat_interleave(2)[::2]
    if layout == "in place":
        logits = logits.clone()
    before = logits.clone()
    got = sharded(logits, targets, scale, borders, in_place=layout == "in place")
    assert got["loss"].dtype == torch.float32
    assert got["gradient"].dtype == dtype
    assert_close({"loss": got["loss"]}, {"loss": want["loss"]}, 1e-6)
    assert_close({"gradient": got["gradient"]}, {"gradient": want["gradient"]}, tolerance)
    assert torch.equal(logits, got["gradient"] if layout == "in place" else before)


def test_fused_infinite_logits(fused_device, monkeypatch):
    """Shards, rows and whole blocks of -inf; and what is not finite shows in the loss."""
    small_blocks(monkeypatch)
    logits = randn(5, 100, device=fused_device, dtype=torch.float32)
    logits[0], logits[1, :70], logits[2, 3:], logits[3, 5], logits[4, 98] = -torch.inf, -torch.inf, -torch.inf, torch.nan, torch.inf
    targets = torch.tensor([5, 80, 1, 2, 98], device=fused_device)
    largest, sum_exp, target_logit = softmax_statistics(logits, targets, 0)
    want = torch.logsumexp(logits[:3].double(), 1)
    assert_close({"log_sum_exp": (largest + sum_exp.log())[1:3]}, {"log_sum_exp": want[1:3]}, 1e-6)
    assert (largest[0].item(), sum_exp[0].item()) == (-torch.inf, 0.0)
    assert torch.equal(target_logit[:3], logits[range(3), targets[:3]])
    assert (largest + sum_exp.log())[3:].isnan().all()
    gradient = softmax_gradient(logits[1:3], targets[1:3], want[1:3], torch.ones(2, device=fused_device), 0)
    onehot = torch.nn.functional.one_hot(targets[1:3], 100)
    assert_close({"gradient": gradient}, {"gradient": logits[1:3].double().softmax(1) - onehot}, 1e-6)
    # The second half of a row whose first half another rank has.
    assert softmax_gradient(logits[:1], targets[:1], torch.zeros(1, device=fused_device), targets[:1].float(), 50).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scale(dtype, fused_device, monkeypatch):
    """In place, several blocks a program; by one, what was there stays as it is."""
    small_blocks(monkeypatch)
    x = randn(3, 71, device=fused_device, dtype=dtype)
    for factor in (1.0, 0.3, 0.0):
        got = x.clone()
        assert scale_(got, torch.tensor(factor, device=fused_device)) is got
        wide = torch.promote_types(dtype, torch.float32)
        want = (x.to(wide) * torch.tensor(factor, device=fused_device).to(wide)).to(dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"scale_: factor is \(1,\) on .*, wanted a scalar on"):
        scale_(x, torch.ones(1, device=fused_device))
    with pytest.raises(ValueError, match=r"scale_: x has dtype .* and strides \(1, 71\), wanted floating-point and contiguous"):
        scale_(x.T, torch.ones((), device=fused_device))


def test_operators(fused_device):
    """What torch is told of them is so: what they write to, and shapes on fake tensors."""
    logits, targets = randn(3, 40, device=fused_device, dtype=torch.float32), torch.tensor([0, -1, 39], device=fused_device)
    row, names = torch.ones(3, device=fused_device), torch.ops.mamba_kernels
    calls = [(names.softmax_statistics, (logits, targets, 0)), (names.scale_, (logits, row[0]))]
    calls.append((names.softmax_gradient, (torch.empty_like(logits), logits, targets, row, row, 0)))
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("chunk", [0, 10, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 3e-6), (torch.bfloat16, None)])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_loss_of_a_model(dtype, tolerance, chunk, upstream, fused_device, poisoned):
    """Loss and the gradients of hidden states and weight, for any chunks."""
    tokens, hidden, vocabulary, scale = 20, 16, 50, 0.1
    h_TD, weight_vD = (randn(n, hidden, device=fused_device, dtype=dtype).requires_grad_() for n in (tokens, vocabulary))
    labels_T = torch.arange(0, 3 * tokens, 3, device=fused_device) % vocabulary
    labels_T[3:5] = vocab.IGNORE
    context = ParallelContext.create(ParallelConfig(), fused_device)
    try:
        loss = vocab.cross_entropy(h_TD, weight_vD, labels_T, context, scale=scale, chunk_tokens=chunk)
    finally:
        context.close()
    got = torch.autograd.grad(loss * upstream, [h_TD, weight_vD])
    assert [t.dtype for t in got] == [dtype, dtype]
    wide = [t.detach().double().requires_grad_() for t in (h_TD, weight_vD)]
    logits = wide[0] @ wide[1].T
    if dtype == torch.bfloat16:
        # The logits are rounded, and the loss is that of rounded logits; so are their gradients, which sums average out.
        logits = logits + ((h_TD @ weight_vD.T).double() - logits).detach()
        tolerance = 2 * ONE_BF16_ROUNDING
    want_loss = scale * torch.nn.functional.cross_entropy(logits, labels_T, ignore_index=vocab.IGNORE, reduction="sum")
    want = torch.autograd.grad(want_loss * upstream, wide)
    assert_close({"loss": loss.detach()}, {"loss": want_loss.detach()}, min(tolerance, 1e-6))
    names = ("hidden", "weight")
    assert_close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), tolerance)


CHUNKS = [(256_000, torch.bfloat16, 2048), (32_000, torch.bfloat16, 16_640), (256_000, torch.float32, 1024)]


@pytest.mark.parametrize(("vocabulary", "dtype", "tokens"), [*CHUNKS, (1 << 28, torch.bfloat16, 256)], ids=str)
def test_chunks_follow_the_size_of_logits(vocabulary, dtype, tokens):
    """Whole tiles of tokens with logits of at most a GiB; some tokens however large the vocabulary is."""
    assert vocab.tokens_at_once(torch.empty(vocabulary, 1, dtype=dtype, device="meta")) == tokens


def test_rejects():
    logits, targets, row = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    with pytest.raises(ValueError, match=r"softmax_statistics: logits has shape \(2, 4, 6\), wanted \[T, v\]"):
        softmax_statistics(torch.zeros(2, 4, 6), targets, 0)
    with pytest.raises(ValueError, match=r"softmax_statistics: targets has shape \(5,\), wanted \[T\] = \(4\)"):
        softmax_statistics(logits, torch.zeros(5, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"softmax_statistics: targets has dtype torch.float32, wanted an integer dtype"):
        softmax_statistics(logits, row, 0)
    with pytest.raises(ValueError, match=r"softmax_gradient: scale has shape \(1,\), wanted \[T\] = \(4\)"):
        softmax_gradient(logits, targets, row, torch.zeros(1), 0)
    with pytest.raises(
        ValueError, match=r"softmax_gradient: out has dtype torch.float64 and strides \(6, 1\), wanted torch.float32"
    ):
        softmax_gradient(logits, targets, row, row, 0, out=logits.double())
    with pytest.raises(ValueError, match=r"softmax_gradient: out has dtype torch.float32 and strides \(1, 4\), wanted"):
        softmax_gradient(logits, targets, row, row, 0, out=torch.zeros(6, 4).T)


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    kernels = backend.KERNELS
    logits = torch.empty(2048, 256_000, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(2048, dtype=torch.int64, device="meta")
    row = torch.empty(2048, dtype=torch.float32, device="meta")
    yield "statistics", lambda: kernels["softmax_statistics"](logits, targets, 0)
    yield "gradient", lambda: kernels["softmax_gradient"](logits, logits, targets, row, row, 0)
    yield "odd vocabulary", lambda: kernels["softmax_statistics"](logits[:, :25_143], targets, 25_143)
    yield "odd vocabulary", lambda: kernels["softmax_gradient"](logits[:, :25_143], logits[:, :25_143], targets, row, row, 25_143)
    yield "scale", lambda: kernels["scale_"](logits, row[0])
