"""The main job in small, on real text and any machine: text in, Hugging Face model out.

``./launch/quickstart.sh [--corpus FILE_OR_DIR] [--arch hybrid|mamba2|mamba|transformer|all] [--samples N] [--run-dir DIR]``

Every step is one of the project's own commands, printed before it runs so that it can be repeated with other settings.
In the middle of training the run is killed and started again, to show that the loss continues bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_mamba.train.plot import plot_comparison

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("hybrid", "mamba2", "mamba", "transformer")
MIN_SAMPLES = 128
console = Console(highlight=False)


class StepError(RuntimeError):
    """A step of the quickstart failed; the message says which command."""


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart; returns the process's exit code."""
    args = _arguments(argv)
    started = time.monotonic()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        prefix, tokenizer = _prepare(args)
        names = ARCHITECTURES if args.arch == "all" else (args.arch,)
        rows = [_run_architecture(name, args, prefix, tokenizer) for name in names]
    except StepError as error:
        console.print(f"[red]error:[/red] {error}")
        return 1
    _summary(rows, args, time.monotonic() - started)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="text or JSON lines, or a folder of them; default: Python's own library")
    parser.add_argument("--arch", choices=(*ARCHITECTURES, "all"), default=os.environ.get("ARCH", "hybrid"))
    parser.add_argument("--samples", type=int, default=2304, help="training sequences of 256 tokens (default: %(default)s)")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / f"quickstart-{stamp}")
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args(argv)
    if args.arch not in (*ARCHITECTURES, "all"):
        parser.error(f"ARCH = {args.arch!r}: choose from {', '.join(ARCHITECTURES)}, all")
    if args.samples < MIN_SAMPLES:
        parser.error(f"--samples = {args.samples}: too few to be interrupted in the middle; give {MIN_SAMPLES} or more")
    if args.corpus is not None and not args.corpus.exists():
        parser.error(f"--corpus = {args.corpus}: no such file or folder")
    return args


def _prepare(args: argparse.Namespace) -> tuple[Path, Path]:
    """Tokenizer and tokenised corpus, made once for all architectures."""
    corpus = args.corpus or _library_source(args.run_dir / "library.jsonl")
    tokenizer, prefix = args.run_dir / "tokenizer.model", args.run_dir / "corpus"
    vocabulary = ["--vocab-size", args.vocab_size, "--output", tokenizer]
    _step("Train a tokenizer", "tools/train_tokenizer.py", "--input", corpus, *vocabulary)
    target = ["--tokenizer", tokenizer, "--output", prefix, "--workers", os.cpu_count() or 1]
    _step("Tokenise the corpus", "tools/prepare_data.py", "--input", corpus, *target)
    return prefix, tokenizer


