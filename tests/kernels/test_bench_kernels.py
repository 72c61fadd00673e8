"""tools/bench_kernels.py without a GPU: in the interpreter, with what only CUDA has replaced."""

import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_kernels
import kernel_cases
import kernel_peers
import kernel_timing
from bench_kernels import Bench, Row
from kernel_cases import BOTH, FORWARD, SECTIONS, TINY, Case
from kernel_peers import Peers
from kernel_timing import Cell, Clock
from mamba_kernels import backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU; on one, the tool itself runs")
RATES = {"copy bytes/s": 1e6, "matmul FLOP/s": 1e30}
SMALL = replace(
    TINY, scans=((1, 3, 1, 1),), selective=((1, 2, 3, 4),), batch_length=(1, 3), channels=8, batches=(1,), layer=(1, 3, 1, 1),
    inner=16, groups=1, crossing=(1, 1, 2, 16), crossing_tokens=16,
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch, fused_device):
    """Everything runs twice only: once before it is timed."""
    monkeypatch.setattr(kernel_timing, "LONG", 0.0)
    monkeypatch.setattr(bench_kernels, "TINY", SMALL)
    monkeypatch.setattr(kernel_timing, "measured_rates", lambda clock: RATES)
    monkeypatch.setattr(backend, "INTERPRETED", True)  # `main` sets it, and this puts it back.


