"""Text to an indexed corpus by several processes: resumable, and byte-identical however it was interrupted or spread.

The input is cut into shards by its bytes alone. Each is tokenised into PREFIX.shards/NUMBER.bin, .idx and, last, .json,
which says what the shard was made from and that it is finished; at the end the shards are joined in order.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mamba.data.indexed import (
    DataError,
    IndexedWriter,
    Metadata,
    atomic_write,
    bin_path,
    idx_path,
    token_dtype,
)
from megatron_mamba.data.inputs import TEXT_GLOBS, find_files
from megatron_mamba.data.sources import MAX_LINE_BYTES, Shard, iterate_shards, read_documents
from megatron_mamba.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from megatron_mamba.files import lock
from megatron_mamba.progress import Progress

log = logging.getLogger(__name__)

_FORMAT = 2
_SMALLEST_SHARD, _LARGEST_SHARD = 1 << 18, 1 << 25


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard."""

    documents: int
    tokens: int
    max_token_id: int
    skipped: int


@dataclass(frozen=True)
class Job:
    """What tokenising a shard needs to know besides the shard."""

    folder: Path
    """Where finished shards lie."""
    tokenizer: Path
    json_key: str
    skip_bad: bool
    max_line_bytes: int

    def finished(self, shard: Shard, made_from: str) -> ShardResult | None:
        """What an earlier call made of `shard`, if this one would make the same of it."""
        try:
            record = json.loads((self.folder / f"{shard.number:08d}.json").read_bytes())
            result = ShardResult(**record["result"])
            same_bad = not result.skipped or (self.skip_bad and record["max_line_bytes"] == self.max_line_bytes)
            return result if record["made_from"] == made_from and same_bad else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def prepare(
    inputs: Iterable[str | Path], tokenizer: str | Path, output: str | Path, *, workers: int = 1,
    globs: Sequence[str] = TEXT_GLOBS, json_key: str = "text", skip_bad: bool = False, overwrite: bool = False,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Metadata:  # fmt: skip
    """Tokenise `inputs` into PREFIX.bin, .idx, .json and a copy of the tokenizer in PREFIX.tokenizer; PREFIX is `output`.

    Every document ends with the tokenizer's end-of-document id; documents without text are left out. A call repeated after
    an interruption or a bad document goes on where it was; repeated after the end, it does nothing. Raises :class:`DataError`
    for unreadable input (file and line named), if another process is making PREFIX, or if PREFIX exists from other inputs or
    options and `overwrite` is False.
    """
    output = Path(output)
    files = find_files(inputs, globs, json_key)
    total = sum(file.stat().st_size for file in files)
    loaded = load_tokenizer(tokenizer)
    stamps = {f: (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files}
    work = _digest([stamps[file][0] for file in files], loaded.sha256, loaded.eod_id)
    settings = _digest(work, [stamps[file] for file in files], json_key, skip_bad and max_line_bytes)
    job = Job(Path(f"{output}.shards"), loaded.path, json_key, skip_bad, max_line_bytes)

    def made_from(shard: Shard) -> str:
        """Digest of all that decides a shard's tokens but the tokenizer, as long as no line is bad."""
        lines = shard.span is not None or shard.lines is not None
        place = (shard.span, shard.first_line, len(shard.lines or b""))
        return _digest([stamps[file] for file in shard.files], json_key if lines else None, place)

    try:
        with _alone(output):
            finished = _claim(output, job.folder, work, settings, overwrite)
            if finished is not None:
                return finished
            shards = iterate_shards(files, min(max(total // 64, _SMALLEST_SHARD), _LARGEST_SHARD), max_line_bytes)
            results: list[ShardResult] = []
            with Progress(total, "Tokenising", "B") as progress:
                for shard, result, resumed in _run(shards, job, made_from, workers):
                    results.append(result)
                    if resumed:
                        progress.skip(shard.size)
                    else:
                        progress.update(shard.size, documents=sum(r.documents for r in results))
            metadata = _join(output, job.folder, results, loaded, settings)
            _remove(job.folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(f"{output}: no room left on the disk. Make room and repeat the command: finished work is kept") from error
    return metadata


def tokenise_shard(shard: Shard, job: Job, made_from: str) -> ShardResult:
    """Write one shard's tokens into the job's folder; the same files whoever does it, and whenever.

    `made_from`: digest of what the shard comes from, by which a later call knows it again.
    """
    loaded = _load_once(job.tokenizer)
    skipped = 0
    name = job.folder / f"{shard.number:08d}"
    record = name.with_name(f"{name.name}.json")
    record.unlink(missing_ok=True)
    with IndexedWriter(name, token_dtype(loaded.vocab_size)) as writer:
        for text in read_documents(shard, job.json_key, job.skip_bad, job.max_line_bytes):
            if text is None:
                skipped += 1
            elif ids := loaded.encode(text):
                writer.add_document([*ids, loaded.eod_id])
    result = ShardResult(writer.n_documents, writer.n_tokens, writer.max_token_id, skipped)
    known = {"made_from": made_from, "max_line_bytes": job.max_line_bytes, "result": asdict(result)}
    with atomic_write(record) as file:
        file.write(json.dumps(known).encode())
    return result


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((_FORMAT, *parts)).encode()).hexdigest()


@functools.lru_cache(1)
def _load_once(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other processes, of whatever node, from making PREFIX: a lock on PREFIX.lock, which a process that dies gives back."""
    path = Path(f"{output}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "ab+"))
            held = lock(file)
            if held is False:
                file.seek(0)
                owner = file.read(200).decode(errors="replace")
                raise DataError(f"{output}: is being made by another process ({owner}). Wait for it, or choose another --output")
            if held is None:
                log.warning("%s: the file system has no locks: let no second command write the same output", path)
            # Another process may have removed the file, done, between its opening here and the lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        stack.callback(path.unlink, missing_ok=True)
        yield


def _claim(output: Path, folder: Path, work: str, settings: str, overwrite: bool) -> Metadata | None:
    """Make `folder` ready for shards of `work` (input paths and tokenizer); returns the corpus' record if it is finished already
    with these `settings`. Single shards know what they were made from."""
    stamp = folder / "work"
    if folder.exists() and not (stamp.exists() and stamp.read_text() == work):
        n_finished = len(list(folder.glob("*.json")))
        if n_finished and not overwrite:
            raise DataError(
                f"{folder}: holds {n_finished} finished parts from other inputs or another tokenizer. Repeat that command, or "
                "start afresh with --overwrite"
            )
        _remove(folder)
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
            file.write(work.encode())
    for path in (idx_path(output), bin_path(output), Metadata.path(output)):
        for stale in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
            stale.unlink()
    return None


def _remove(folder: Path) -> None:
    """Delete the shards, also where the folder is a link to a disk with more room."""
    shutil.rmtree(folder.resolve())
    folder.unlink(missing_ok=True)


def _run(
    shards: Iterator[Shard], job: Job, made_from: Callable[[Shard], str], workers: int
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
            digest = made_from(shard)
            result = job.finished(shard, digest)
            if result is not None:
                yield shard, result, True
                continue
            while len(pending) >= 2 * workers:
                yield from collect()
            pending[pool.submit(tokenise_shard, shard, job, digest)] = shard
        while pending:
            yield from collect()
    except BrokenProcessPool as error:
        raise DataError(
            f"{job.folder}: a tokenising process died, perhaps for want of memory. Repeat the command with fewer "
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
        shutil.rmtree(folder)
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
