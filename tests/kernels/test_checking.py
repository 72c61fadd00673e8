"""`mamba_kernels.checking`, what finds wrong kernels: right ones pass, planted faults do not; the grid, and a run's own check."""

import importlib.util
import multiprocessing
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mamba_kernels import backend, checking
from mamba_kernels.checking import Case, check, error
from mamba_kernels.ssd import operators as ssd
from megatron_mamba.config import (
    Config,
    DataConfig,
    Mamba2Config,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    ParallelConfig,
    TrainerConfig,
)
from megatron_mamba.model.kernel_cases import kernel_cases
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train import kernel_check
from megatron_mamba.train.resilience import TrainingError

TOOL = Path(__file__).parents[2] / "tools/check_kernels.py"

SMALL = [
    Case.of("ssd", torch.bfloat16, B=1, S=70, H=2, P=16, G=1, N=8, documents=True, state=True),
    Case.of("ssd", torch.float32, B=2, S=40, H=2, P=5, G=2, N=6, layout="packed", options=False),
    Case.of("mamba2_mixer", torch.float16, B=1, S=33, H=2, P=16, G=1, N=8, documents=True, state=True, layout="packed"),
    Case.of("selective_scan", torch.float32, S=20, E=9, N=5, documents=True, state=True),
    Case.of("causal_conv1d", torch.bfloat16, S=20, C=9, documents=True, state=True, layout="packed"),
    Case.of("gated_norm", torch.float32, T=7, E=24, groups=2, eps=0.0, layout="packed"),
    Case.of("rms_norm", torch.bfloat16, T=7, D=24, residual="same"),
    Case.of("rms_norm", torch.float32, T=7, D=24, residual="float32", eps=0.0),
    Case.of("layer_norm", torch.float32, T=7, D=24, eps=0.0),
    Case.of("swiglu", torch.bfloat16, T=7, F=24, layout="packed"),
    Case.of("squared_relu", torch.float16, T=7, F=24),
    Case.of("gelu", torch.float32, T=7, F=24, approximate="tanh"),
    Case.of("rope", torch.bfloat16, S=7, H=2, P=8, rotary=4, layout="packed"),
    Case.of("loss", torch.float32, T=7, V=40, start=40, layout="packed"),
    Case.of("ssd_step", torch.float16, B=3, H=4, P=8, G=2, N=16, layout="packed"),
    Case.of("selective_scan_step", torch.bfloat16, B=3, E=10, N=5),
    Case.of("causal_conv1d_step", torch.float32, B=3, C=10),
]
"""Every operator; norms with eps = 0 and rows that do not fill a block."""


def test_every_operator_has_a_case_and_a_limit():
    assert {case.operator for case in SMALL} == {*checking.OPERATORS} == {*checking.ROUNDINGS}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_right_kernels_pass(case, fused_device, monkeypatch):
    launched = []
    for module in [m for name, m in sys.modules.items() if name.startswith("mamba_kernels") and hasattr(m, "launch")]:
        monkeypatch.setattr(module, "launch", lambda *a, **meta: [backend_launch(*a, **meta), launched.append(a[0])])
    result = check(case, fused_device)
    assert result.passed, result.errors
    assert launched, "nothing ran fused"
    assert max(result.errors.values()) > 0.0, "a comparison of a thing with itself"


backend_launch = backend.launch


@pytest.mark.parametrize("fault", ["factor", "not written", "one row"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[2]], ids=str)
def test_a_planted_fault_is_found(fault, case, fused_device, monkeypatch):
    """In the gradient of B alone: a factor on all of it, memory that was not written to, and a factor on one token."""
    launch = ssd.launch

    def faulty(kernel, grid, *arguments, **meta):
        launch(kernel, grid, *arguments, **meta)
        if meta.get("OF_B"):
            g_B = arguments[kernel.arg_names.index("g_ptr")]
            if fault == "factor":
                g_B.mul_(1.1)
            elif fault == "not written":
                g_B.fill_(torch.nan)
            else:
                g_B[..., 7, :, :].mul_(1.8)

    monkeypatch.setattr(ssd, "launch", faulty)
    result = check(case, fused_device)
    assert not result.passed
    wrong = [name for name, off in result.errors.items() if not off <= result.limit]
    assert "gradient of B" in wrong or "gradient of packed" in wrong
    assert not any(name.startswith("output") for name in wrong)