@pytest.fixture
def forgotten():
    """Modules imported by a test are not there for the next."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("mamba_ssm", "causal_conv1d"):
            del sys.modules[name]


def test_every_section_is_measured_printed_written_and_drawn(quick, monkeypatch, tmp_path, capsys):
    # Once is enough in the interpreter: the clock has tests of its own.
    monkeypatch.setattr(Clock, "cell", lambda clock, calls, graph=True: Cell(eager_ms=clock.wall(calls) * 1e3))
    sections = ["ssd", "selective_scan", "conv1d", "norms", "activations", "loss", "decode", "path", "crossover"]
    assert sections == list(SECTIONS)
    file, picture = tmp_path / "rows.json", tmp_path / "crossover.png"
    arguments = [*sections, "--json", str(file), "--plot", str(picture)]
    assert bench_kernels.main(arguments) == 0
    record, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert (record["device"], record["kernels"], record["failures"]) == ("CPU", "interpreted", [])
    rows = record["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows)) == sections
    directions = {row["op"]: set() for row in rows}
    for row in rows:
        assert row["ours"]["eager_ms"] > 0.0, row
        assert row["ours"]["graph_ms"] is None
        assert (row["reference"]["eager_ms"] is None) == (row["section"] == "crossover"), row
        assert row["ours_over_floor"] == pytest.approx(row["ours"]["eager_ms"] / row["floor_ms"])
        directions[row["op"]].add(row["direction"])
        assert row["op"] in shown
    assert len(directions) == 18
    for op, some in directions.items():
        assert some == ({FORWARD} if "_step" in op else {FORWARD, BOTH}), op
    by_op = {row["op"]: row for row in rows}
    attention = by_op["ssd, attention"]["peers"]
    assert by_op["swiglu*"]["peer_over_ours"]["torch"]["eager"] > 0.0
    assert attention["FlashAttention-2"]["eager_ms"] > 0.0
    assert "RuntimeError" in attention["cuDNN attention"]["note"]
    assert by_op["ssd*"]["peers"]["mamba_ssm"]["eager_ms"] is None
    reason = "mamba_ssm: mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined: ModuleNotFoundError"
    assert shown.count(reason) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def row_of(op: str, direction: str, rates=RATES) -> Row:
    cases = [(name, case) for name in SECTIONS for case in SECTIONS[name](SMALL, None) if case.op == op]
    section, case = cases[0]
    bench = Bench(Clock(torch.device("cpu"), 1), Peers(), rates)
    (row,) = bench.rows(section, replace(case, directions=[direction], peers=[], reference=False))
    assert not bench.failures
    return row


@pytest.mark.parametrize(
    ("op", "direction", "count"),
    [
        ("rms_norm", FORWARD, 96 + 64 + 96),
        ("rms_norm", BOTH, 256 + (96 + 64) + 96 + (96 + 64)),
        ("rms_norm + residual", BOTH, (2 * 96 + 64 + 2 * 96) + (96 + 64) + 2 * 96 + (96 + 64)),
        ("layer_norm", BOTH, (96 + 128 + 96) + (96 + 64) + 96 + (96 + 128)),
        ("rope", BOTH, (192 + 2 * 48 + 192) + 2 * 48 + 192 + 192),
        ("squared_relu", BOTH, 5 * 192),
        # x, dt, A, B, C, D, dt_bias read, y written, the state read and written
        ("ssd_step", FORWARD, (32 + 2 + 4 + 32 + 32 + 4 + 4) + 32 + 2 * 1024),
    ],
)  # fmt: skip
def test_floor_counts_what_must_be_moved(quick, op, direction, count):
    row = row_of(op, direction)
    assert row.bytes_moved == count
    assert row.floor_ms == pytest.approx(count / 1e6 * 1e3)


def test_floor_is_that_of_the_flops_where_they_take_longer(quick):
    row = row_of("ssd", FORWARD, {"copy bytes/s": 1e30, "matmul FLOP/s": 1e6})
    # 3 tokens of a head with P = N = 16: in and out of the state, and a half of the products of a chunk of 128 tokens.
    assert row.flops == 3 * (2 * 2 * 16 * 16 + 128 * (16 + 16))
    assert row.floor_ms == pytest.approx(row.flops / 1e6 * 1e3)
    case = Case("op", "1", lambda device: {"x": torch.ones(1)}, lambda x: 2 * x, flops=7.0)
    rows = Bench(Clock(torch.device("cpu"), 1), Peers(), RATES).rows("section", case)
    assert [row.flops for row in rows] == [7.0, 21.0]


def test_the_reference_is_not_our_kernel(quick, monkeypatch):
    launched = []
    monkeypatch.setattr(backend, "recorder", lambda kernel, *rest: launched.append(kernel))
    case = next(case for case in SECTIONS["activations"](SMALL, None) if case.op == "gelu")
    call = kernel_cases.bind(case.ours, case.make(torch.device("cpu")), (), FORWARD)
    with bench_kernels.reference_only():
        call()
    assert not launched
    call()
    assert len(launched) == 1


def test_ratios_compare_like_with_like():
    row = Row("s", "op", "1", FORWARD, Cell(1.0, 4.0), peers={"a": Cell(3.0, 6.0), "b": Cell(None, 6.0)}, floor_ms=0.5)
    assert row.ours_over_floor == 2.0
    assert row.peer_over_ours("a") == (3.0, 1.5)
    assert row.peer_over_ours("b") == (None, 1.5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["sssd"], ["sssd", "ssd, selective_scan", "compile"]),
        (["ssd", "--plot", "x.png"], ["--plot", "crossover"]),
        (["ssd", "--repeats", "0"], ["--repeats", "positive"]),
        (["ssd", "--peer-path", "/nowhere"], ["--peer-path", "/nowhere"]),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, parts):
    assert bench_kernels.main(arguments) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts)


def test_tuning_needs_a_gpu(capsys):
    assert bench_kernels.main(["ssd", "--tune"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_an_op_that_fails_leaves_the_others_and_exits_with_1(quick, monkeypatch, capsys):
    def fails(**inputs):
        raise ValueError("broken\nkernel")

    bad, good = (c for c in SECTIONS["activations"](SMALL, None) if c.op in ("gelu", "squared_relu"))
    monkeypatch.setitem(SECTIONS, "activations", lambda shapes, context: [replace(bad, ours=fails), good])
    assert bench_kernels.main(["activations"]) == 1
    captured = capsys.readouterr()
    assert "ours: ValueError: broken (1 shapes" in captured.out
    assert "squared_relu" in captured.err
    assert "gelu" in captured.out


def checkouts(root: Path) -> Path:
    """A mamba_ssm whose `__init__` must not run, and a causal_conv1d without its extension."""
    files = {
        "mamba/mamba_ssm/__init__.py": "raise ImportError('asks for too much')",
        "mamba/mamba_ssm/ops/triton/ssd_combined.py": "def mamba_chunk_scan_combined(x, *rest, **more):\n    return x * 2\n",
        "conv/causal_conv1d/__init__.py": "import causal_conv1d_cuda",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_peers_from_checkouts(quick, tmp_path, forgotten):
    peers = Peers(checkouts(tmp_path))
    (case,) = SECTIONS["ssd"](SMALL, None)
    (row,) = Bench(Clock(torch.device("cpu"), 1), peers, RATES).rows("ssd", replace(case, directions=[FORWARD], reference=False))
    assert row.peers["mamba_ssm"].note == ""
    assert row.peers["mamba_ssm"].eager_ms > 0.0
    needs = ["causal_conv1d:causal_conv1d_fn"]
    assert peers.get(needs) is None
    assert "No module named 'causal_conv1d_cuda'" in peers.why(needs)


def test_a_peer_is_not_run_where_it_may_overflow():
    refused = {case.shape: bool(case.peers[0].refused) for case in SECTIONS["ssd"](kernel_cases.FULL, None)}
    assert not refused["B1 L131072 H32 G2 P64 N128"]
    assert refused["B1 L1048576 H32 G2 P64 N128"]


def test_extensions_are_built_for_bfloat16_alone(tmp_path):
    source, target = tmp_path / "checkout/csrc", tmp_path
    source.mkdir(parents=True)
    lines = [f"template void f<{t}, {t}>(P &p, cudaStream_t stream);" for t in ("float", "at::BFloat16")]
    (source / "f.cu").write_text("\n".join(lines))
    (source / "main.cpp").write_text("")
    sources, headers = kernel_peers.extension_sources("causal_conv1d_cuda", tmp_path / "checkout", target)
    assert headers == source
    assert sources == [source / "main.cpp", target / "f.cu"]
    lines[0] = lines[0][:-1].replace("template", "template <>") + ' { throw std::runtime_error("not built"); }'
    assert (target / "f.cu").read_text().splitlines() == lines


def test_a_build_that_fails_gives_its_reason(tmp_path, monkeypatch, forgotten):
    def fails(name, checkout):
        raise RuntimeError(f"no compiler for {name} of {checkout.name}")

    monkeypatch.setattr(kernel_peers, "build_extension", fails)
    peers = Peers(checkouts(tmp_path))
    peers.build()
    assert peers.get(["causal_conv1d:causal_conv1d_fn"]) is None
    assert "no compiler for causal_conv1d_cuda of conv" in peers.why(["causal_conv1d:causal_conv1d_fn"])


def test_peers_are_warmed_with_their_share_of_configurations(quick, monkeypatch, tmp_path, forgotten):
    file = checkouts(tmp_path) / "mamba/mamba_ssm/ops/triton/ssd_combined.py"
    file.write_text(
        "import types\nkernel = types.SimpleNamespace(configs=list('abcd'), fn=None)\n\n\n"
        "def mamba_chunk_scan_combined(x, *rest, D, dt_bias, dt_softplus):\n    raise ValueError(''.join(kernel.configs))\n"
    )
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    assert bench_kernels.warm_peers(1, 3, ["ssd"], torch.device("cpu"), tmp_path, {}) == "ValueError: b"


def test_configurations_are_shared_out(monkeypatch):
    found = []
    for index in range(3):
        kernel = SimpleNamespace(configs=list("abcde"), fn=None)
        module = SimpleNamespace(kernel=SimpleNamespace(fn=kernel), again=kernel, other=len)
        monkeypatch.setitem(sys.modules, "a_peer.kernels", module)
        kernel_peers.keep_configurations("a_peer", index, 3)
        found.append("".join(kernel.configs))
    assert found == ["ad", "be", "c"]


class FakeGraph:
    replays = 0

    def replay(self):
        self.replays += 1

    def reset(self):
        pass


def test_a_graph_holds_all_calls_and_the_median_of_its_replays_counts(monkeypatch):
    graphs, log = [], []

    @contextmanager
    def capture(graph, **options):
        log.append("begin")
        graphs.append(graph)
        yield
        log.append("end")

    class Event:
        def __init__(self, enable_timing):
            self.number = None

        def record(self):
            self.number = graphs[0].replays

        def elapsed_time(self, later):
            return [100.0, 8.0, 6.0, 7.0, 500.0][later.number - 3]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda device: stream, "current_stream": lambda device: stream, "CUDAGraph": FakeGraph, "graph": capture,
        "Event": Event, "synchronize": lambda device: None, "stream": lambda s: contextmanager(lambda: iter([None]))(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = Clock(torch.device("cuda"), repeats=5)
    cell = clock.cell([lambda: log.append("a"), lambda: log.append("b")])
    assert log[log.index("begin") :] == ["begin", "a", "b", "end"]
    assert cell.graph_ms == 8.0 / 2
    assert cell.eager_ms > 0.0

    def unable():
        if log[-1] == "begin":
            raise RuntimeError("waits for the device")

    cell = clock.cell([unable])
    assert cell.graph_ms is None
    assert cell.eager_ms > 0.0
    assert cell.note == "no graph: RuntimeError: waits for the device"


def test_small_inputs_rotate_until_the_cache_does_not_hold_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    bench = Bench(Clock(torch.device("cuda")), Peers(), RATES)
    assert bench.rotation({"x": torch.empty(150), "none": None}) == 4  # 600 bytes each, 2000 to exceed
    assert bench.rotation({"x": torch.empty(1000)}) == 1


def test_memory_beyond_what_is_returned(monkeypatch):
    for name, fake in {
        "synchronize": lambda device: None, "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 5 << 30, "max_memory_allocated": lambda device: (8 << 30) + 4096,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    assert Clock(torch.device("cuda")).peak_gib(lambda: (torch.empty(1024), None)) == 3.0


def test_a_long_call_is_timed_once(monkeypatch):
    monkeypatch.setattr(kernel_timing, "LONG", 0.0)
    calls = []
    assert Clock(torch.device("cpu")).cell([lambda: calls.append(1)]).eager_ms > 0.0
    assert len(calls) == 2


def relu_cases() -> list[Case]:
    (case,) = (c for c in SECTIONS["activations"](replace(SMALL, tokens=2), None) if c.op == "squared_relu")
    return [replace(case, tuned=True)]


def test_tuning_takes_the_fastest_of_each_kernel_and_keeps_other_entries(quick, monkeypatch, tmp_path, capsys):
    timed = []

    def fake_graph(self, calls):
        (call,) = calls
        (launches,) = call.args
        (launch,) = launches
        assert kernel_timing.MARK not in launch.meta
        call()
        timed.append((launch.kernel.fn.__name__, launch.meta))
        backward = "backward" in launch.kernel.fn.__name__
        return 1.0 if not backward and launch.meta["BLOCK"] == smallest else 1.01 if backward and len(timed) % 2 else 1.02

    monkeypatch.setattr(Clock, "graph_ms", fake_graph)
    clock = Clock(torch.device("cpu"))
    tune = kernel_timing.tune
    monkeypatch.setattr(kernel_timing, "tune", lambda runs, ms, workers: tune(runs, clock.graph_ms, 1))
    tunable = importlib.import_module("mamba_kernels.activation.fused").FORWARD
    candidates = tunable.candidates(torch.bfloat16, 1)
    smallest = min(meta["BLOCK"] for meta in candidates[1:])
    monkeypatch.setattr(kernel_timing, "GAIN", 1.015)
    table = tmp_path / "tuned.json"
    old = {"sm_80": {"norm": {"bfloat16 64": {"num_warps": 1}}}}
    old["sm_90"] = {"activation": {"bfloat16 1": {"num_warps": 2}, "float32 1": {"num_warps": 3}}}
    old["sm_90"]["activation_backward"] = {"bfloat16 1": {"BLOCK": 1}}
    table.write_text(json.dumps(old))
    searches = bench_kernels.tune_sections(relu_cases(), clock, "sm_90", table, 1)
    assert [search.tunable.name for search in searches] == ["activation", "activation_backward"]
    assert len(timed) == len(candidates) + len(searches[1].tunable.candidates(torch.bfloat16, 1))
    written = json.loads(table.read_text())
    assert written["sm_80"] == old["sm_80"]
    best = next(meta for meta in candidates if meta["BLOCK"] == smallest)
    assert written["sm_90"] == {"activation": {"bfloat16 1": best, "float32 1": {"num_warps": 3}}}
    assert tunable(torch.bfloat16, 1) == best  # What is measured afterwards has it.
    tunable.used.clear()
    assert "1 configurations written" in capsys.readouterr().out


class FakeKernel:
    """Writes `value` of its configuration; too large ones do not fit."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        def launch(out, *, value, size):
            if size > 2:
                raise RuntimeError("out of shared memory")
            out.fill_(value)

        return launch


