"""The trainer: from a configuration to a run folder with metrics, checkpoints and a loss curve."""

from __future__ import annotations

import logging
import signal
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_kernels import backend
from megatron_mamba.checkpoint import CheckpointManager, load, rng_state, set_rng_state
from megatron_mamba.config import Config, ConfigError, to_dict
from megatron_mamba.data import Dataset, build_datasets
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
    last_sample,
    learning_rate,
    optimizer_state,
    schedule_position,
    set_learning_rate,
)
from megatron_mamba.parallel import health
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.parallel.replicas import differing_replicas
from megatron_mamba.parallel.vocab import IGNORE
from megatron_mamba.parallel.watchdog import SET_UP, Watchdog
from megatron_mamba.train.checks import check_batches, examined
from megatron_mamba.train.claim import claimed
from megatron_mamba.train.diary import write_config
from megatron_mamba.train.evaluation import finished, is_evaluated, sample_groups
from megatron_mamba.train.kernel_check import check_kernels
from megatron_mamba.train.metrics import MetricLogger, PhaseTimer, Throughput, memory_gib
from megatron_mamba.train.plot import draw_run
from megatron_mamba.train.resilience import StopRequest, TrainingError, Trouble, seed_everything, verdict
from megatron_mamba.train.resume import Start, find_start, keep_tokenizer, place_data, shared_fingerprints

