"""Pictures of a run from its metrics.jsonl: loss and learning rate, and several runs side by side."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mamba.files import reason
from megatron_mamba.train.metrics import read_records

log = logging.getLogger(__name__)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: told apart with any colour vision, and in print."""
SMOOTHING = 0.05
"""The smoothed loss averages over this fraction of the run."""
OPENING = 0.05
"""A comparison's vertical axis leaves out how the loss fell in this fraction of the run, where all curves look alike."""


def plot_run(metrics_jsonl: str | Path, out_png: str | Path, title: str = "") -> Path:
    """Draw one run: training loss (raw and smoothed), validation loss and learning rate over tokens; returns `out_png`.

    Raises ValueError if the file holds no training record with a finite loss.
    """
    train, valid = read_curves(metrics_jsonl)
    figure, (loss, rate) = _panels((8.0, 5.4), [4, 1])
    tokens = [r["consumed_tokens"] for r in train]
    raw = [r["loss"] for r in train]
    smooth = smoothed(raw)
    loss.plot(tokens, raw, color=COLOURS[0], alpha=0.25, linewidth=0.8)
    loss.plot(tokens, smooth, color=COLOURS[0], linewidth=1.8, label=f"training (last, smoothed: {smooth[-1]:.3f})")
    if valid:
        ends = [r["consumed_tokens"] for r in valid], [r["loss"] for r in valid]
        loss.plot(*ends, "o-", color=COLOURS[1], markersize=5, linewidth=1, label=f"validation (last: {ends[1][-1]:.3f})")
    _limit(loss, smooth + raw[:1])
    loss.set_ylabel("loss (nats per token)")
    loss.legend(frameon=False)
    pairs = [(r["consumed_tokens"], r["lr"]) for r in train if "lr" in r]
    rate.plot([tokens for tokens, _ in pairs], [lr for _, lr in pairs], color="#555555", linewidth=1.5)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_xlabel("tokens")
    return _save(figure, title or "Training", out_png)


def draw_run(metrics_jsonl: str | Path, out_png: str | Path, title: str = "") -> None:
    """:func:`plot_run` for a run that has ended: whatever comes of the picture, the run ends as it would without."""
    try:
        plot_run(metrics_jsonl, out_png, title)
    except ValueError as error:
        log.info("no curve is drawn: %s", error)
    except OSError as error:
        log.warning("no curve is drawn: %s cannot be written (%s)", out_png, reason(error))
    except Exception:  # Of a library that draws: the run is whole, and its exit code says so.
        log.warning("no curve was drawn", exc_info=True)


def plot_comparison(runs: Mapping[str, str | Path], out_png: str | Path, title: str = "") -> Path:
    """Draw the loss of several runs (name -> metrics.jsonl) over tokens: smoothed training curves, validation as points.

    Returns `out_png`. Raises ValueError if a file holds no training record with a finite loss.
    """
    figure, (axes,) = _panels((8.0, 5.0), [1])
    shown: list[float] = []
    finals: list[tuple[float, Any]] = []
    for (name, path), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
        train, valid = read_curves(path)
        curve = smoothed([r["loss"] for r in train])
        shown += curve[int(OPENING * len(curve)) :] + [r["loss"] for r in valid[-1:]]
        final = valid[-1]["loss"] if valid else curve[-1]
        label = f"{name} ({'validation' if valid else 'training'} {final:.3f})"
        finals += [(final, line) for line in axes.plot([r["consumed_tokens"] for r in train], curve, color=colour, label=label)]
        points = [r["consumed_tokens"] for r in valid], [r["loss"] for r in valid]
        axes.plot(*points, "o", color=colour, markersize=6, markeredgecolor="white", zorder=3)
    _limit(axes, shown)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(handles=[line for _, line in sorted(finals, key=lambda item: -item[0])], frameon=False)
    return _save(figure, title or "Loss at equal tokens: training (lines) and validation (points)", out_png)


def read_curves(metrics_jsonl: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and the validation records with a finite loss, in order."""
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    Path(metrics_jsonl).stat()  # Raises FileNotFoundError, where read_records finds no records.
    for record in read_records(metrics_jsonl):
        if record["kind"] in kinds and "consumed_tokens" in record and isinstance(record.get("loss"), int | float):
            kinds[record["kind"]].append(record)
    if not kinds["train"]:
        raise ValueError(f"{metrics_jsonl} holds no training record with a finite loss; train for at least one log interval")
    return kinds["train"], kinds["valid"]


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average over SMOOTHING of the series (at most 101 values), without the window's extreme eighths.

    Single spikes leave no trace; the window is narrow at the series' start, so that a steep beginning is not smeared.
    """
    half = min(int(SMOOTHING * len(values)) // 2, 50)
    windows = (sorted(values[max(i - half, 0) : i + min(half, i) + 1]) for i in range(len(values)))
    return [statistics.fmean(window[len(window) // 8 : len(window) - len(window) // 8]) for window in windows]


def _panels(size: tuple[float, float], heights: list[int]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _tokens(tokens)))
        axes.margins(x=0.02)
    return figure, list(panels)


def _limit(axes: Any, values: Sequence[float]) -> None:
    """Let the vertical axis show `values` with some room, whatever single spikes or the raw curve do."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)


def _tokens(count: float) -> str:
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def _save(figure: Any, title: str, out_png: str | Path) -> Path:
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    path = Path(out_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
