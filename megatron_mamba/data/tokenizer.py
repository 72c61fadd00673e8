"""Text to token ids and back: SentencePiece models and Hugging Face tokenizers behind one interface."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megatron_mamba.data.indexed import DataError, atomic_write
from megatron_mamba.files import read_object, reason

_SETTINGS, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_BESIDE = (_SETTINGS, _SPECIAL, "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")
"""What belongs to a tokenizer.json in the same folder."""
_READ = ("tokenizer.json", "tokenizer.model")
_NOT_READ = {
    "tekken.json": "Mistral's tekken format",
    "*.tiktoken": "tiktoken's format",
    "vocab.json": "the format of transformers' old tokenizers",
}
_TEKKEN_KEYS = {"vocab", "config"}
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
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

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.sha256 = path, hashlib.sha256(content).hexdigest()

    @property
    def eod_id(self) -> int:
        if self.eos_id is None:
            raise DataError(
                f"{self.path}: has no end-of-sequence token to end documents with. Use a tokenizer with one "
                "(SentencePiece: eos_id; Hugging Face: eos_token in tokenizer_config.json, which is not guessed where several fit)"
            )
        return self.eos_id


class SentencePieceTokenizer(_TokenizerFile):
    """A SentencePiece .model.

    Models made by :func:`train_tokenizer` are lossless but for U+2581, SentencePiece's own sign for a space, which
    decodes to a space.
    """

    def __init__(self, path: Path) -> None:
        content = _content(path)
        super().__init__(path, content)
        if _TIKTOKEN_LINE.match(content):
            raise _not_read(path, _NOT_READ["*.tiktoken"])
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError(
                f"{path}: not a SentencePiece model, or damaged ({error}). Copy it again or train one with tools/train_tokenizer.py"
            ) from error
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)
        # Beside a file of that name lie the settings of the same tokenizer; another one's folder has other names.
        declared = token_text(declared_settings(path.parent).get("eos_token")) if path.name == "tokenizer.model" else None
        if declared is not None and (eos < 0 or self._processor.id_to_piece(eos) != declared):
            own = repr(self._processor.id_to_piece(eos)) if eos >= 0 else "none"
            raise DataError(
                f"{path}: its end-of-sequence token is {own}, but the settings beside it say eos_token = {declared!r}. Give a "
                "tokenizer.json, which holds tokens added to a SentencePiece model, or move the .model away from those settings"
            )

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer(_TokenizerFile):
    """A tokenizer.json; bos and eos are those that the files beside it declare, or else the one usual name it has."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{path}: needs the tokenizers package. Install megatron-mamba[hf]") from error
        super().__init__(path, _content(path))
        content = read_object(path, DataError, "Copy it again")
        if content.keys() >= _TEKKEN_KEYS and isinstance(content["vocab"], list):
            raise _not_read(path, _NOT_READ["tekken.json"])
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise DataError(f"{path}: not a Hugging Face tokenizer.json, or damaged ({error}). Copy it again") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        declared = declared_settings(path.parent)
        self.bos_id = self._special(declared.get("bos_token"), _BEGIN_TOKENS, ids)
        self.eos_id = self._special(declared.get("eos_token"), _END_TOKENS, ids)

    @staticmethod
    def _special(declared: Any, usual: Iterable[str], ids: dict[str, int]) -> int | None:
        name = token_text(declared)
        if name is not None:
            return ids.get(name)
        found = [ids[name] for name in usual if name in ids]
        return found[0] if len(found) == 1 else None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}). Let it be read, or copy it again") from error


def token_text(declared: Any) -> str | None:
    """The text of a token as Hugging Face's settings declare it: plain, or with its properties; None if it is not declared."""
    text = declared.get("content") if isinstance(declared, dict) else declared
    return text if isinstance(text, str) else None


def declared_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of `folder`, with what special_tokens_map.json adds; {} where there is neither. :class:`DataError`.

    As in transformers, the second file's tokens come first, unless tokenizer_config.json lists the added tokens itself.
    """
    settings, tokens = (
        read_object(path, DataError, "Copy it again") if path.is_file() else {} for path in (folder / _SETTINGS, folder / _SPECIAL)
    )
    return settings if "added_tokens_decoder" in settings else settings | tokens


def _not_read(path: Path, name: str) -> DataError:
    return DataError(
        f"{path}: is in {name}, which is not read here. Give the same tokenizer as a tokenizer.json (the save_pretrained of "
        "transformers writes one for most) or a SentencePiece .model"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer, also one in a format that is not read here."""
    return any(path for pattern in (*_READ, *_NOT_READ) for path in folder.glob(pattern))


def find_tokenizer(path: str | Path) -> Path:
    """The file that `path` means: itself, or the tokenizer.json (else tokenizer.model) in a folder; :class:`DataError`."""
    path = Path(path)
    candidates = [path / name for name in _READ] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    for pattern, name in _NOT_READ.items():
        if found := sorted(path.glob(pattern)):
            raise _not_read(found[0], name)
    raise DataError(f"{path}: no tokenizer there. Give a SentencePiece .model, a tokenizer.json or a folder that holds one")


def tokenizer_sha256(path: str | Path) -> str:
    """Digest by which a tokenizer is told from another, without loading it."""
    return hashlib.sha256(_content(find_tokenizer(path))).hexdigest()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece .model, a tokenizer.json, or the folder of either (tokenizer.json first).

    Raises :class:`DataError` for a file that is missing, damaged or in another format.
    """
    found = find_tokenizer(path)
    return HuggingFaceTokenizer(found) if found.suffix == ".json" else SentencePieceTokenizer(found)


def saved_name(path: str | Path) -> str:
    """Name of the file that :func:`save_tokenizer` makes of the tokenizer at `path`."""
    return "tokenizer.json" if find_tokenizer(path).suffix == ".json" else "tokenizer.model"


def save_tokenizer(path: str | Path, folder: str | Path) -> Path:
    """Copy the tokenizer at `path` into `folder`, which is kept for it; returns the copy, for :func:`load_tokenizer`.

    What belongs to a tokenizer.json comes along, and what is left of another tokenizer goes. Each file appears as a whole. Raises
    :class:`DataError` if it cannot be written; what is there already stays as it is.
    """
    source, folder = find_tokenizer(path), Path(folder)
    target = folder / saved_name(source)
    if target.exists() and target.samefile(source):
        return target
    beside = {name: source.with_name(name) for name in _BESIDE if source.suffix == ".json"}
    for name in ("tokenizer.json", *_BESIDE):
        copy, original = folder / name, source if name == target.name else beside.get(name)
        content = _content(original) if original is not None and original.is_file() else None
        try:
            if content is None:
                copy.unlink(missing_ok=True)
            elif not copy.exists() or copy.read_bytes() != content:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(copy) as file:
                    file.write(content)
        except OSError as error:
            raise DataError(f"{copy} cannot be written: {reason(error)}. Free space, or choose another folder") from error
    return target