log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Run, or resume, the training that `config` describes; returns the process's exit code.

    0: finished, or stopped on request (SIGTERM, SIGUSR1, SIGINT, SIGHUP, trainer.stop_after_samples) with a checkpoint. Raises
    ConfigError, DataError or CheckpointError for input that cannot work and :class:`TrainingError` when too many steps
    in a row were not finite or spikes, or a machine computes wrongly.
    """
    context = ParallelContext.create(config.parallel, config.trainer.device, deterministic=config.trainer.deterministic)
    # From before the model is built until the last save is on the disk: no signal ends a rank in the middle, but a second Ctrl-C.
    with StopRequest(speaks=context.global_rank == 0) as stop, ExitStack() as closing:
        closing.callback(context.close)
        closing.enter_context(claimed(config, context))
        limits = config.trainer.watchdog_seconds, config.trainer.heartbeat_seconds
        with context.watchdog(*limits, lambda: stop.received is not None) as watchdog:
            try:
                trainer = Trainer(config, context, stop, watchdog)
                closing.callback(trainer.close)
                trainer.run()
                if trainer.has_ended():
                    context.tell_finished()
            except (ConfigError, TrainingError):  # On every rank alike.
                raise
            except Exception as error:
                watchdog.failed(error)
                if context.world_size > 1:
                    closing.pop_all()  # Others may wait for what this rank no longer does.
                raise
            watchdog.reached(trainer.step, "end")
    return 0


class Passes(NamedTuple):
    """What forward and backward passes of a step give."""

    loss: float
    grad_norm: float
    own_loss: float  # this rank's share of the loss
    norm: Tensor  # grad_norm on the device


class Trainer:
    """One run on one rank: model, optimizer, data and the counters that a checkpoint holds."""

    def __init__(self, config: Config, context: ParallelContext, stop: StopRequest, watchdog: Watchdog | None = None) -> None:
        self.config, self.context, self.stop = config, context, stop
        self.is_main = context.global_rank == 0
        self.mesh = {name: context.size(name) for name in MESH_DIMENSIONS}
        self.run_dir = Path(config.run.dir)
        self.manager = CheckpointManager(
            config.checkpoint_dir,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            async_save=config.checkpoint.async_save,
            on_damage=config.checkpoint.on_damage,
        )
        start = find_start(config, context, self.manager)
        check_batches(config, context, start.counters.consumed_samples)
        learning_rate(config.optim, 0, config.train_samples, config.data.seq_length)
        seed_everything(config.run.seed + context.global_rank)
        torch.use_deterministic_algorithms(config.trainer.deterministic)
        backend.FUSED = config.trainer.kernels == "fused"
        self.readings = examined(config, context)
        self.kernels = check_kernels(config, context) if config.trainer.health_check else None
        self.data = place_data(config, context, build_datasets(config, partial(shared_fingerprints, context)), start)
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
        self.step = self.consumed_samples = self.consumed_tokens = self.passed_over = 0
        self.saved_step = self.checked_step = 0
        self.save_is_due = False
        self.told = False  # To stop, as some rank was: on all ranks alike.
        self.last_trouble = ""
        self.origin = f"initial weights of seed {config.run.seed}"
        self.trouble = Trouble(config.trainer.spike, config.trainer.max_skipped_steps)
        self.train_samples = config.train_samples
        self._load(start)
        self._tokenizer = keep_tokenizer(self.data, start, Path(config.checkpoint_dir), write=self.is_main)
        self.looked_step = self.step  # Examined above.
        if self.is_main:
            write_config(config, self.run_dir)
        self.metrics = MetricLogger(config, self.run_dir, self.is_main, self.consumed_samples, self.step, self.train_samples)
        self._reached = watchdog.reached if watchdog is not None else lambda step, phase: None
        self.timer = PhaseTimer(context.device, lambda phase: self._reached(self.step, phase))
        self.seconds = Counter[str]()
        self.flops_per_token = 3 * flops_per_token(config.model, config.data.seq_length)
        self.throughput = Throughput(
            self.flops_per_token, context.world_size, context.device, config.logging.peak_tflops, self.consumed_tokens
        )

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train to the end, to the requested stop, or to a signal; always leaves a checkpoint of where it stopped."""
        config, end = self.config, self._last_sample()
        self.metrics.log(self._description(), kind="event")
        if self.consumed_samples + self._batch_size() > self.train_samples and self._is_evaluated():
            self.metrics.log({"message": finished(config, self.step), "event": "finished", "step": self.step}, kind="event")
            return
        if config.eval.interval and self.step and self.step % config.eval.interval == 0 and not self._is_evaluated("valid"):
            self._evaluate("valid", self.data.valid)  # A stop left it undone.
        while self._train_to(end):
            self._rewind()
        self._save()
        self.manager.wait()
        if self.consumed_samples + self._batch_size() > self.train_samples and not self.told:
            for split, dataset in (("valid", self.data.valid), ("test", self.data.test)):
                if not self._is_evaluated(split):
                    self._evaluate(split, dataset)
        if self.is_main:
            draw_run(self.run_dir / "metrics.jsonl", self.run_dir / "loss.png", config.run.name)

    def has_ended(self) -> bool:
        """Whether the same command has nothing left to do (a collective)."""
        reached = self.consumed_samples + self._batch_size()
        return reached > self._last_sample() and (reached <= self.train_samples or self._is_evaluated())

    def _train_to(self, end: int) -> bool:
        """Train until `end` samples or a signal; True as soon as the run should go back to its last checkpoint."""
        config, self.told = self.config, self.context.any_rank(self.stop.received is not None)
        with self._loader(self.data.train, self._index_batches(self.consumed_samples)) as batches:
            while self.consumed_samples + self._batch_size() <= end and not self._stops():
                record = self._train_step(batches)
                last = self.told or self.consumed_samples + self._batch_size() > end
                if self.step % config.logging.interval == 0 or self.trouble.skipped_in_a_row or last:
                    laps = self.timer.lap()
                    self.seconds.update(laps["seconds"])
                    record |= self.throughput.lap(self.consumed_tokens) | laps | memory_gib(self.context.device)
                    self.metrics.log(record, kind="train")
                else:
                    self.metrics.advance(record)
                if self.trouble.exhausted:
                    self._give_up(record)
                if self.trouble.rewinds_now and self.saved_step > 0:
                    return True
                if self.told:
                    continue  # To the save: what else is due is done at the next start.
                if config.eval.interval and self.step % config.eval.interval == 0:
                    self._evaluate("valid", self.data.valid)
                if self.step % config.trainer.health_interval == 0 and config.trainer.health_check:
                    self._look()
                if self.step % config.trainer.replica_check_interval == 0:
                    self._check_replicas()
                self.save_is_due |= self.step % config.checkpoint.interval == 0
                # Weights that a spike began with are none to go back to.
                if self.save_is_due and not (config.trainer.spike.policy == "rewind" and self.trouble.spikes_in_a_row):
                    self._save()
        return False

    def _rewind(self) -> None:
        """Go back to the last checkpoint, and on to the samples after those that were read."""
        self._reached(self.step, SET_UP)  # Reading a checkpoint may take any time.
        rewinds, reached, step = self.trouble.rewinds + 1, self.consumed_samples + self.passed_over, self.step
        if rewinds > self.config.trainer.spike.max_rewinds:
            raise TrainingError(
                f"step {step} is a spike, and the run has returned to a checkpoint {rewinds - 1} times already. The checkpoint of "
                f"step {self.saved_step} in {self.config.checkpoint_dir} is from before it. Lower optim.lr, or look at the data; "
                "trainer.spike.max_rewinds sets the limit."
            )
        self.manager.wait()
        counted = self.trouble.counters() | {"rewinds": rewinds}
        self._load(Start.of_run(self.manager))
        self.trouble.restore(self.trouble.state() | counted)
        self.passed_over = reached - self.consumed_samples
        self.looked_step = min(self.looked_step, self.step)
        self.metrics.rewind(self.consumed_samples, self.step)
        self.throughput.lap(self.consumed_tokens)
        message = (
            f"back from step {step} to {self.origin}: step {step} was a spike. The run goes on with sample {reached:,}; "
            f"{self.passed_over:,} samples in all were passed over"
        )
        self.metrics.log({"message": message, "event": "rewind", "step": self.step, "cause": self.last_trouble}, kind="event")
        self.saved_step = -1  # The same weights again, so that a restart passes over the samples too, and counts.
        self._save()

    def _train_step(self, loader: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step over one global batch; returns what is worth logging."""
        config, context = self.config, self.context
        batch_size = self._batch_size()
        count_micro = batch_size // (config.trainer.micro_batch_size * context.dp_size)
        with self.timer.phase("data"):
            batches = [next(loader) for _ in range(count_micro)]
        targets = context.sum_over_tokens(torch.stack([(b.labels_BS >= 0).sum() for b in batches]).sum()).item()
        scale = 1.0 / max(targets, 1)
        passes = self._gradients(batches, scale)
        # Ranks agree on it, and on whether this step is the last: one that went on alone would wait for the others without end.
        own = self.trouble.of(passes.loss, passes.grad_norm)
        worst, told = self.context.largest(own.severity, self.stop.received is not None)
        again, self.told = worst, bool(told)
        if worst:
            # Once more with the same weights and samples: to know whose fault it is, and to go on if it was not theirs.
            first = passes
            self.optimizer.zero_grad(set_to_none=True)
            passes = self._gradients(batches, scale)
            (again,) = self.context.largest(self.trouble.of(passes.loss, passes.grad_norm).severity)
            self.trouble.transient_faults += again < worst
        skipped = self.trouble.skips(again, passes.loss, passes.grad_norm)
        if worst:
            self._report_rerun(own.what, first, passes, transient=again < worst, skipped=skipped)
        with self.timer.phase("optimizer"):
            position = schedule_position(config, self.consumed_samples, self.consumed_tokens)
            lr = learning_rate(config.optim, position, config.train_samples, config.data.seq_length)
            if not skipped:
                clip_(self.parameters, passes.norm, config.optim.clip_grad)
                set_learning_rate(self.optimizer, lr)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.consumed_samples += batch_size
        self.consumed_tokens += batch_size * config.data.seq_length
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "loss": passes.loss,
            "grad_norm": passes.grad_norm,
            "lr": lr,
            "global_batch_size": batch_size,
            **self.trouble.counters(),
        }

    def _gradients(self, batches: Sequence[Batch], scale: float) -> Passes:
        """Forward and backward passes of the micro-batches."""
        chunk = self.config.trainer.loss_chunk_tokens
        loss = self.pipeline.step(batches, scale=scale, chunk_tokens=chunk, phase=self.timer.phase)
        with self.timer.phase("optimizer"):
            norm = global_grad_norm(self.parameters, self.context)
            own = loss.detach().clone()  # Before it is summed over ranks.
            total, grad_norm, share = torch.stack([self.pipeline.total(loss), norm.double(), own.double()]).tolist()
        return Passes(total, grad_norm, share, norm)

    def _report_rerun(self, what: str, first: Passes, second: Passes, *, transient: bool, skipped: bool) -> None:
        everywhere = self.context.gather((what, socket.gethostname(), first.own_loss, second.own_loss))
        message = (
            f"step {self.step + 1} {next(what for what, *_ in everywhere if what)}; run again: loss {second.loss}, "
            f"grad norm {second.grad_norm}; {verdict(transient, skipped, [own for _, *own in everywhere])}"
        )
        self.last_trouble = message
        self.metrics.log({"message": message, "step": self.step + 1}, kind="event")

    def _look(self) -> None:
        """Whether the machines still compute rightly, which are slow, and where the ranks' time went."""
        readings = health.look(self.context, self.seconds)
        self.seconds.clear()
        slow = health.slow(readings)
        if wrong := health.wrong(readings):
            raise TrainingError(
                f"at step {self.step} a matrix product was wrong on {', '.join(wrong)}. It was right at step {self.looked_step}; "
                "checkpoints saved since may hold what these machines made. Take them out of service and go on from one before"
            )
        self.looked_step = self.step
        message = f"step {self.step}: " + ("; ".join(["slow", *slow]) if slow else f"all {len(readings)} ranks compute rightly")
        event = {"event": "health", "step": self.step, "health": health.summary(readings), "slow": "; ".join(slow)}
        self.metrics.log({"message": message, **event}, kind="event")

    def _stops(self) -> bool:
        """Whether to stop before the next step; says so."""
        if self.told:
            name = signal.Signals(self.stop.received).name if self.stop.received else "a signal on another rank"
            message = f"stopping at step {self.step} on {name}; the same command continues from here"
            self.metrics.log({"message": message, "step": self.step}, kind="event")
        return self.told

    def _give_up(self, record: dict[str, Any]) -> None:
        self._save()
        self.manager.wait()
        raise TrainingError(
            f"{self.trouble.skipped_in_a_row} steps in a row were spikes or had a non-finite loss or gradient (last: loss "
            f"{record['loss']}, grad norm {record['grad_norm']}, step {self.step}) and changed no weights. The checkpoint of step "
            f"{self.step} in {self.config.checkpoint_dir} holds the weights from before them. Lower optim.lr, lengthen the "
            "warm-up, or check the data around the samples of these steps; trainer.max_skipped_steps sets the limit."
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
        """Log the mean loss over the first eval.samples sequences of a split, the same ones each time; nothing if told to stop."""
        samples = min(self.config.eval.samples, dataset.samples_per_epoch if dataset is not None else 0)
        if samples == 0:
            return
        assert dataset is not None
        micro = self.config.trainer.micro_batch_size
        groups = sample_groups(samples, micro, self.context)
        padded = [group + [0] * (micro - len(group)) for group in groups]
        losses, tokens = (torch.zeros((), dtype=torch.float64, device=self.context.device) for _ in range(2))
        chunk = self.config.trainer.loss_chunk_tokens
        bar = self.metrics.progress(len(groups), split, "batches")
        with self.throughput.paused(), self.timer.phase("evaluate"), self._loader(dataset, padded) as batches, bar:
            for group, batch in zip(groups, batches, strict=True):
                batch.labels_BS[len(group) :] = IGNORE
                self._reached(self.step, "evaluate")
                if self.context.any_rank(self.stop.received is not None):
                    self.told = True
                    break
                losses += self.pipeline.evaluate(batch, chunk_tokens=chunk)
                tokens += (batch.labels_BS >= 0).sum()
                bar.update()
            loss, counted = torch.stack([self.pipeline.total(losses), self.context.sum_over_tokens(tokens)]).tolist()
        self.pipeline.reshard()
        if self.told:
            return
        record = {"step": self.step, "consumed_samples": self.consumed_samples, "consumed_tokens": self.consumed_tokens}
        self.metrics.log(record | {"loss": loss / max(counted, 1), "tokens": int(counted)}, kind=split)

    def _is_evaluated(self, *splits: str) -> bool:
        return self.context.any_rank(self.is_main and is_evaluated(self.config, self.step, self.data, *splits))

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
                "passed_over": self.passed_over,
                **self.trouble.state(),
                "config": to_dict(self.config),
                "mesh": self.mesh,
                **self._tokenizer,
                "data": self.data.standing.to_dict(),
            }
            self.manager.save(self.step, self._tensors(), metadata, rank_state=rng_state())
        self.saved_step, self.save_is_due = self.step, False

    def _load(self, start: Start) -> None:
        """Continue from a checkpoint of the run, or take over the weights of another."""
        if start.source is None:
            return
        if not start.resumes:
            load(start.source, {"model": self._tensors()["model"]})
            self.origin = f"weights of {start.source}"
            return
        rank_state: dict[str, Any] = {}
        load(start.source, self._tensors(), rank_state=rank_state, verified=True)
        if rank_state:
            set_rng_state(rank_state)
        counters = start.counters
        self.step, self.passed_over = counters.step, counters.passed_over
        self.consumed_samples, self.consumed_tokens = counters.consumed_samples, counters.consumed_tokens
        self.train_samples = last_sample(self.config, self.consumed_samples, self.consumed_tokens)
        self.saved_step = self.checked_step = self.step
        self.save_is_due = False
        self.trouble.restore(start.metadata)
        self.origin = f"checkpoint {start.source}"

    # ------------------------------------------------------------------------------------------------ counting

    def _batch_size(self) -> int:
        return global_batch_size(self.config.trainer, self.consumed_samples)

    def _last_sample(self) -> int:
        stop = self.config.trainer.stop_after_samples
        return min(self.train_samples, stop) if stop is not None else self.train_samples

    def _index_batches(self, consumed: int) -> Iterator[list[int]]:
        """Sample numbers of this rank's micro-batches from `consumed` on: a pure function of the samples consumed."""
        micro, end = self.config.trainer.micro_batch_size, self._last_sample()
        while consumed + (batch := global_batch_size(self.config.trainer, consumed)) <= end:
            share = batch // self.context.dp_size
            first = consumed + self.context.dp_rank * share
            for start in range(first + self.passed_over, first + self.passed_over + share, micro):
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
            "consumed_tokens": self.consumed_tokens,
            "parameters": parameters,
            "flops_per_token": self.flops_per_token,
            "world_size": self.context.world_size,
            "device": str(self.context.device),
            "job": dict(self.context.job),
            "health": health.summary(self.readings),
            "kernels_checked": None if self.kernels is None else self.kernels._asdict(),
            "torch": torch.__version__,
        }

    def close(self) -> None:
        """Finish what is being written."""
        self.manager.close()
        self.metrics.close()