def test_errors():
    """A sum that cancels is measured against its terms; what is zero in truth has no scale; what is not finite is wrong."""
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error(torch.tensor([3.0, 4.4]), want) == pytest.approx(0.1)
    assert error(torch.tensor([3.0, float("nan")]), want) == float("inf")
    assert error(torch.tensor([3.0]), want) == float("inf")
    terms = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert error(torch.tensor([0.1]), terms) == pytest.approx(0.1 / 2**0.5)
    assert error(torch.zeros(2), 1e-17 * want) == pytest.approx(4e-17)
    assert error(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == 0.0


def test_unknown_operator():
    with pytest.raises(ValueError, match=r"flash_scan is no operator that can be checked: ssd, .*rope"):
        check(Case.of("flash_scan", torch.float32), "cpu")


def test_deterministic_mode_is_left_as_it_was():
    torch.use_deterministic_algorithms(True)
    try:
        assert check(SMALL[1], "cpu").passed
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_tiles_of_16_bit_numbers_lie_alike(dtype, size):
    """Whatever is configured, also by who tunes: rows of 128 bytes (docs/kernels.md)."""
    x, B = torch.empty(1, 3, 2, size, dtype=dtype), torch.empty(1, 3, 1, 16, dtype=dtype)
    kept = (torch.empty(1, 2, 3),) * 3
    scan = ssd.Scan(x, B, B, torch.empty(2), None, kept, None)
    assert min(scan.padding["PADDED_P"], scan.padding["PADDED_N"]) >= 64
    for tunable in (ssd.OUTPUT, ssd.X_GRADIENT, ssd.PAIR_GRADIENT, ssd.C_GRADIENT, ssd.B_GRADIENT):
        assert all(meta["BP"] >= 64 for meta in tunable.candidates(*scan.key))
    for waves, tunable in [(waves, t) for waves in (0, 1, 2) for t in (ssd.STATES, ssd.STATE_GRADIENTS)]:
        assert all(min(meta["BP"], meta["BN"], meta["STEP"]) >= 64 for meta in tunable.candidates(*scan.key, waves))


# ------------------------------------------------------------------------------------------------------------- the grid


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_kernels", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = module  # Processes that it starts find its functions by this name.
    sys.path.insert(0, str(TOOL.parent))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOL.parent))


