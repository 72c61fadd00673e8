"""Order of the tests: those that fork ranks come before any other, since a fork after autograd ran cannot run it again.

``--slow`` adds what takes long and proves little more: tests marked ``slow``, and more cases of others (fixture ``slow``).
"""

import gc
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Read once a process, before its first matrix product on a GPU: what torch's deterministic mode asks for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Asking whether there is a GPU must not initialise CUDA, which forked ranks could not do again.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# A fork has none of its parent's threads. To free one of the parent's process groups there would wait for the group's threads for
# ever, so a fork never collects the garbage that its parent left.
os.register_at_fork(after_in_child=gc.freeze)

# Triton's own functions are made for the interpreter or the compiler when it is first imported, which a model may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests and every combination of settings as well")


@pytest.fixture(scope="session")
def slow(pytestconfig: pytest.Config) -> bool:
    """Whether to run every case, rather than those that prove the most."""
    return bool(pytestconfig.getoption("--slow"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ranks") is None)
    for item in items:
        if item.get_closest_marker("ranks") is not None:
            # With --dist loadgroup a module's go to one worker of pytest-xdist: they share what one rank found.
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow") is not None:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(autouse=True)
def _autograd_in_forks_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that forks ranks runs no autograd in the test process: with a GPU, or torch 2.15, no later fork could run any."""
    if request.node.get_closest_marker("ranks") is None:
        return
    parent = os.getpid()

    def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **options: Any) -> Any:
            assert os.getpid() != parent, "a test marked `ranks` ran autograd in the test process, not in a fork"
            return run(*arguments, **options)

        return checked

    for name in ("backward", "grad"):
        monkeypatch.setattr(torch.autograd, name, guarded(getattr(torch.autograd, name)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say by how much ranks differed from one rank, over all meshes and with each planted bug, and what all started from."""
    figures, seconds, planted, weights, documents, traffic, faults = [], 0.0, {}, [], {}, {}, {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "parity" and report.when == "call":
                figures += value
                seconds += report.duration
            if name == "documents" and report.when == "call":
                documents |= value
            if name == "cp traffic" and report.when == "call":
                traffic |= value
            if name == "planted" and report.when == "call":
                planted |= value
            if name == "fault" and report.when == "call":
                faults |= value
            if name == "initial weights" and report.when == "call":
                weights.append(value)
    if figures:
        largest = {kind: max(case[kind] for case in figures) for kind in figures[0]}
        shown = ", ".join(f"{kind} {value:.1e}" for kind, value in largest.items())
        terminalreporter.write_line(
            f"ranks against one rank: {len(figures)} cases in {seconds:.0f} s; largest differences: {shown}"
        )
    if documents:
        losses, gradients = (max(pair[i] for pair in documents.values()) for i in range(2))
        terminalreporter.write_line(
            f"packed documents against one by one: {len(documents)} models and cp sizes; largest differences: "
            f"losses of tokens {losses:.1e}, gradients {gradients:.1e}"
        )
    for kind, lengths in traffic.items():
        shown = "; ".join(f"S {length:,}: {ours:,} ({theirs:,})" for length, (ours, theirs) in lengths.items())
        terminalreporter.write_line(f"bytes a layer {kind} sends over cp4 (an all-to-all of activations): {shown}")
    if weights:
        terminalreporter.write_line(f"initial weights: sha256 {' '.join(sorted({*weights}))} on one rank and {len(weights)} meshes")
    for bug, differences in planted.items():
        shown = ", ".join(f"{kind} {value:.1e}" for kind, value in differences.items())
        terminalreporter.write_line(f"planted: {bug}: {shown}")
    for fault, runs in faults.items():
        if all(runs.values()):
            took, lost, differences = (sorted(runs[kind]) for kind in ("seconds", "lost", "differences"))
            terminalreporter.write_line(
                f"fault: {fault}: {len(took)} runs; over within {took[0]:.1f} to {took[-1]:.1f} s "
                f"(median {statistics.median(took):.1f}); {lost[0]} to {lost[-1]} steps lost; losses off by {differences[-1]:.1e}"
            )