@pytest.fixture
def tunable():
    metas = [{"value": 1, "size": 1}, {"value": 1, "size": 2}, {"value": 2, "size": 1}, {"value": 1, "size": 3}]
    yield backend.Tunable("a test's", lambda *key: metas)
    del backend.Tunable.ALL["a test's"]


def test_candidates_that_fail_or_change_results_are_skipped(tunable):
    kernel, other = FakeKernel("tuned"), FakeKernel("other")

    def run():
        out = torch.empty(2)
        backend.launch(other, (1,), torch.empty(1), value=3, size=1)
        backend.launch(kernel, (1,), out, **tunable("key"))
        return out

    seen = []

    def clock_ms(calls):
        (call,) = calls
        (launches,) = call.args
        assert [launch.kernel.name for launch in launches] == ["tuned"]
        seen.append(launches[0].meta["size"])
        return 1.0 / launches[0].meta["size"]

    (search,) = kernel_timing.tune({"op": run}, clock_ms, 1, say=lambda line: None)
    assert seen == [1, 2]
    assert search.best == {"value": 1, "size": 2}
    assert [why for _, why in search.skipped] == [
        "ArithmeticError: results differ from the default's by 1 of the largest value", "RuntimeError: out of shared memory",
    ]  # fmt: skip


def test_a_configuration_that_no_launch_takes_is_timed_by_the_whole_op(tunable):
    used = []

    def run():
        used.append(tunable("key")["size"])
        return torch.ones(1)

    def clock_ms(calls):
        assert calls == [run]
        calls[0]()
        return 1.0 / used[-1]

    (search,) = kernel_timing.tune({"op": run}, clock_ms, 1, say=lambda line: None)
    assert search.best["size"] == 3
    assert set(used) == {1, 2, 3}