def test_the_grid_has_what_it_must(tool):
    """States from 8 to 256, head dims from 16 to 128, lengths round every border, all dtypes, documents, states, packed layouts."""
    cases = tool.grid()
    assert len(cases) > 1500
    assert {case.operator for case in cases} == {*checking.OPERATORS}
    for operator in checking.OPERATORS:
        assert {case.dtype for case in cases if case.operator == operator} == {*tool.DTYPES}
    scans = [(case.dtype, dict(case.sizes)) for case in cases if case.operator == "ssd"]
    for dtype in (torch.bfloat16, torch.float16):
        sizes = [sizes for of, sizes in scans if of == dtype]
        pairs = {(s["N"], s["P"]) for s in sizes}
        assert {(N, P) for N in (8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 256) for P in (16, 32, 48, 64, 80, 96, 128)} <= pairs
        assert {s["S"] for s in sizes} >= {*tool.BORDERS}
        # A single head of a group: a loop over heads that is none, where the compiler was wrong.
        assert any(s["H"] == s["G"] and s["N"] == N for s in sizes for N in (16, 128))
    for name in ("documents", "state", "layout"):
        assert {bool(s.get(name)) for _, s in scans} == {False, True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", range(8))
def test_a_pick_of_the_grid(tool, part):
    """Every 37th case; the whole grid is the tool's."""
    failed = [outcome.said for case in tool.grid()[37 * part :: 37 * 8] if not (outcome := tool.examine(case, "cuda")).passed]
    assert not failed, "\n".join(failed)


def test_what_the_tool_refuses(tool, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main(["ssd"]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    for arguments, said in ((["flash"], "no such operator: flash. Choose from ssd, "), (["--every", "0"], "must be 1 or more")):
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert said in capsys.readouterr().err


def test_nothing_is_lost_with_a_process(tool, monkeypatch):
    """One that dies costs the case it was at; one that raises, itself; all others have their outcome."""
    cases = [Case.of("swiglu", torch.float32, T=T, F=8) for T in range(1, 30)]
    cases[2:2] = [Case.of("nothing", torch.float32)]
    outcomes = []
    for outcome in tool.run(cases, 2, "cpu"):
        if not outcomes:
            for process in multiprocessing.active_children()[:1]:
                process.kill()
        outcomes.append(outcome)
    assert Counter(o.case for o in outcomes) == Counter(cases)
    failures = [o for o in outcomes if not o.passed]
    assert "no operator that can be checked" in next(o.said for o in failures if o.case.operator == "nothing")
    assert len(failures) <= 2
    assert all("its process ended with -9" in o.said for o in failures if o.case.operator == "swiglu")
    passed = len(cases) - len(failures)
    assert f"| swiglu | float32 | {passed} | 0 | 1.0e-06 | outputs " in tool.table([o for o in outcomes if o.passed])


# -------------------------------------------------------------------------------------------------------- a run's own check


MODEL = ModelConfig(
    name="tiny", pattern="Mm-", hidden_size=16, vocab_size=48, mamba=MambaConfig(d_inner=8, state_size=4, dt_rank=2),
    mamba2=Mamba2Config(d_inner=32, head_dim=16, state_size=8, n_groups=1), mlp=MLPConfig(ffn_size=24, activation="squared_relu"),
)  # fmt: skip
CONFIG = Config(
    MODEL, data=DataConfig(kind="synthetic", seq_length=33, document_reset=True),
    trainer=TrainerConfig(train_samples=8, global_batch_size=2, micro_batch_size=2),
)  # fmt: skip


@pytest.fixture
def context(fused_device):
    context = ParallelContext.create(ParallelConfig(), fused_device)
    yield context
    context.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "megatron_mamba/checked_kernels.json"


def test_cases_of_a_model(context):
    cases = kernel_cases(CONFIG, context)
    assert [case.operator for case in cases] == [
        "mamba2_mixer", "causal_conv1d", "selective_scan", "swiglu", "squared_relu", "rms_norm", "loss",
    ]  # fmt: skip
    mixer = dict(cases[0].sizes)
    assert {name: mixer[name] for name in "BSHPGN"} == {"B": 2, "S": 33, "H": 2, "P": 16, "G": 1, "N": 8}
    assert mixer["documents"]
    assert {case.dtype for case in cases} == {torch.bfloat16}
    exact = replace(CONFIG, trainer=replace(CONFIG.trainer, precision="fp64"))
    assert kernel_cases(exact, context) == []


def test_a_model_without_a_convolution(context):
    """Its mixer is three operators, of which the SSD and the norm are fused."""
    mamba2 = replace(CONFIG.model.mamba2, conv_width=1)
    config = replace(CONFIG, model=replace(CONFIG.model, mamba2=mamba2))
    cases = kernel_cases(config, context)
    assert cases[0].operator == "mamba2_mixer"
    assert dict(cases[0].sizes)["W"] == 1
    assert check(cases[0], context.device).passed


class Ranks:
    """A rank's place, for sizes."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def size(self, dimension):
        return self.sizes.get(dimension, 1)

    def rank(self, dimension):
        return self.size(dimension) - 1


def test_cases_of_a_rank():
    """Of tp ranks more than groups, which share one; of cp, pieces, worked in two parts of the heads; long sequences are cut."""
    mamba2 = Mamba2Config(d_inner=256, head_dim=16, state_size=8, n_groups=2)
    model = replace(MODEL, pattern="M*-", mamba2=mamba2, attention=replace(MODEL.attention, rotary_fraction=0.5))
    config = replace(CONFIG, model=model, data=replace(CONFIG.data, seq_length=1 << 20))
    cases = [(case.operator, dict(case.sizes)) for case in kernel_cases(config, Ranks(tp=4, cp=8))]
    sizes = dict(reversed(cases))  # Of two of an operator, the first.
    kinds = ["mamba2_mixer", "ssd", "rope", "rope", "squared_relu", "rms_norm", "loss"]
    assert [operator for operator, _ in cases] == kinds
    mixer = sizes["mamba2_mixer"]
    assert (mixer["H"], mixer["G"], mixer["group_size"], mixer["S"], mixer["B"]) == (4, 1, 64, 4096, 2)
    assert (sizes["ssd"]["H"], sizes["ssd"]["state"]) == (2, True)
    assert [of["H"] for operator, of in cases if operator == "rope"] == [8, 2]
    assert (sizes["loss"]["V"], sizes["loss"]["start"]) == (12, 36)
    assert sizes["squared_relu"]["F"] == 6


def test_a_run_checks_its_kernels_once(context, cache, monkeypatch):
    first = kernel_check.check_kernels(CONFIG, context)
    assert (first.cases, first.known, first.wrong) == (7, 0, [])
    monkeypatch.setattr(kernel_check, "check", partial(pytest.fail, "checked again"))
    again = kernel_check.check_kernels(CONFIG, context)
    assert (again.cases, again.known) == (7, 7)
    cache.write_text("not ours {")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    monkeypatch.setattr(backend, "INTERPRETED", context.device.type == "cpu")
    assert kernel_check.check_kernels(CONFIG, context).known == 0


@pytest.mark.parametrize("what", ["compiler", "code"])
def test_another_compiler_or_kernel_is_checked_again(what, context, cache, monkeypatch):
    assert kernel_check.check_kernels(CONFIG, context).known == 0
    name = "_made_by" if what == "compiler" else "_digest_of_kernels"
    monkeypatch.setattr(kernel_check, name, lambda *_: "another")
    assert kernel_check.check_kernels(CONFIG, context).known == 0
    assert kernel_check.check_kernels(CONFIG, context).known == 7


def test_a_wrong_kernel_trains_nothing(context, cache, monkeypatch):
    launch = ssd.launch

    def faulty(kernel, grid, *arguments, **meta):
        launch(kernel, grid, *arguments, **meta)
        if meta.get("OF_B"):
            arguments[kernel.arg_names.index("g_ptr")].mul_(1.6)

    with monkeypatch.context() as planted:
        planted.setattr(ssd, "launch", faulty)
        with pytest.raises(TrainingError) as refused:
            kernel_check.check_kernels(CONFIG, context)
    message = str(refused.value)
    for part in (
        "compute the wrong thing on rank 0 on ", "mamba2_mixer bfloat16 B=2 S=33 H=2 P=16 G=1 N=8",
        "gradient of packed is off by 0.", "rounding explains 0.063", "trainer.kernels=reference",
        "known to be right: torch 2.11 with Triton 3.6.0",
        "tools/check_kernels.py", "trainer.health_check=false",
    ):  # fmt: skip
        assert part in message, message
    assert "selective_scan" not in message
    # What was right is remembered, what was wrong is not.
    assert kernel_check.check_kernels(CONFIG, context).known == 6


def test_a_cache_that_cannot_be_written(context, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel_check.check_kernels(CONFIG, context).known == 0
    assert "will be checked again at the next start" in caplog.text


def test_nothing_is_fused_on_a_cpu(cache):
    context = ParallelContext.create(ParallelConfig(), "cpu")
    try:
        assert kernel_check.check_kernels(CONFIG, context) is None
    finally:
        context.close()
    assert not cache.exists()
