"""Training a lossless SentencePiece BPE tokenizer on a sample of a corpus."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_mamba.data.indexed import DataError, atomic_write
from megatron_mamba.data.inputs import TEXT_GLOBS, find_files
from megatron_mamba.data.permutation import mix32
from megatron_mamba.data.sources import MAX_LINE_BYTES, Shard, iterate_shards, read_documents
from megatron_mamba.progress import Progress

_SHARD_BYTES = 1 << 18
_SENTENCE_LENGTH = 16384


def train_tokenizer(
    inputs: Iterable[str | Path], vocab_size: int, output: str | Path, *, globs: Sequence[str] = TEXT_GLOBS, json_key: str = "text",
    max_bytes: int = 256 << 20, character_coverage: float = 0.9995, skip_bad: bool = False,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Path:  # fmt: skip
    r"""Train on at most about `max_bytes` of `inputs`, sampled evenly, and write the .model file `output`.

    Ids: 0 <unk>, 1 <s>, 2 </s> (end of document), newline, tab, 256 bytes, then pieces. Lossless: text is not normalised, no
    space is added or removed, runs of spaces have pieces of their own, newline and tab are pieces nothing merges with, and
    rare characters fall back to bytes. Raises :class:`DataError` if the text cannot give `vocab_size` pieces.
    """
    files = find_files(inputs, globs, json_key)
    with Progress(sum(file.stat().st_size for file in files), "Reading", "B") as progress:
        sentences = [s for shard in sample(iterate_shards(files, _SHARD_BYTES, max_line_bytes), max_bytes, progress)
                     for text in read_documents(shard, json_key, skip_bad, max_line_bytes) if text
                     for s in _sentences(text)]  # fmt: skip
    if not sentences:
        raise DataError(f"{', '.join(map(str, files[:3]))}: no text to train a tokenizer on. Check --input, --glob and --json-key")
    model = io.BytesIO()
    try:
        with Progress(None, f"Training {vocab_size} pieces on {sum(map(len, sentences)) / 1e6:.1f} M characters"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                character_coverage=character_coverage, byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n", "\t"], max_sentence_length=4 * _SENTENCE_LENGTH,
                num_threads=min(16, os.cpu_count() or 1), minloglevel=2,
            )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        raise DataError(
            f"{output}: a vocabulary of {vocab_size} pieces cannot be trained on this text: {reason} "
            "Change --vocab-size, or give more text"
        ) from error
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(model.getvalue())
    return output


def sample(shards: Iterator[Shard], max_bytes: int, progress: Progress) -> list[Shard]:
    """Shards of at most `max_bytes` in all (but at least one), chosen by a hash of their numbers: evenly over the whole input."""
    kept: list[tuple[int, int, Shard]] = []
    limit = 1 << 32
    for shard in shards:
        progress.update(shard.size)
        draw = mix32(shard.number + 1)
        if draw < limit:
            kept.append((draw, shard.size if shard.lines is None else len(shard.lines), shard))
        while len(kept) > 1 and sum(size for _, size, _ in kept) > max_bytes:
            limit = max(draw for draw, _, _ in kept)
            kept = [entry for entry in kept if entry[0] < limit]
    return [shard for _, _, shard in kept]


def _sentences(text: str) -> Iterator[str]:
    """Pieces of at most _SENTENCE_LENGTH characters, cut at line ends where possible, without the NULs that training refuses."""
    start = 0
    text = text.replace("\0", "")
    while start < len(text):
        end = start + _SENTENCE_LENGTH
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
