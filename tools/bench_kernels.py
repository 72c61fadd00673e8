"""Time of every kernel beside its reference, what others have, and its floor; and the search for launch configurations.

    python tools/bench_kernels.py [SECTION ...] [--json FILE] [--plot FILE.png] [--peer-path DIR] [--repeats N] [--tune]

Sections (default all): ssd, selective_scan, conv1d, norms, activations, loss, decode, path, crossover, compile. Peers are
mamba_ssm, causal_conv1d and torch's own operators; the former two are imported from checkouts below --peer-path, where nvcc
builds their CUDA extensions, or where installed. A peer that is not there leaves its cells empty, the reason under the table.

A row is an op, a shape and a direction. Times are medians: "graph" of replays of a CUDA graph, "eager" of loops with one wait
at the end, the host's share included; what takes more than half a second is timed once, eagerly. The reference is timed
eagerly. Inputs that fit the L2 cache rotate with others until they do not. Gradients are those of all floating-point inputs,
by torch.autograd.grad.

The floor is the larger of two times, from rates measured in the same run: bytes over the bandwidth of a copy (read + written),
FLOPs over the rate of an 8192^3 bf16 matrix product. Bytes: the forward pass reads each input and writes each output once; the
backward pass reads each input that its formula has, and each output's gradient, and writes each input's gradient once (a state
updated in place is read and written). FLOPs: SSD in chunks of 128, causal halves; the selective scan 9 E N a token, which are
no matrix products, so that its floor is low; backward twice the forward.

`crossover` is a batch of --tokens tokens as sequences of 512 tokens up to one of all of them: SSD (H 32, G 2: a quarter of the
8B model's heads) against causal attention of a quarter of its heads (8 x 128), which --plot draws. `compile` counts the graph
breaks of a Mamba-2 layer under torch.compile.

Without a GPU the program runs with tiny shapes, in Triton's interpreter where TRITON_INTERPRET=1: to try it, not to measure.
With --tune the configurations of the sections' kernels are searched first, each in the shape marked with * in the table, and
written to kernels/mamba_kernels/tuned.json for this GPU's architecture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernel_timing as timing
from kernel_cases import BOTH, FORWARD, FULL, SECTIONS, TINY, Case, Inputs, Shapes, bind
from kernel_peers import Peers, keep_configurations
from kernel_timing import Call, Cell, Clock, Compilation, first_line, recorded, size_of, tensors_in
from mamba_kernels import backend
from megatron_mamba.config import ConfigError, Mamba2Config, ModelConfig, ParallelConfig, RecomputeConfig, require
from megatron_mamba.model.lm import LanguageModel, initialize
from megatron_mamba.model.module import SequenceInfo
from megatron_mamba.parallel.context import ParallelContext

TABLE = Path(backend.__file__).parent / "tuned.json"
MOST_COPIES = 1024


@dataclass
class Row:
    """What was measured of an op in a shape and direction."""

    section: str
    op: str
    shape: str
    direction: str
    ours: Cell = field(default_factory=Cell)
    reference: Cell = field(default_factory=Cell)
    peers: dict[str, Cell] = field(default_factory=dict)
    bytes_moved: int = 0
    flops: float = 0.0
    floor_ms: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ours_over_floor(self) -> float | None:
        """Of the graph's time, or the eager one where there is none."""
        ours = self.ours.graph_ms or self.ours.eager_ms
        return ours / self.floor_ms if ours and self.floor_ms else None

    def peer_over_ours(self, name: str) -> tuple[float | None, float | None]:
        """How many times our time a peer takes: in graphs, and eagerly."""
        peer = self.peers[name]
        pairs = ((peer.graph_ms, self.ours.graph_ms), (peer.eager_ms, self.ours.eager_ms))
        graph, eager = (theirs / ours if theirs and ours else None for theirs, ours in pairs)
        return graph, eager

    def record(self) -> dict[str, Any]:
        """The row as JSON has it."""
        ratios = {name: dict(zip(("graph", "eager"), self.peer_over_ours(name), strict=True)) for name in self.peers}
        return {**asdict(self), "ours_over_floor": self.ours_over_floor, "peer_over_ours": ratios}


