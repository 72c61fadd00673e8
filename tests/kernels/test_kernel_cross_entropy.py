"""The parts of a sharded cross-entropy, put together, against log-softmax in float64."""

from itertools import pairwise

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, AllocationWatch, assert_close, randn, use_blocks

from mamba_kernels import softmax_gradient, softmax_statistics

TOKENS, VOCAB = 9, 23
SHARDS = {"whole": [0, 23], "halves": [0, 12, 23], "uneven": [0, 1, 20, 22, 23]}


def make_targets(device):
    """Including both ends of the vocabulary, and two tokens to ignore."""
    return torch.tensor([0, 22, 11, 12, -100, 1, 19, -1, 5], device=device)


def oracle(logits, targets, scale):
    """Loss of every token, 0 where ignored, and the gradient of sum(scale * loss)."""
    logits = logits.double().detach().requires_grad_()
    chosen = torch.log_softmax(logits, 1)[range(TOKENS), targets.clamp(min=0)]
    loss = torch.where(targets >= 0, -chosen, 0.0)
    (gradient,) = torch.autograd.grad((scale.double() * loss).sum(), logits)
    return {"loss": loss.detach(), "gradient": gradient}


def sharded(logits, targets, scale, borders):
    """Loss and gradient from the op, with the reductions that a caller does over ranks; and its statistics."""
    shards = [(logits[:, a:b], a) for a, b in pairwise(borders)]
    maxima, sums, target_logits = zip(*(softmax_statistics(shard, targets, a) for shard, a in shards), strict=True)
    largest = torch.stack(maxima).amax(0)
    sum_exp = sum(s * torch.exp(m - largest) for s, m in zip(sums, maxima, strict=True))
    log_sum_exp = largest + torch.log(sum_exp)
    loss = torch.where(targets >= 0, log_sum_exp - sum(target_logits), 0.0)
    gradients = [softmax_gradient(shard, targets, log_sum_exp, scale, a) for shard, a in shards]
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
