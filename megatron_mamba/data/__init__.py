"""Text to training batches: tokenizers, Megatron-LM's indexed format, packing, blending, loading.

Importing the package does not import torch (the tokenising processes of tools/prepare_data.py need none);
:mod:`megatron_mamba.data.loader` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mamba.config import Config, ConfigError
from megatron_mamba.data.blend import BlendedDataset
from megatron_mamba.data.fingerprint import fingerprints
from megatron_mamba.data.indexed import DataError, IndexedReader, Metadata
from megatron_mamba.data.packing import SPLITS, Dataset, PackedDataset, Sample, split_documents
from megatron_mamba.data.standing import SYNTHETIC, Standing
from megatron_mamba.data.synthetic import SyntheticDataset
from megatron_mamba.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, saved_name, tokenizer_sha256

__all__ = [
    "DataError", "Dataset", "Datasets", "IndexedReader", "Metadata", "Sample", "Tokenizer", "build_datasets", "load_tokenizer",
    "save_tokenizer", "saved_name", "tokenizer_sha256",
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
    end_of_document: int | None
    """Id that closes every document, if a tokenizer is named and has one."""
    standing: Standing
    parts: Sequence[dict[str, Dataset]]
    """Of train, validation and test: the samples of each corpus; empty without a share."""

    def at(self, standing: Standing) -> Datasets:
        """The same corpora, blended in the order of `standing`, and those to train on read from where it says."""
        weights = standing.weights
        built = [BlendedDataset([part[prefix] for prefix in weights], weights) if part else None for part in self.parts]
        train = BlendedDataset([self.parts[0][prefix] for prefix in weights], weights, standing.since, standing.befores)
        return replace(self, train=train, valid=built[1], test=built[2], standing=standing)


def build_datasets(config: Config, identify: Callable[[Iterable[IndexedReader]], dict[str, str]] = fingerprints) -> Datasets:
    """Open the corpora of `config.data` and check them against each other, the tokenizer and the model.

    `identify` gives the fingerprints by prefix, by which checkpoints and the caches of indices know the corpora.
    Raises :class:`DataError` for damaged files, splits without a full sequence or another tokenizer than the corpus',
    and ConfigError for a model.vocab_size below the tokenizer's.
    """
    data = config.data
    tokenizer = None if data.tokenizer is None else load_tokenizer(data.tokenizer)
    standing = Standing.of_config(data)
    parts: list[dict[str, Dataset]] = []
    if data.kind == "synthetic":
        options = {"vocab_size": config.model.vocab_size, "seq_length": data.seq_length, "seed": data.seed}
        for split, share in zip(SPLITS, data.split, strict=True):
            parts.append({SYNTHETIC: SyntheticDataset(split=split, **options)} if share else {})
    else:
        readers = {prefix: IndexedReader(prefix) for prefix in standing.weights}
        tokenizer = _check_tokenizer(config, readers, tokenizer)
        standing = standing.filled(contents := identify(readers.values()))
        shares = {prefix: split_documents(reader, data.split, data.seq_length + 1) for prefix, reader in readers.items()}
        for number, split in enumerate(SPLITS):
            parts.append({
                prefix: PackedDataset(
                    reader, shares[prefix][number], split=split, seq_length=data.seq_length, seed=data.seed,
                    vocab_size=config.model.vocab_size, cache_dir=data.cache_dir, contents=contents[prefix],
                )
                for prefix, reader in readers.items() if data.split[number]
            })  # fmt: skip
    train, valid, test = (next(iter(part.values()), None) for part in parts)
    assert train is not None, "DataConfig.validate wants a positive share for training"
    path, sha256, end = (None, None, None) if tokenizer is None else (tokenizer.path, tokenizer.sha256, tokenizer.eos_id)
    return Datasets(train, valid, test, path, sha256, end, standing, parts).at(standing)


def _metadata(reader: IndexedReader) -> Metadata | None:
    """PREFIX.json, if there is one, after checking that it belongs to the corpus."""
    record = Metadata.read(reader.prefix)
    if record is not None and (record.tokens, record.documents) != (reader.n_tokens, reader.n_documents):
        raise DataError(
            f"{Metadata.path(reader.prefix)}: records {record.tokens} tokens in {record.documents} documents, but the corpus has "
            f"{reader.n_tokens} in {reader.n_documents}: the record is of another corpus. Write the corpus again, or move it away"
        )
    return record


def _check_tokenizer(config: Config, readers: dict[str, IndexedReader], tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The run's tokenizer (`tokenizer` if given): the one of all corpora, no larger than the model's vocabulary."""
    owner = "" if tokenizer is None else f"data.tokenizer = {tokenizer.path}"
    for prefix, reader in readers.items():
        record = _metadata(reader)
        if record is None:
            continue
        if tokenizer is None:
            tokenizer = load_tokenizer(record.tokenizer_path(prefix))
            owner = f"the tokenizer of {prefix}"
        remedy = "Use the corpus' own tokenizer, or tokenise the text again"
        if record.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"{prefix}: was tokenised with a tokenizer of sha256 {record.tokenizer_sha256} ({record.tokenizer}), but {owner} "
                f"has sha256 {tokenizer.sha256}. {remedy}"
            )
        if record.end_of_document != tokenizer.eos_id:
            raise DataError(
                f"{prefix}: its documents end with id {record.end_of_document}, but {owner} has {tokenizer.eos_id} as its "
                f"end-of-sequence token. {remedy}"
            )
    if tokenizer is not None and config.model.vocab_size < tokenizer.vocab_size:
        remedy = f"Set model.vocab_size to {tokenizer.vocab_size} or more"
        raise ConfigError("model.vocab_size", config.model.vocab_size, f"{owner} has {tokenizer.vocab_size} ids", remedy)
    return tokenizer