def _library_source(output: Path) -> Path:
    """Python's own library as a corpus: one document a module, in an order that mixes the packages over the splits."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [p for p in root.rglob("*.py") if not left_out.intersection(p.relative_to(root).parts)]
    files.sort(key=lambda p: hashlib.blake2b(p.relative_to(root).as_posix().encode()).digest())
    with output.open("w", encoding="utf-8") as lines:
        for file in files:
            lines.write(json.dumps({"text": file.read_text(encoding="utf-8", errors="replace")}) + "\n")
    size = output.stat().st_size / 1e6
    console.print(f"[bold]Corpus[/bold]: {len(files):,} modules of {root}, {size:.1f} MB, as {output}", soft_wrap=True)
    return output


def _run_architecture(name: str, args: argparse.Namespace, prefix: Path, tokenizer: Path) -> dict[str, Any]:
    run_dir = args.run_dir / name
    batch = 8
    every = max(args.samples // batch // 12, 1) * 4
    command = [
        "-m", "megatron_mamba.train", f"model={name}_tiny", f"model.vocab_size={args.vocab_size}", f"data.path={prefix}",
        "data.split=[90,8,2]",
        "data.seq_length=256", f"trainer.train_samples={args.samples}", f"trainer.global_batch_size={batch}",
        f"trainer.micro_batch_size={batch}", "trainer.precision=fp32", "optim.lr=3e-3", "optim.min_lr=3e-4",
        f"optim.schedule.warmup_samples={args.samples // 16}", f"checkpoint.interval={every}", "logging.interval=4",
        f"eval.interval={every}", "eval.samples=64", f"run.dir={run_dir}", f"run.name=quickstart-{name}",
    ]  # fmt: skip
    started = time.monotonic()
    before = _train_and_kill(command, run_dir, kill_at=every + 8)
    _step(f"Resume the {name} run", *command)
    seconds = time.monotonic() - started
    records = _records(run_dir)
    _compare_resumed(before, records)
    _step("Generate", "-m", "megatron_mamba.generate", f"checkpoint={run_dir}", "prompt='def main('", "max_new_tokens=60",
          "temperature=0.8", "top_p=0.95")  # fmt: skip
    export = ["--checkpoint", run_dir, "--output", run_dir / "hf", "--dtype", "fp32", "--verify"]
    _step("Export to Hugging Face and compare logits", "tools/export_hf.py", *export)
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    start = next(r for r in records if r.get("event") in ("start", "resume"))
    return {
        "name": name,
        "run_dir": run_dir,
        "parameters": start["parameters"],
        "flops": start["flops_per_token"],
        "tokens": train[-1]["consumed_tokens"],
        "train": sum(r["loss"] for r in train[-10:]) / len(train[-10:]),
        "valid": valid[-1]["loss"],
        "tokens_per_second": sorted(r["tokens_per_second"] for r in train)[len(train) // 2],
        "seconds": seconds,
    }


def _train_and_kill(command: list[str], run_dir: Path, kill_at: int) -> dict[int, float]:
    """Start training and kill -9 it once step `kill_at` is logged; returns the losses it had logged by then."""
    if _losses(_records(run_dir)):
        raise StepError(f"{run_dir} holds an earlier run; remove it, or give --run-dir another folder")
    _announce("Train (it will be killed in the middle)", command)
    process = subprocess.Popen(_python(command), cwd=ROOT, env=_environment())
    try:
        while process.poll() is None and max(_losses(_records(run_dir)), default=0) < kill_at:
            time.sleep(0.05)
        if process.poll() is not None:
            raise StepError(f"training ended with exit code {process.returncode} before it could be interrupted")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    losses = _losses(_records(run_dir))
    console.print(f"[yellow]killed (SIGKILL) after step {max(losses)}[/yellow]")
    return losses


def _compare_resumed(before: dict[int, float], records: list[dict[str, Any]]) -> None:
    resumed_at = max((r["step"] for r in records if r.get("event") == "resume"), default=0)
    after = _losses(records)
    repeated = [step for step in before if step > resumed_at]
    wrong = [step for step in repeated if before[step] != after[step]]
    if wrong or not repeated:
        raise StepError(f"after the resume at step {resumed_at} the losses of steps {wrong or 'none'} differ from before the kill")
    last = max(repeated)
    console.print(
        f"[green]resumed at step {resumed_at}: steps {min(repeated)}-{last} repeat the losses from before the kill bit for bit "
        f"(step {last}: {before[last]!r} = {after[last]!r})[/green]", soft_wrap=True
    )


def _summary(rows: list[dict[str, Any]], args: argparse.Namespace, seconds: float) -> None:
    table = Table(title="Quickstart: loss in nats per token", box=box.SIMPLE, pad_edge=False)
    for column in ("model", "params", "MFLOP/tok", "tokens", "train", "valid", "tok/s", "sec"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"], f"{row['parameters'] / 1e6:.3f}M", f"{row['flops'] / 1e6:.1f}", f"{row['tokens'] / 1e3:.0f}K",
            f"{row['train']:.4f}", f"{row['valid']:.4f}", f"{row['tokens_per_second']:,.0f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    if len(rows) > 1:
        picture = args.run_dir / "comparison.png"
        plot_comparison({row["name"]: row["run_dir"] / "metrics.jsonl" for row in rows}, picture)
        console.print(f"comparison: {picture}", soft_wrap=True)
    for row in rows:
        console.print(f"{row['name']}: {row['run_dir']} (config.yaml, metrics.jsonl, loss.png, checkpoints/, hf/)", soft_wrap=True)
    console.print(f"[bold]done in {seconds:.0f} s[/bold]")


# ------------------------------------------------------------------------------------------------------- plumbing


def _step(title: str, *command: Any) -> None:
    """Run one of the project's commands, shown first; raises :class:`StepError` if it fails."""
    _announce(title, command)
    code = subprocess.run(_python(command), cwd=ROOT, env=_environment(), check=False).returncode
    if code != 0:
        raise StepError(f"{title!r} ended with exit code {code}: python {shlex.join(map(str, command))}")


def _announce(title: str, command: Iterable[Any]) -> None:
    console.print(f"\n[bold]{title}[/bold]\n[dim]$ python {shlex.join(map(str, command))}[/dim]", soft_wrap=True)


def _python(command: Iterable[Any]) -> list[str]:
    return [sys.executable, *map(str, command)]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONUNBUFFERED": "1"}


def _records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    # The last line may be half written while the run goes on.
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


if __name__ == "__main__":
    sys.exit(main())