def test_differences_see_nan_and_take_each_tensor_by_its_own_size():
    large, small = torch.tensor([100.0, 1.0]), torch.tensor([1e-3])
    assert kernel_timing.largest_difference([large, small * 1.5], [large, small]) == pytest.approx(0.5)
    assert kernel_timing.largest_difference([large * torch.nan, small], [large, small]) == float("inf")


COMPILE = """
import sys
import triton
from compile_kernels import FakeDriver
triton.runtime.driver.set_active(FakeDriver(90))
import torch
import kernel_timing
from kernel_cases import BOTH, SECTIONS, TINY, bind
from mamba_kernels import backend

backend.INTERPRETED = True  # CPU tensors go to kernels that are not interpreted: they are recorded, not launched.
(case,) = (c for c in SECTIONS["activations"](TINY, None) if c.op == "squared_relu")
with kernel_timing.recorded(run=False) as (launches, _):
    bind(case.ours, case.make(torch.device("cpu")), (), BOTH)()
wrong = kernel_timing.Launch(launches[0].kernel, (1,), launches[0].arguments, {**launches[0].meta, "BLOCK": 1000})
compilations = [kernel_timing.Compilation.of(launch) for launch in [*launches, wrong]]
failed = kernel_timing.compile_all(compilations, 1)
print([(c.kernel, dict(c.meta)["BLOCK"]) for c in failed], list(failed.values()))
"""


