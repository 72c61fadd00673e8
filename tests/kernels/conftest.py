"""Where the tests of `mamba_kernels` run: on the CPU, and with `-m gpu` on a CUDA device.

The fused kernels (fixture `fused_device`) run on the CUDA device where there is one, and in Triton's interpreter elsewhere.
"""

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    import triton_interpreter  # noqa: F401


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not HAS_GPU:
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def fused_device(monkeypatch):
    """The device on which float32 and bfloat16 tensors take the fused path: "cuda", or "cpu" interpreted (use tiny shapes)."""
    from mamba_kernels import backend

    if not HAS_GPU:
        monkeypatch.setattr(backend, "INTERPRETED", True)
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nothing was written to holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
