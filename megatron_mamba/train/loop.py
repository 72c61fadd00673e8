"""The trainer: from a configuration to a run folder with metrics, checkpoints and a loss curve."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mamba_kernels import backend
from megatron_mamba.checkpoint import CheckpointManager, load, read_metadata, resolve, rng_state, set_rng_state
from megatron_mamba.config import MIXER_KINDS, Config, ConfigError, require, to_dict
from megatron_mamba.data import Dataset, build_datasets, save_tokenizer
from megatron_mamba.data.loader import Batch, Loader
from megatron_mamba.model import build_pipeline
from megatron_mamba.model.flops import flops_per_token
from megatron_mamba.model.parameters import count, parameter_table
from megatron_mamba.model.stages import stages_of
from megatron_mamba.model.timing import measured_costs
from megatron_mamba.optim import (
    build_optimizer,
    clip_,
    global_batch_size,
    global_grad_norm,
    learning_rate,
    optimizer_state,
    set_learning_rate,
)
from megatron_mamba.parallel import health
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.parallel.replicas import differing_replicas
from megatron_mamba.parallel.vocab import IGNORE
from megatron_mamba.parallel.watchdog import Watchdog
from megatron_mamba.train.metrics import MetricLogger, PhaseTimer, Throughput, memory_gib
from megatron_mamba.train.plot import plot_run
from megatron_mamba.train.resilience import SkipCounter, StopRequest, TrainingError, seed_everything

log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Run, or resume, the training that `config` describes; returns the process's exit code.

    0: finished, or stopped on request (SIGTERM, SIGUSR1, trainer.stop_after_samples) with a checkpoint. Raises
    ConfigError, DataError or CheckpointError for input that cannot work and :class:`TrainingError` when too many steps
    in a row were not finite.
    """
    context = ParallelContext.create(config.parallel, config.trainer.device, deterministic=config.trainer.deterministic)
    # From before the model is built until the last save is on the disk: no signal, be it the second, ends a rank in the middle.
    with StopRequest(context) as stop, ExitStack() as closing:
        closing.callback(context.close)
        limits = config.trainer.watchdog_seconds, config.trainer.heartbeat_seconds
        with context.watchdog(*limits, lambda: stop.received is not None) as watchdog:
            try:
                trainer = Trainer(config, context, stop, watchdog)
                closing.callback(trainer.close)
                trainer.run()
            except (ConfigError, TrainingError):  # On every rank alike.
                raise
            except Exception as error:
                watchdog.failed(error)
                if context.world_size > 1:
                    closing.pop_all()  # Others may wait for what this rank no longer does.
                raise
            watchdog.reached(trainer.step, "end")
    return 0