def test_recorded_launches_compile_into_the_cache(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[('_activation_kernel', 1000)]"), done.stdout
    assert sorted(file.name for file in tmp_path.rglob("*.cubin")) == [
        "_activation_backward_kernel.cubin", "_activation_kernel.cubin"
    ]  # fmt: skip


def test_the_compiled_layer_is_compared_with_the_layer(quick, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    breaks = [SimpleNamespace(reason="why\n  more"), SimpleNamespace(reason="why\nelse")]
    found = SimpleNamespace(graph_break_count=2, graph_count=3, break_reasons=breaks)
    monkeypatch.setattr(torch._dynamo, "explain", lambda layer: lambda *inputs: found)
    monkeypatch.setattr(torch, "compile", lambda layer, backend: lambda *inputs: 2 * layer(*inputs))
    context = bench_kernels.ParallelContext.create(bench_kernels.ParallelConfig(), "cpu")
    bench = Bench(Clock(torch.device("cpu"), 1), Peers(), RATES)
    (row,) = bench_kernels.compile_rows(bench, SMALL, context, "none")
    context.close()
    assert row.extra == {"graph breaks": 2, "graphs": 3, "reasons": ["why more", "why else"], "largest difference": 1.0}
    assert row.ours.eager_ms > 0.0
    assert row.peers["torch.compile"].eager_ms > 0.0


def test_torch_computes_what_we_do(quick):
    for name in ("norms", "activations"):
        for case in SECTIONS[name](SMALL, None):
            inputs = case.make(torch.device("cpu"))
            for peer in (peer for peer in case.peers if peer.name == "torch"):
                torch.manual_seed(0)
                ours = kernel_cases.bind(case.ours, inputs, case.constants, BOTH, everything=True)()
                assert len(kernel_cases.bind(case.ours, inputs, case.constants, BOTH)()) == len(inputs) - len(case.constants)
                torch.manual_seed(0)
                theirs = kernel_cases.bind(peer.run, peer.arrange(inputs), case.constants, BOTH, everything=True)()
                assert kernel_timing.largest_difference(theirs, ours) < 0.03, case.op
