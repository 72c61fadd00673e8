"""Text to training batches: tokenizers, Megatron-LM's indexed format, packing, blending, loading.

Importing the package does not import torch (the tokenising processes of tools/prepare_data.py need none);
:mod:`megatron_mamba.data.loader` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mamba.config import Config, ConfigError
from megatron_mamba.data.blend import BlendedDataset
from megatron_mamba.data.indexed import DataError, IndexedReader, Metadata
from megatron_mamba.data.packing import SPLITS, Dataset, PackedDataset, Sample, split_documents
from megatron_mamba.data.synthetic import SyntheticDataset
from megatron_mamba.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, save_tokenizer, tokenizer_sha256

__all__ = [
    "DataError", "Dataset", "Datasets", "IndexedReader", "Metadata", "Sample", "Tokenizer", "build_datasets", "load_tokenizer",
    "save_tokenizer",
]  # fmt: skip


@dataclass(frozen=True)
class Datasets:
    """What a run reads; a split whose share in data.split is 0 is None."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    tokenizer: Path | None
    """File of the tokenizer (data.tokenizer, or the one recorded with the corpus); None: nobody named one."""
    tokenizer_sha256: str | None


def build_datasets(config: Config) -> Datasets:
    """Open the corpora of `config.data` and check them against each other, the tokenizer and the model.

    Raises :class:`DataError` for damaged files, splits without a full sequence or another tokenizer than the corpus',
    and ConfigError for a model.vocab_size below the tokenizer's.
    """
    data = config.data
    if data.kind == "synthetic":
        synthetic = [
            SyntheticDataset(vocab_size=config.model.vocab_size, seq_length=data.seq_length, seed=data.seed, split=split)
            for split in SPLITS
        ]
        path = None if data.tokenizer is None else find_tokenizer(data.tokenizer)
        return Datasets(*synthetic, path, None if path is None else tokenizer_sha256(path))
    weights = {str(data.path): 1.0} if data.blend is None else data.blend
    readers = {prefix: IndexedReader(prefix) for prefix in weights}
    records = {prefix: _metadata(reader) for prefix, reader in readers.items()}
    tokenizer, sha256 = _check_tokenizer(config, {prefix: record for prefix, record in records.items() if record is not None})
    documents = {prefix: split_documents(reader, data.split) for prefix, reader in readers.items()}
    built: list[Dataset | None] = []
    for number, split in enumerate(SPLITS):
        if not data.split[number]:
            built.append(None)
            continue
        parts = [
            PackedDataset(reader, documents[prefix][number], split=split, seq_length=data.seq_length, seed=data.seed,
                          vocab_size=config.model.vocab_size, cache_dir=data.cache_dir)
            for prefix, reader in readers.items()
        ]  # fmt: skip
        built.append(parts[0] if len(parts) == 1 else BlendedDataset(parts, weights))
    train, valid, test = built
    assert train is not None
    return Datasets(train, valid, test, tokenizer, sha256)


def _metadata(reader: IndexedReader) -> Metadata | None:
    """PREFIX.json, if there is one, after checking that it belongs to the corpus."""
    record = Metadata.read(reader.prefix)
    if record is not None and (record.tokens, record.documents) != (reader.n_tokens, reader.n_documents):
        raise DataError(
            f"{Metadata.path(reader.prefix)}: records {record.tokens} tokens in {record.documents} documents, but the corpus has "
            f"{reader.n_tokens} in {reader.n_documents}: the record is of another corpus. Write the corpus again, or move it away"
        )
    return record


def _check_tokenizer(config: Config, records: dict[str, Metadata]) -> tuple[Path | None, str | None]:
    """The run's tokenizer and its digest, equal for all corpora and no larger than the model's vocabulary."""
    path, sha256, vocab_size = None, None, None
    owner = "data.tokenizer"
    if config.data.tokenizer is not None:
        path = find_tokenizer(config.data.tokenizer)
        sha256 = tokenizer_sha256(path)
        owner = f"data.tokenizer = {path}"
    for prefix, record in records.items():
        if sha256 is not None and record.tokenizer_sha256 != sha256:
            raise DataError(
                f"{prefix}: was tokenised with a tokenizer of sha256 {record.tokenizer_sha256} ({record.tokenizer}), but {owner} "
                f"has sha256 {sha256}. Use the corpus' own tokenizer, or tokenise the text again"
            )
        if sha256 is None:
            path, sha256 = find_tokenizer(record.tokenizer_path(prefix)), record.tokenizer_sha256
            owner = f"the tokenizer of {prefix}"
        vocab_size = max(record.vocab_size, record.max_token_id + 1)
    if path is not None and vocab_size is None:
        vocab_size = load_tokenizer(path).vocab_size
    if vocab_size is not None and config.model.vocab_size < vocab_size:
        raise ConfigError("model.vocab_size", config.model.vocab_size, f"{owner} has {vocab_size} ids",
                          f"Set model.vocab_size to {vocab_size} or more")
    return path, sha256
