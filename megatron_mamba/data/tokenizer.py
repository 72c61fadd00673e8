"""Text to token ids and back: SentencePiece models and Hugging Face tokenizers behind one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megatron_mamba.data.indexed import DataError, atomic_write
from megatron_mamba.files import read_object

_END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<EOD>")
_BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>")


class Tokenizer(Protocol):
    """What the project needs of a tokenizer. Special tokens are never read from text, and decode to nothing."""

    path: Path
    """The file that defines the ids (tokenizer.model or tokenizer.json)."""
    sha256: str
    """Digest of that file."""
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    @property
    def eod_id(self) -> int:
        """Id that closes every document (the end-of-sequence token); :class:`DataError` if there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""


class _TokenizerFile:
    """What both kinds share."""

    eos_id: int | None

    def __init__(self, path: Path) -> None:
        self.path, self.sha256 = path, hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def eod_id(self) -> int:
        if self.eos_id is None:
            raise DataError(
                f"{self.path}: has no end-of-sequence token to end documents with. Use a tokenizer with one "
                "(SentencePiece: eos_id; Hugging Face: eos_token in tokenizer_config.json)"
            )
        return self.eos_id


class SentencePieceTokenizer(_TokenizerFile):
    """A SentencePiece .model.

    Models made by :func:`train_tokenizer` are lossless but for U+2581, SentencePiece's own sign for a space, which
    decodes to a space.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise DataError(
                f"{path}: not a SentencePiece model, or damaged ({error}). Copy it again or train one with tools/train_tokenizer.py"
            ) from error
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer(_TokenizerFile):
    """A tokenizer.json; bos and eos are those of the tokenizer_config.json beside it, or else the usual names."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{path}: needs the tokenizers package. Install megatron-mamba[hf]") from error
        super().__init__(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise DataError(f"{path}: not a Hugging Face tokenizer.json, or damaged ({error}). Copy it again") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        config_path = path.with_name("tokenizer_config.json")
        config = read_object(config_path, DataError, "Copy it again") if config_path.is_file() else {}
        self.bos_id = self._special(config.get("bos_token"), _BEGIN_TOKENS, ids)
        self.eos_id = self._special(config.get("eos_token"), _END_TOKENS, ids)

    @staticmethod
    def _special(declared: Any, usual: Iterable[str], ids: dict[str, int]) -> int | None:
        name = declared.get("content") if isinstance(declared, dict) else declared
        if name is not None:
            return ids.get(name) if isinstance(name, str) else None
        return next((ids[name] for name in usual if name in ids), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def find_tokenizer(path: str | Path) -> Path:
    """The file that `path` means: itself, or the tokenizer.json (else tokenizer.model) in a folder; :class:`DataError`."""
    path = Path(path)
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(f"{path}: no tokenizer there. Give a SentencePiece .model, a tokenizer.json or a folder that holds one")


def tokenizer_sha256(path: str | Path) -> str:
    """Digest by which a tokenizer is told from another, without loading it."""
    return hashlib.sha256(find_tokenizer(path).read_bytes()).hexdigest()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece .model, a tokenizer.json, or the folder of either (tokenizer.json first).

    Raises :class:`DataError` for a file that is missing or damaged.
    """
    found = find_tokenizer(path)
    return HuggingFaceTokenizer(found) if found.suffix == ".json" else SentencePieceTokenizer(found)


def save_tokenizer(path: str | Path, folder: str | Path) -> Path:
    """Copy the tokenizer at `path` into `folder` (a checkpoint, for instance); returns the copy, for :func:`load_tokenizer`.

    Raises :class:`DataError` if it cannot be written; a copy that is there stays.
    """
    source, folder = find_tokenizer(path), Path(folder)
    target = folder / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model")
    folder.mkdir(parents=True, exist_ok=True)
    copies = {source: target}
    config = source.with_name("tokenizer_config.json")
    if source.suffix == ".json" and config.is_file():
        copies[config] = folder / config.name
    for original, copy in copies.items():
        content = original.read_bytes()
        if copy.exists() and copy.read_bytes() == content:
            continue
        try:
            with atomic_write(copy) as file:
                file.write(content)
        except OSError as error:
            raise DataError(f"{copy} cannot be written: {error.strerror or error}. Free space, or choose another folder") from error
    return target
