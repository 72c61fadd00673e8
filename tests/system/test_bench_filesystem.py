"""tools/bench_filesystem.py: what is counted is what happened, and an index is built by one rank of those that need it."""

from pathlib import Path

import pytest

import bench_filesystem
from bench_filesystem import make_corpus, operations, start
from megatron_mamba.data.indexed import IndexedReader
from megatron_mamba.data.packing import CACHED_FROM

TOKENS = 1100 * CACHED_FROM
"""Documents enough for an index in a file."""
TINY = ["model=hybrid_tiny", "model.pattern=M-", "data.seq_length=32", "trainer.device=cpu", "trainer.health_check=false"]


@pytest.mark.slow
def test_one_of_two_ranks_builds_the_index_and_then_none(tmp_path: Path) -> None:
    folder, prefix = tmp_path / "run", tmp_path / "data" / "corpus"
    folder.mkdir()
    make_corpus(prefix, TOKENS)
    cold = start(2, folder, prefix, TINY, traced=False)
    warm = start(2, folder, prefix, TINY, traced=False)
    assert sorted(rank["built"] for rank in cold) == [0, 1]
    assert [rank["built"] for rank in warm] == [0, 0]
    for rank in (*cold, *warm):
        assert 0 < rank["corpus open"] < rank["model built"] < rank["index ready"] < rank["first step"]
        assert rank["counts"]["tokens: opens"] == 1
        assert rank["counts"]["index: mapped, bytes"] > 0
    assert [rank["counts"]["index: opens"] for rank in warm] == [2, 2]  # PREFIX.idx and the epoch's index
    assert [rank["counts"]["run folder: opens"] > 0 for rank in warm] == [True, False]


def test_corpus_has_the_tokens_asked_for_and_takes_no_room(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", 10**8)
    reader = IndexedReader(tmp_path / "corpus")
    reader.check()
    assert 10**8 - 2000 < reader.n_tokens <= 10**8
    assert abs(reader.n_tokens / reader.n_documents - 1000) < 10
    assert (tmp_path / "corpus.bin").stat().st_blocks * 512 < 10**6


TRACE = """\
7 execve("/usr/bin/python", ["python"], 0x7 /* 3 vars */) = 0
7 openat(AT_FDCWD</home>, "/data/corpus.idx", O_RDONLY|O_CLOEXEC) = 3</data/corpus.idx>
7 read(3</data/corpus.idx>, ""..., 4096) = 42
7 newfstatat(3</data/corpus.idx>, "", {st_mode=S_IFREG|0644, st_size=42, ...}, AT_EMPTY_PATH) = 0
7 openat(AT_FDCWD</home>, "/run/cache/a.npy", O_RDONLY|O_CLOEXEC) = -1 ENOENT (No such file or directory)
7 pread64(4</data/corpus.bin>,  <unfinished ...>
8 read(5<socket:[33]>, ""..., 512) = 512
8 openat(AT_FDCWD</run>, "run/metrics.jsonl", O_WRONLY|O_CREAT, 0666) = 6</run/run/metrics.jsonl>
7 <... pread64 resumed>""..., 514, 0) = 514
8 write(6</run/run/metrics.jsonl>, ""..., 100) = 100
8 --- SIGCHLD {si_signo=SIGCHLD} ---
7 newfstatat(AT_FDCWD</home>, "/first-step", 0x7ffd, 0) = -1 ENOENT (No such file or directory)
7 openat(AT_FDCWD</home>, "/data/corpus.idx", O_RDONLY|O_CLOEXEC) = 3</data/corpus.idx>
"""


def test_operations_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(TRACE)
    assert operations(tmp_path / "trace", Path("/run"), Path("/data/corpus")) == {
        "the rest: stats and other look-ups": 1,
        "index: opens": 2, "index: reads": 1, "index: bytes read": 42, "index: stats and other look-ups": 1,
        "tokens: reads": 1, "tokens: bytes read": 514,
        "run folder: opens": 1, "run folder: writes": 1, "run folder: bytes written": 100,
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [["--processes", "0"], ["--tokens", "100"]])
def test_arguments_that_cannot_work(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_filesystem.main(arguments) == 2
    assert f"error: {arguments[0]} = " in capsys.readouterr().err
