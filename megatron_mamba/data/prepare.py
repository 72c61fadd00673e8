"""Text to an indexed corpus by several processes: resumable, and byte-identical however it was interrupted or spread.

The input is cut into shards by its bytes alone. Each is tokenised into PREFIX.shards/NUMBER.bin, .idx and, last, .json,
whose presence says that the shard is finished; at the end the shards are joined in order.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mamba.data.indexed import DataError, IndexedWriter, Metadata, atomic_write, bin_path, idx_path, token_dtype
from megatron_mamba.data.sources import TEXT_GLOBS, Shard, find_files, iterate_shards, read_documents
from megatron_mamba.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from megatron_mamba.progress import Progress

_FORMAT = 1
_SMALLEST_SHARD, _LARGEST_SHARD = 1 << 18, 1 << 25


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard."""

    documents: int
    tokens: int
    max_token_id: int
    skipped: int


def prepare(
    inputs: Iterable[str | Path], tokenizer: str | Path, output: str | Path, *, workers: int = 1,
    globs: Sequence[str] = TEXT_GLOBS, json_key: str = "text", skip_bad: bool = False, overwrite: bool = False,
) -> Metadata:  # fmt: skip
    """Tokenise `inputs` into PREFIX.bin, .idx, .json and a copy of the tokenizer in PREFIX.tokenizer; PREFIX is `output`.

    Every document ends with the tokenizer's end-of-document id; documents without text are left out. A call repeated after
    an interruption goes on where it was; repeated after the end, it does nothing. Raises :class:`DataError` for
    unreadable input (file and line named), or if PREFIX exists from other inputs or options and `overwrite` is False.
    """
    output = Path(output)
    files = find_files(inputs, globs)
    total = sum(file.stat().st_size for file in files)
    loaded = load_tokenizer(tokenizer)
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    settings = hashlib.sha256(repr((_FORMAT, stamps, loaded.sha256, loaded.eod_id, json_key, skip_bad)).encode()).hexdigest()
    folder = Path(f"{output}.shards")
    try:
        finished = _claim(output, folder, settings, overwrite)
        if finished is not None:
            return finished
        tokenise = functools.partial(tokenise_shard, folder=folder, tokenizer=loaded.path, json_key=json_key, skip_bad=skip_bad)
        shards = iterate_shards(files, min(max(total // 64, _SMALLEST_SHARD), _LARGEST_SHARD))
        results: list[ShardResult] = []
        with Progress(total, "Tokenising", "B") as progress:
            for shard, result, resumed in _run(shards, tokenise, folder, workers):
                results.append(result)
                if resumed:
                    progress.skip(shard.size)
                else:
                    progress.update(shard.size, documents=sum(r.documents for r in results))
        metadata = _join(output, folder, results, loaded, settings)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(f"{output}: no room left on the disk. Make room and repeat the command: finished work is kept") from error
    shutil.rmtree(folder)
    return metadata


def tokenise_shard(shard: Shard, *, folder: Path, tokenizer: Path, json_key: str, skip_bad: bool) -> ShardResult:
    """Write one shard's tokens into `folder`; the same files whoever does it, and whenever."""
    loaded = _load_once(tokenizer)
    skipped = 0
    with IndexedWriter(folder / f"{shard.number:08d}", token_dtype(loaded.vocab_size)) as writer:
        for text in read_documents(shard, json_key, skip_bad):
            if text is None:
                skipped += 1
            elif ids := loaded.encode(text):
                writer.add_document([*ids, loaded.eod_id])
    result = ShardResult(writer.n_documents, writer.n_tokens, writer.max_token_id, skipped)
    with atomic_write(folder / f"{shard.number:08d}.json") as file:
        file.write(json.dumps(asdict(result)).encode())
    return result


@functools.lru_cache(1)
def _load_once(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _claim(output: Path, folder: Path, settings: str, overwrite: bool) -> Metadata | None:
    """Make `folder` ready for shards made with `settings`; returns the corpus' record if it is finished already."""
    stamp = folder / "settings"
    if stamp.exists() and stamp.read_text() != settings:
        if not overwrite:
            raise DataError(
                f"{folder}: holds unfinished work from other inputs or options. Repeat that command, or start afresh "
                "with --overwrite"
            )
        shutil.rmtree(folder)
    if not stamp.exists():
        there = [path for path in (idx_path(output), bin_path(output), Metadata.path(output)) if path.exists()]
        record = None if overwrite and len(there) < 3 else Metadata.read(output)
        if record is not None and record.settings == settings and len(there) == 3:
            return record
        if there and not overwrite:
            raise DataError(
                f"{there[0]}: exists already, from other inputs or options. Choose another --output, or replace it with --overwrite"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(stamp) as file:
            file.write(settings.encode())
    for stale in output.parent.glob(f"{glob.escape(output.name)}.*.tmp-*"):
        stale.unlink()
    return None


def _finished(folder: Path, shard: Shard) -> ShardResult | None:
    path = folder / f"{shard.number:08d}.json"
    return ShardResult(**json.loads(path.read_bytes())) if path.exists() else None


def _run(
    shards: Iterator[Shard], tokenise: Callable[[Shard], ShardResult], folder: Path, workers: int
) -> Iterator[tuple[Shard, ShardResult, bool]]:
    """Results of all shards as they come, each with whether an earlier call had finished it."""
    pending: dict[Future[ShardResult], Shard] = {}

    def collect() -> Iterator[tuple[Shard, ShardResult, bool]]:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            yield pending.pop(future), future.result(), False

    pool: Executor
    if workers == 1:
        pool = ThreadPoolExecutor(1)
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        for shard in shards:
            result = _finished(folder, shard)
            if result is not None:
                yield shard, result, True
                continue
            while len(pending) >= 2 * workers:
                yield from collect()
            pending[pool.submit(tokenise, shard)] = shard
        while pending:
            yield from collect()
    except BrokenProcessPool as error:
        raise DataError(
            f"{folder}: a tokenising process died, perhaps for want of memory. Repeat the command with fewer "
            "--workers: finished work is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let no worker outlive a killed parent: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _join(output: Path, folder: Path, results: Sequence[ShardResult], tokenizer: Tokenizer, settings: str) -> Metadata:
    if not sum(result.documents for result in results):
        raise DataError(f"{output}: the input holds no document with text. Check --input, --glob and --json-key")
    with IndexedWriter(output, token_dtype(tokenizer.vocab_size)) as writer:
        for number in range(len(results)):
            writer.add_corpus(folder / f"{number:08d}")
        Metadata.path(output).unlink(missing_ok=True)
    copy = save_tokenizer(tokenizer.path, f"{output}.tokenizer")
    metadata = Metadata(
        tokenizer=str(copy.relative_to(output.parent)), tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.eod_id, tokens=writer.n_tokens, documents=writer.n_documents,
        max_token_id=max(result.max_token_id for result in results),
        skipped=sum(result.skipped for result in results), settings=settings,
    )  # fmt: skip
    metadata.write(output)
    return metadata