@contextmanager
def reference_only() -> Iterator[None]:
    """Let every op take its reference."""
    before, backend.FUSED = backend.FUSED, False
    try:
        yield
    finally:
        backend.FUSED = before


def bytes_moved(case: Case, inputs: Inputs, outputs: Sequence[Tensor], direction: str) -> int:
    """Bytes that must be moved: see the top of this file."""
    forward = size_of(*inputs.values(), *outputs, *(inputs[name] for name in case.in_place))
    if direction == FORWARD:
        return forward
    named = {**inputs, **{f"output {i}": out for i, out in enumerate(outputs)}}
    again = size_of(*(named[name] for name in (inputs if case.again is None else case.again)))
    gradients = [
        t for name, t in inputs.items()
        if t is not None and t.is_floating_point() and name not in (*case.constants, *case.same_gradient)
    ]  # fmt: skip
    return forward + again + size_of(*outputs) + size_of(*gradients)


class Bench:
    """Measures cases one after the other on a device."""

    def __init__(self, clock: Clock, peers: Peers, rates: dict[str, float]) -> None:
        self.clock, self.peers, self.rates = clock, peers, rates
        self.failures: list[str] = []

    def rows(self, section: str, case: Case) -> list[Row]:
        """A case in each of its directions."""
        rows = [Row(section, case.op + "*" * case.tuned, case.shape, direction) for direction in case.directions]
        torch.manual_seed(0)
        try:
            first = case.make(self.clock.device)
            copies = [first, *(case.make(self.clock.device) for _ in range(self.rotation(first) - 1))]
            outputs = [torch.empty_like(t, device="meta") for t in tensors_in(bind(case.ours, first, (), FORWARD)())]
        except Exception as error:  # The rows that work are worth having; this one makes the exit status 1.
            for row in rows:
                row.ours.note = first_line(error)
        else:
            for row in rows:
                self._measure(row, case, copies, outputs)
        self.failures += [f"{row.op} {row.shape} {row.direction}: {row.ours.note}" for row in rows if row.ours.note]
        return rows

    def rotation(self, inputs: Inputs) -> int:
        """How many sets of inputs the L2 cache does not hold."""
        cuda = self.clock.device.type == "cuda"
        cache = torch.cuda.get_device_properties(self.clock.device).L2_cache_size if cuda else 0
        return min(max(-(-2 * cache // max(size_of(*inputs.values()), 1)), 1), MOST_COPIES)

    def _measure(self, row: Row, case: Case, copies: list[Inputs], outputs: list[Tensor]) -> None:
        row.bytes_moved = bytes_moved(case, copies[0], outputs, row.direction)
        row.flops = case.flops * (1 if row.direction == FORWARD else 3)
        row.floor_ms = max(row.bytes_moved / self.rates["copy bytes/s"], row.flops / self.rates["matmul FLOP/s"]) * 1e3
        row.ours = self._cell(case, case.ours, copies, row.direction)
        if case.reference:
            with reference_only():
                row.reference = self._cell(case, case.ours, copies[:1], row.direction, graph=False)
        else:
            row.reference.note = "not timed at this size"
        for peer in case.peers:
            functions = None if peer.refused else self.peers.get(peer.needs)
            if functions is None:
                row.peers[peer.name] = Cell(note=peer.refused or self.peers.why(peer.needs))
            else:
                run = partial(peer.run, *functions)
                row.peers[peer.name] = self._cell(case, run, copies, row.direction, arrange=peer.arrange)

    def _cell(
        self, case: Case, run: Callable[..., Any], copies: list[Inputs], direction: str, *, graph: bool = True,
        arrange: Callable[[Inputs], Inputs] = dict,
    ) -> Cell:  # fmt: skip
        try:
            calls = [bind(run, arrange(inputs), case.constants, direction) for inputs in copies]
            cell = self.clock.cell(calls, graph=graph)
            if case.memory and graph:
                cell.peak_gib = self.clock.peak_gib(calls[0])
        except Exception as error:  # Memory, or a shape that it refuses.
            return Cell(note=first_line(error))
        return cell


def compile_rows(bench: Bench, shapes: Shapes, context: ParallelContext, compiler: str) -> list[Row]:
    """A Mamba-2 layer (norm, projections, mixer, residual) as it is and through torch.compile: breaks, differences, times."""
    batch, length, heads, groups = shapes.layer
    mixer = Mamba2Config(d_inner=heads * shapes.head_dim, head_dim=shapes.head_dim, state_size=shapes.state, n_groups=groups)
    config = ModelConfig(name="layer", pattern="M", hidden_size=shapes.hidden, vocab_size=64, mamba2=mixer)
    model = LanguageModel(config, context, torch.bfloat16, RecomputeConfig())
    for _, parameter, spec in list(model.table_parameters()):
        if spec.fp32:
            parameter.data = parameter.data.float()
    model.to_empty(device=context.device)
    initialize(model, seed=0)
    layer, info = model.layers["0"], SequenceInfo(batch, length, context.device)
    parameters = list(layer.parameters())
    inputs: Inputs = {"x_TD": torch.randn(batch * length, shapes.hidden, device=context.device, dtype=torch.bfloat16)}
    found = torch._dynamo.explain(layer)(inputs["x_TD"], info, None)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=compiler)

    def both(module: Callable[..., Tensor]) -> Call:
        x = inputs["x_TD"]
        assert x is not None
        x, seed = x.detach().requires_grad_(), torch.ones_like(x)

        def call() -> Any:
            out = module(x, info, None)
            return out.detach(), *torch.autograd.grad(out, [x, *parameters], seed)

        return call

    row = Row("compile", "Mamba-2 layer", f"B{batch} L{length} D{shapes.hidden} H{heads} G{groups}", BOTH)
    eager, through = both(layer), both(compiled)
    row.extra = {
        "graph breaks": found.graph_break_count, "graphs": found.graph_count,
        "reasons": [" ".join(str(reason.reason).split())[:200] for reason in found.break_reasons],
        "largest difference": timing.largest_difference([*map(_plain, through())], [*map(_plain, eager())]),
    }  # fmt: skip
    row.ours, row.peers = bench.clock.cell([eager]), {"torch.compile": bench.clock.cell([through])}
    return [row]


def _plain(t: Tensor) -> Tensor:
    """The local part of a DTensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def tune_sections(cases: Sequence[Case], clock: Clock, architecture: str, path: Path, workers: int) -> list[timing.Tuning]:
    """Search the configurations of the kernels that `cases` marked as tuned launch, and write them to `path`."""

    def run_of(case: Case) -> Call:
        torch.manual_seed(0)
        inputs = case.make(clock.device)
        states = [t for name in case.in_place if (t := inputs[name]) is not None]
        before = [t.clone() for t in states]
        with recorded(run=False):  # The shapes of outputs are enough.
            call = bind(case.ours, inputs, case.constants, case.directions[-1], everything=True)

        def run() -> Any:
            for state, was in zip(states, before, strict=True):
                state.copy_(was)
            return [*tensors_in(call()), *(state.clone() for state in states)]

        return run

    def milliseconds(calls: Sequence[Call]) -> float:
        if clock.device.type == "cuda":
            for call in calls:
                call()
            return clock.graph_ms(calls)
        return clock.cell(calls).eager_ms or 0.0

    runs = {f"{case.op} {case.shape}": run_of(case) for case in cases if case.tuned}
    searches = timing.tune(runs, milliseconds, workers)
    print(f"{timing.write_tuned(path, architecture, searches)} configurations written to {path}")
    return searches


def warm_peers(
    index: int, count: int, sections: Sequence[str], device: torch.device, path: Path | None, built: dict[str, str]
) -> str:
    """Run the peers' autotuned kernels once, with every `count`-th of their configurations; "" or why one did not run."""
    peers, shapes, failed = Peers(path, dict(built)), FULL if device.type == "cuda" else TINY, ""
    cases = [case for name in sections if name in SECTIONS for case in SECTIONS[name](shapes, None) if case.tuned]
    calls = [(case, peer, peers.get(peer.needs)) for case in cases for peer in case.peers if peer.autotuned]
    keep_configurations("mamba_ssm", index, count)
    for case, peer, functions in calls:
        if functions is not None:
            try:
                inputs, run = peer.arrange(case.make(device)), partial(peer.run, *functions)
                bind(run, inputs, case.constants, case.directions[-1])()
                Clock(device).wait()
            except Exception as error:  # A configuration that does not fit this GPU.
                failed = first_line(error)
    return failed


def prepare(cases: Sequence[Case], sections: Sequence[str], peers: Peers, device: torch.device, workers: int) -> None:
    """Compile what will be timed in many processes: our kernels, the peers' extensions and their autotuned kernels."""
    with ThreadPoolExecutor(1) as building:
        built = building.submit(peers.build)
        wanted: list[Compilation | None] = []
        for case in cases:
            with recorded(run=False) as (launches, _):
                for direction in case.directions:
                    try:
                        bind(case.ours, case.make(device), case.constants, direction)()
                    except Exception as error:  # Its row will fail too, and say why there.
                        print(f"{case.op} {case.shape} does not run: {first_line(error)}")
            wanted += map(Compilation.of, launches)
            launches.clear()  # They hold their tensors.
        for compilation, why in timing.compile_all(wanted, workers).items():
            print(f"{compilation.module} {compilation.kernel} does not compile: {why}")
        built.result()
    if any(peer.autotuned and peers.get(peer.needs) for case in cases for peer in case.peers):
        count = min(workers, 8)  # Each holds the inputs of the largest case.
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            some = [pool.submit(warm_peers, i, count, sections, device, peers.path, peers.built) for i in range(count)]
            for why in sorted({job.result() for job in some} - {""}):
                print(f"warming peers: {why}")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """The table, and why cells are empty."""
    table = Table(title=title)
    for name in ("op", "shape", "direction"):
        table.add_column(name)
    for name in ("ours ms", "eager", "floor", "ours / floor", "reference", "peer", "ms", "eager", "peer / ours", "eager"):
        table.add_column(name, justify="right")
    table.add_column("GiB: ours", justify="right")
    table.add_column("peer", justify="right")
    notes: dict[str, list[str]] = {}
    for row in rows:
        ours = [row.op, row.shape, "fwd + bwd" if row.direction == BOTH else "fwd", number(row.ours.graph_ms)]
        ours += [number(v) for v in (row.ours.eager_ms, row.floor_ms, row.ours_over_floor, row.reference.eager_ms)]
        peers = [
            [name, number(peer.graph_ms), number(peer.eager_ms), *map(number, row.peer_over_ours(name)), number(row.ours.peak_gib),
             number(peer.peak_gib)]
            for name, peer in row.peers.items()
        ]  # fmt: skip
        table.add_row(*ours, *(peers[0] if peers else ["", "", "", "", "", number(row.ours.peak_gib), ""]))
        for peer in peers[1:]:
            table.add_row(*("" for _ in ours), *peer)
        for name, cell in (("ours", row.ours), ("reference", row.reference), *row.peers.items()):
            if cell.note:
                notes.setdefault(f"{name}: {cell.note}", []).append(f"{row.op} {row.shape}")
    console.print(table)
    for note, where in notes.items():
        print(f"{note} ({len(dict.fromkeys(where))} shapes, the first {where[0]})")
    for row in rows:
        if row.extra:
            print(f"{row.op} {row.shape}: " + ", ".join(f"{name} {value}" for name, value in row.extra.items()))


def draw(rows: Sequence[Row], file: Path, title: str) -> None:
    """The crossover: milliseconds over the length of a sequence, a panel for each direction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, direction in zip(panels, (FORWARD, BOTH), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in (row for row in rows if row.section == "crossover" and row.direction == direction):
            length = int(row.shape.split()[1].removeprefix("L"))
            for name, cell in (("SSD (ours)", row.ours), *row.peers.items()):
                if taken := cell.graph_ms or cell.eager_ms:
                    lines.setdefault(name, []).append((length, taken))
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
        axes.set(title=direction, xlabel="sequence length", ylabel="ms", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(file))


def surroundings(device: torch.device) -> dict[str, Any]:
    """What figures depend on: device, versions, date."""
    versions = {}
    for package in ("torch", "triton", "mamba_ssm", "causal_conv1d"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            file = getattr(sys.modules.get(package), "__file__", None)  # Of a checkout, in whose text it stands.
            stated = re.search(r"""__version__ = ["'](.+?)["']""", Path(file).read_text()) if file else None
            versions[package] = stated[1] if stated else ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "kernels": "compiled" if device.type == "cuda" else "interpreted" if backend.INTERPRETED else "reference",
        "architecture": backend.architecture(), "cuda": torch.version.cuda, "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def arguments(argv: list[str]) -> argparse.Namespace:
    """What the command line says; ConfigError where that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SECTIONS, "compile"]
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(names)}; default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row in full, after each case")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the section crossover")
    parser.add_argument("--peer-path", type=Path, metavar="DIR", help="folder of checkouts of mamba_ssm and causal_conv1d")
    parser.add_argument("--repeats", type=int, default=100, help="of a call, at most (default 100)")
    parser.add_argument("--tokens", type=int, help="of a batch in the section crossover (default 524288)")
    parser.add_argument("--tune", action="store_true", help="search configurations first, and write tuned.json")
    args = parser.parse_args(argv)
    for name in args.sections:
        require(name in names, "SECTION", name, "is no section", f"Choose from {', '.join(names)}")
    require(args.repeats > 0, "--repeats", args.repeats, "must be positive", "Use 1 or more")
    plotted = args.plot is None or "crossover" in (args.sections or names)
    require(plotted, "--plot", args.plot, "draws the section crossover, which is not measured", "Name crossover too")
    folder = args.peer_path
    require(folder is None or folder.is_dir(), "--peer-path", folder, "is no folder", "Name the one that holds the checkouts")
    cuda = torch.cuda.is_available()
    require(cuda or not args.tune, "--tune", True, "needs a CUDA device, and none is visible", "Leave it out")
    args.sections = args.sections or names
    return args


def main(argv: list[str]) -> int:
    """Tune if asked, measure, print and write; returns the process's exit code."""
    try:
        args = arguments(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = FULL if device.type == "cuda" else TINY
    if args.tokens:
        shapes = replace(shapes, crossing_tokens=args.tokens)
    backend.INTERPRETED = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    context = ParallelContext.create(ParallelConfig(), device.type)
    clock, peers, workers = Clock(device, args.repeats), Peers(args.peer_path), max((os.cpu_count() or 2) - 1, 1)
    cases = {name: SECTIONS[name](shapes, context) for name in args.sections if name in SECTIONS}
    flat = [case for some in cases.values() for case in some]
    if args.tune:
        tune_sections(flat, clock, backend.architecture(), TABLE, workers)
    if device.type == "cuda":
        prepare(flat, args.sections, peers, device, workers)
    bench = Bench(clock, peers, timing.measured_rates(clock))
    rows: list[Row] = []
    about = {**surroundings(device), **bench.rates}

    def keep(some: list[Row]) -> None:
        rows.extend(some)
        if args.json is not None:
            about.update(surroundings(device))  # Peers have versions once they are imported.
            record = {**about, "arguments": argv, "failures": bench.failures, "rows": [row.record() for row in rows]}
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    for name in args.sections:
        if name == "compile":
            try:
                keep(compile_rows(bench, shapes, context, "inductor" if device.type == "cuda" else "aot_eager"))
            except Exception as error:  # The compiler's: the other sections' figures stand.
                bench.failures.append(f"compile: {first_line(error)}")
                keep([])
        for case in cases.get(name, []):
            keep(bench.rows(name, case))
    context.close()
    title = f"{about['device']}, {about['kernels']} kernels, torch {torch.__version__}, {clock.repeats} repeats; "
    title += f"copy {bench.rates['copy bytes/s'] / 1e12:.3g} TB/s, matrix product {bench.rates['matmul FLOP/s'] / 1e12:.4g} TFLOP/s"
    show(rows, title, Console(width=200))
    if args.plot is not None:
        draw(rows, args.plot, f"{shapes.crossing_tokens:,} tokens a batch, {about['device']}, bf16")
    for failure in bench.failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(bench.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