class Trainer:
    """One run on one rank: model, optimizer, data and the counters that a checkpoint holds."""

    def __init__(self, config: Config, context: ParallelContext, stop: StopRequest, watchdog: Watchdog | None = None) -> None:
        self.config, self.context, self.stop = config, context, stop
        self.is_main = context.global_rank == 0
        self.mesh = {name: context.size(name) for name in MESH_DIMENSIONS}
        self.run_dir = Path(config.run.dir)
        _check_batches(config, context)
        learning_rate(config.optim, 0, config.train_samples, config.data.seq_length)
        seed_everything(config.run.seed + context.global_rank)
        torch.use_deterministic_algorithms(config.trainer.deterministic)
        backend.FUSED = config.trainer.kernels == "fused"
        self.readings = self._examined()
        self.data = build_datasets(config)
        # What is put off under a zero-bubble schedule costs time too.
        timed = config.parallel.balance == "time" and context.size("pp") > 1
        costs = measured_costs(config, replace(context, deferred=None)) if timed else None
        self.pipeline = build_pipeline(
            config.model,
            stages_of(config, costs),
            context,
            precision=config.trainer.precision,
            seed=config.run.seed,
            recompute=config.recompute,
        )
        self.parameters = [parameter for _, parameter in self.pipeline.named_parameters()]
        self.table = parameter_table(config.model)
        self.optimizer = build_optimizer(self.pipeline.named_parameters(), self.table, config.optim)
        self.manager = CheckpointManager(
            config.checkpoint_dir,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            async_save=config.checkpoint.async_save,
            on_damage=config.checkpoint.on_damage,
        )
        self._tokenizer: str | None = None
        if self.data.tokenizer is not None and self.is_main:
            folder = Path(config.checkpoint_dir)
            # Recorded relative to the checkpoints' folder, which may be moved.
            self._tokenizer = str(save_tokenizer(self.data.tokenizer, folder / "tokenizer").relative_to(folder))
        self.step = self.consumed_samples = self.consumed_tokens = 0
        self.saved_step = self.checked_step = 0
        self.origin = f"initial weights of seed {config.run.seed}"
        self.skips = SkipCounter(config.trainer.max_skipped_steps)
        self._start_or_resume()
        if self.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        self.metrics = MetricLogger(config, self.run_dir, self.is_main, consumed_samples=self.consumed_samples)
        self._reached = watchdog.reached if watchdog is not None else lambda step, phase: None
        self.timer = PhaseTimer(context.device, lambda phase: self._reached(self.step, phase))
        self.flops_per_token = 3 * flops_per_token(config.model, config.data.seq_length)
        self.throughput = Throughput(
            self.flops_per_token, context.world_size, context.device, config.logging.peak_tflops, self.consumed_tokens
        )

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train to the end, to the requested stop, or to a signal; always leaves a checkpoint of where it stopped."""
        config, end = self.config, self._last_sample()
        self.metrics.log(self._description(), kind="event")
        batches = self._loader(self.data.train, self._index_batches(self.consumed_samples))
        with batches:
            while self.consumed_samples + self._batch_size() <= end and not self._stops():
                record = self._train_step(batches)
                if self.step % config.logging.interval == 0 or self.skips.in_a_row or self.consumed_samples >= end:
                    record |= self.throughput.lap(self.consumed_tokens) | self.timer.lap() | memory_gib(self.context.device)
                    self.metrics.log(record, kind="train")
                else:
                    self.metrics.advance(record)
                if self.skips.exhausted:
                    self._give_up(record)
                if config.eval.interval and self.step % config.eval.interval == 0:
                    self._evaluate("valid", self.data.valid)
                if self.step % config.trainer.replica_check_interval == 0:
                    self._check_replicas()
                if self.step % config.checkpoint.interval == 0:
                    self._save()
        self._save()
        self.manager.wait()
        if self.consumed_samples + self._batch_size() > config.train_samples:
            if not config.eval.interval or self.step % config.eval.interval:
                self._evaluate("valid", self.data.valid)
            self._evaluate("test", self.data.test)
        if self.is_main and self.step > 0:
            plot_run(self.run_dir / "metrics.jsonl", self.run_dir / "loss.png", config.run.name)

    def _train_step(self, loader: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step over one global batch; returns what is worth logging."""
        config, context = self.config, self.context
        batch_size = self._batch_size()
        count_micro = batch_size // (config.trainer.micro_batch_size * context.dp_size)
        with self.timer.phase("data"):
            batches = [next(loader) for _ in range(count_micro)]
        targets = context.sum_over_tokens(torch.stack([(b.labels_BS >= 0).sum() for b in batches]).sum()).item()
        scale = 1.0 / max(targets, 1)
        loss_value, norm_value, norm = self._gradients(batches, scale)
        if not _finite(loss_value, norm_value):
            # Once more with the same weights and samples: to know whose fault it is, and to go on if it was not theirs.
            first = f"loss {loss_value}, grad norm {norm_value}"
            self.optimizer.zero_grad(set_to_none=True)
            loss_value, norm_value, norm = self._gradients(batches, scale)
            self._report_rerun(first, loss_value, norm_value)
        finite = _finite(loss_value, norm_value)
        with self.timer.phase("optimizer"):
            lr = learning_rate(config.optim, self.consumed_samples, config.train_samples, config.data.seq_length)
            if finite:
                clip_(self.parameters, norm, config.optim.clip_grad)
                set_learning_rate(self.optimizer, lr)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.skips.record(finite)
        self.step += 1
        self.consumed_samples += batch_size
        self.consumed_tokens += batch_size * config.data.seq_length
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "loss": loss_value,
            "grad_norm": norm_value,
            "lr": lr,
            "global_batch_size": batch_size,
            "skipped_steps": self.skips.total,
            "transient_faults": self.skips.transient,
        }

    def _gradients(self, batches: Sequence[Batch], scale: float) -> tuple[float, float, Tensor]:
        """Forward and backward passes of the micro-batches: loss and norm of the gradients, the latter on the device too."""
        chunk = self.config.trainer.loss_chunk_tokens
        loss = self.pipeline.step(batches, scale=scale, chunk_tokens=chunk, phase=self.timer.phase)
        with self.timer.phase("optimizer"):
            norm = global_grad_norm(self.parameters, self.context)
            loss_value, norm_value = torch.stack([self.pipeline.total(loss), norm.double()]).tolist()
        return loss_value, norm_value, norm

    def _report_rerun(self, first: str, loss: float, norm: float) -> None:
        transient = _finite(loss, norm)
        self.skips.transient += transient
        verdict = (
            "the fault was transient: a machine's, not that of data or settings. The step goes on with the second result"
            if transient
            else "the fault comes again: of the samples, the weights or the settings. The step is skipped"
        )
        message = f"step {self.step + 1} was not finite ({first}); run again: loss {loss}, grad norm {norm}; {verdict}"
        self.metrics.log({"message": message, "step": self.step + 1}, kind="event")

    def _stops(self) -> bool:
        """Whether any rank was told to stop (a collective)."""
        if not self.stop.asked():
            return False
        name = signal.Signals(self.stop.received).name if self.stop.received else "a signal on another rank"
        message = f"stopping at step {self.step} on {name}; the same command continues from here"
        self.metrics.log({"message": message, "step": self.step}, kind="event")
        return True

    def _give_up(self, record: dict[str, Any]) -> None:
        self._save()
        self.manager.wait()
        raise TrainingError(
            f"{self.skips.in_a_row} steps in a row had a non-finite loss or gradient (last: loss {record['loss']}, "
            f"grad norm {record['grad_norm']}, step {self.step}) and changed no weights. The checkpoint of step {self.step} in "
            f"{self.config.checkpoint_dir} holds the weights from before them. Lower optim.lr, lengthen the warm-up, or check "
            "the data around the samples of these steps; trainer.max_skipped_steps sets the limit."
        )

    def _check_replicas(self) -> None:
        """Stop, without a checkpoint, where ranks that should hold the same weights do not."""
        if self.checked_step == self.step or self.context.world_size == 1:
            return
        if differing := differing_replicas(self.pipeline.named_parameters(), self.context):
            shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
            raise TrainingError(
                f"at step {self.step} these parameters differ between ranks that should hold the same: {shown}. They did not at "
                f"step {self.checked_step}. Nothing was saved. Take these machines out of service and start again from the "
                "last checkpoint; trainer.replica_check_interval sets how often this is looked at."
            )
        self.checked_step = self.step

    # ------------------------------------------------------------------------------------------------ evaluation

    def _evaluate(self, split: str, dataset: Dataset | None) -> None:
        """Log the mean loss over the first eval.samples sequences of a split, the same ones each time."""
        samples = min(self.config.eval.samples, dataset.samples_per_epoch if dataset is not None else 0)
        if samples == 0:
            return
        assert dataset is not None
        groups = self._evaluation_groups(samples)
        micro = self.config.trainer.micro_batch_size
        padded = [group + [0] * (micro - len(group)) for group in groups]
        losses, tokens = (torch.zeros((), dtype=torch.float64, device=self.context.device) for _ in range(2))
        chunk = self.config.trainer.loss_chunk_tokens
        bar = self.metrics.progress(len(groups), split, "batches")
        with self.throughput.paused(), self.timer.phase("evaluate"), self._loader(dataset, padded) as batches, bar:
            for group, batch in zip(groups, batches, strict=True):
                batch.labels_BS[len(group) :] = IGNORE
                self._reached(self.step, "evaluate")
                losses += self.pipeline.evaluate(batch, chunk_tokens=chunk)
                tokens += (batch.labels_BS >= 0).sum()
                bar.update()
            loss, counted = torch.stack([self.pipeline.total(losses), self.context.sum_over_tokens(tokens)]).tolist()
        self.pipeline.reshard()
        record = {"step": self.step, "consumed_samples": self.consumed_samples, "consumed_tokens": self.consumed_tokens}
        self.metrics.log(record | {"loss": loss / max(counted, 1), "tokens": int(counted)}, kind=split)

    def _evaluation_groups(self, samples: int) -> list[list[int]]:
        """This rank's sample numbers by micro-batch; every rank gets equally many, some of them short or empty."""
        micro, dp = self.config.trainer.micro_batch_size, self.context.dp_size
        mine = list(range(self.context.dp_rank, samples, dp))
        return [mine[i * micro : (i + 1) * micro] for i in range(-(-samples // (micro * dp)))]

    def _loader(self, dataset: Dataset, index_batches: Iterable[Sequence[int]]) -> Loader:
        data = self.config.data
        return Loader(
            dataset,
            index_batches,
            document_reset=data.document_reset,
            mask_document_ends=data.mask_document_ends,
            prefetch=data.prefetch,
            device=self.context.device,
            piece=(self.context.rank("cp"), self.context.size("cp")),
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _tensors(self) -> dict[str, Any]:
        return {"model": dict(self.pipeline.named_parameters()), "optimizer": optimizer_state(self.optimizer)}

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        self._check_replicas()
        with self.throughput.paused(), self.timer.phase("checkpoint"):
            metadata = {
                "step": self.step,
                "consumed_samples": self.consumed_samples,
                "consumed_tokens": self.consumed_tokens,
                "skipped_steps": self.skips.total,
                "skipped_in_a_row": self.skips.in_a_row,
                "transient_faults": self.skips.transient,
                "config": to_dict(self.config),
                "mesh": self.mesh,
                "tokenizer": self._tokenizer,
            }
            self.manager.save(self.step, self._tensors(), metadata, rank_state=rng_state())
        self.saved_step = self.step

    def _start_or_resume(self) -> None:
        """Continue from the latest checkpoint of the run, or take over weights from checkpoint.init_from."""
        latest = self.manager.latest()
        if latest is None:
            if self.config.checkpoint.init_from is not None:
                source = resolve(self.config.checkpoint.init_from)
                self._metadata_of(source)
                load(source, {"model": self._tensors()["model"]})
                self.origin = f"weights of {source}"
            return
        metadata = self._metadata_of(latest)
        rank_state: dict[str, Any] = {}
        load(latest, self._tensors(), rank_state=rank_state, verified=True)
        if rank_state:
            set_rng_state(rank_state)
        self.step = self.saved_step = self.checked_step = metadata["step"]
        self.consumed_samples, self.consumed_tokens = metadata["consumed_samples"], metadata["consumed_tokens"]
        self.skips.total, self.skips.in_a_row = metadata["skipped_steps"], metadata["skipped_in_a_row"]
        self.skips.transient = metadata.get("transient_faults", 0)
        self.origin = f"checkpoint {latest}"

    def _metadata_of(self, source: Path) -> dict[str, Any]:
        """What the trainer that saved `source` knew: another model is refused, other settings and another mesh are named."""
        metadata = read_metadata(source)
        _check_same_model(self.config, metadata["config"], source)
        changed = _changed_settings(self.config, metadata["config"])
        if self.is_main and changed:
            log.warning("other settings than those of %s: %s", source, ", ".join(changed))
        if self.is_main and metadata.get("mesh", self.mesh) != self.mesh:
            was, is_ = _mesh_name(metadata["mesh"]), _mesh_name(self.mesh)
            log.warning("%s was saved on %s and is laid out anew over %s", source, was, is_)
        return metadata

    # ------------------------------------------------------------------------------------------------ counting

    def _batch_size(self) -> int:
        return global_batch_size(self.config.trainer, self.consumed_samples)

    def _last_sample(self) -> int:
        stop = self.config.trainer.stop_after_samples
        return min(self.config.train_samples, stop) if stop is not None else self.config.train_samples

    def _index_batches(self, consumed: int) -> Iterator[list[int]]:
        """Sample numbers of this rank's micro-batches from `consumed` on: a pure function of the samples consumed."""
        micro, end = self.config.trainer.micro_batch_size, self._last_sample()
        while consumed + (batch := global_batch_size(self.config.trainer, consumed)) <= end:
            share = batch // self.context.dp_size
            first = consumed + self.context.dp_rank * share
            for start in range(first, first + share, micro):
                yield list(range(start, start + micro))
            consumed += batch

    def _description(self) -> dict[str, Any]:
        parameters = count(self.config.model)
        where = f"{self.context.world_size} x {self.context.device.type}"
        return {
            "message": f"{self.config.model.name}: {parameters:,} parameters on {where} from {self.origin}, step {self.step}",
            "event": "start" if self.step == 0 else "resume",
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "parameters": parameters,
            "flops_per_token": self.flops_per_token,
            "world_size": self.context.world_size,
            "device": str(self.context.device),
            "job": dict(self.context.job),
            "health": health.summary(self.readings),
            "torch": torch.__version__,
        }

    def _examined(self) -> list[health.Reading]:
        """What every rank's machine gives; slow ones are named, and one that computes wrongly is refused."""
        if not self.config.trainer.health_check:
            return []
        readings = health.examine(self.context)
        for line in health.slow(readings) if self.is_main else []:
            log.warning("slow: %s", line)
        if wrong := health.wrong(readings):
            raise TrainingError(
                f"a matrix product was wrong on {', '.join(wrong)}. Nothing was trained. Take these machines out of service; "
                "trainer.health_check=false does not look"
            )
        return readings

    def close(self) -> None:
        """Finish what is being written."""
        self.manager.close()
        self.metrics.close()


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _check_batches(config: Config, context: ParallelContext) -> None:
    """Every batch must share out evenly over data-parallel ranks and micro-batches, and the run must hold one."""
    settings = {"trainer.global_batch_size": config.trainer.global_batch_size}
    sizes = list(settings.values())
    if (ramp := config.trainer.batch_ramp) is not None:
        settings |= {"trainer.batch_ramp.start": ramp.start, "trainer.batch_ramp.increment": ramp.increment}
        sizes += range(ramp.start, config.trainer.global_batch_size, ramp.increment)
    for field, value in settings.items():
        config.trainer.micro_batches(field, value, context.dp_size)
    for size in sizes:
        field = next((field for field, value in settings.items() if value == size), "trainer.batch_ramp.increment")
        micro_batches = config.trainer.micro_batches(field, size, context.dp_size)
        config.parallel.check_micro_batches(field, settings[field], size, micro_batches)
    first = min(sizes)
    require(
        config.train_samples >= first,
        "trainer.train_samples",
        config.train_samples,
        f"shorter than one global batch of {first} samples",
        "Train longer, or lower trainer.global_batch_size",
    )


def _check_same_model(config: Config, saved: dict[str, Any], path: Path) -> None:
    """A run goes on with its own model. Raises ConfigError naming the first setting of another one."""
    ours = to_dict(config)
    # Settings of mixers that the pattern does not use make no difference.
    unused = {"name", *set(MIXER_KINDS.values()) - set(config.model.layers)}
    old = dict(_leaves({k: v for k, v in saved["model"].items() if k not in unused}, "model"))
    new = dict(_leaves({k: v for k, v in ours["model"].items() if k not in unused}, "model"))
    for key, value in new.items():
        if old.get(key) != value:
            raise ConfigError(
                key,
                value,
                f"the checkpoint {path} is of another model, with {old.get(key)!r}",
                "Give the run another run.dir, or the model it was started with",
            )


def _changed_settings(config: Config, saved: dict[str, Any]) -> list[str]:
    """Names of the settings that make another training than the saved one."""
    ours, groups = to_dict(config), ("data", "optim", "trainer", "parallel", "recompute")
    return [f"{group}.{key}" for group in groups for key in ours[group] if saved.get(group, {}).get(key) != ours[group][key]]


def _mesh_name(sizes: dict[str, int]) -> str:
    """For example ``dp_shard 2 x tp 2``."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"


def _leaves(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value
