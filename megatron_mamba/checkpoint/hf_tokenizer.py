"""Tokenizers for exported folders: SentencePiece rebuilt as tokenizer.json with equal ids, Hugging Face ones copied.

transformers' own conversions of a SentencePiece model change ids (they drop or repeat the dummy prefix), so the pipeline
is built here piece by piece. Every export compares the ids that transformers gives with training's before anything is kept.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_mamba.checkpoint.hf_classes import HFExportError, needed
from megatron_mamba.data.tokenizer import Tokenizer, declared_settings, load_tokenizer, save_tokenizer, token_text
from megatron_mamba.files import one_line

_SPACE = "\u2581"
"""SentencePiece's visible space."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Types of pieces in a SentencePiece model (sentencepiece_model.proto)."""
NASTY = (
    "", " ", "  ", "\n", "\n\n\n", "\t", "\r\n", " a", "a ", "  a  b   c    ", "\na", "a\n", "a\n b\n\tc\n\n",
    "\t\tif x:\n\t\t\treturn\n", f"{_SPACE}a", f"a{_SPACE}{_SPACE}b", f"{_SPACE}", f" {_SPACE} ", "a\u00a0b", "a\u3000b",
    "\u200b", "\ufeffa", "\x00", "a\x00\x01\x7f", "caf\u00e9 cafe\u0301", "\u0130\u0131\u00df\ufb01",
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b \uff76\uff9e", "\ud55c\uad6d\uc5b4 \uc2dc",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a", "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "\U00020000\ue000", "1234567890 3.14159e-10 0x1F", "don't I'll we've", "a" * 300, " " * 100, "ab" * 200,
    "!?.,;:'\"()[]{}<>/\\|@#$%^&*-_=+~`", "<0x41> <0x0A>", "http://a.b/c?d=e&f=%20#g", "x=y;z\n" * 20,
)  # fmt: skip
"""Texts on which conversions are known to go wrong."""


def write_tokenizer(
    path: Path | str, folder: Path, max_length: int, vocab_size: int, *, own_bos: bool = False
) -> dict[str, int | None]:
    """Write the tokenizer at `path` (SentencePiece .model, tokenizer.json, or a folder of either) into a model folder.

    Documents follow an end-of-sequence token in training, so that is what bos becomes, and no text gets special tokens of its
    own; unless `own_bos`: the model was trained elsewhere, and all that stays as it was. A tokenizer without a pad token gets
    one, and pads on the left if it does not say where. Returns bos_token_id, eos_token_id and pad_token_id. Raises DataError
    for a missing or damaged file, and :class:`HFExportError` for one with more than `vocab_size` ids.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise HFExportError(f"tokenizer = {tokenizer.path}: has {tokenizer.vocab_size} ids, but model.vocab_size = {vocab_size}. "
                            "Give the tokenizer that the model was trained with")  # fmt: skip
    write = _copy if tokenizer.path.suffix == ".json" else _rebuild
    settings = write(tokenizer.path, folder)
    written = needed("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": _pad_id(settings, written, tokenizer.eos_id)}
    if not own_bos:
        ids["bos"] = tokenizer.eos_id
        if written.num_special_tokens_to_add(is_pair=False):
            _add_no_special_tokens(folder / "tokenizer.json")
    for name, i in ids.items():
        token = None if i is None else written.id_to_token(i)
        if token is None:
            settings.pop(f"{name}_token", None)
        elif token_text(settings.get(f"{name}_token")) != token:
            settings[f"{name}_token"] = token
    # Any other class, or none, makes transformers rebuild the pipeline from the vocabulary with other rules.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("model_max_length", max_length)
    settings.setdefault("clean_up_tokenization_spaces", False)
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    settings.setdefault("padding_side", "left")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {f"{name}_token_id": i for name, i in ids.items()}


def _pad_id(settings: Mapping[str, Any], written: Any, eos_id: int | None) -> int | None:
    """The tokenizer's own; else the unknown token if byte fallback keeps it out of every text; else eos."""
    declared, unknown = (token_text(settings.get(f"{name}_token")) for name in ("pad", "unk"))
    if declared is not None and (own := written.token_to_id(declared)) is not None:
        return int(own)
    unused = None if unknown is None or not getattr(written.model, "byte_fallback", False) else written.token_to_id(unknown)
    return eos_id if unused is None else int(unused)


def _copy(source: Path, folder: Path) -> dict[str, Any]:
    """Copy a Hugging Face tokenizer as it is; returns its settings, special_tokens_map.json among them."""
    save_tokenizer(source, folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    return declared_settings(source.parent)


def _add_no_special_tokens(path: Path) -> None:
    """Take out of a tokenizer.json what puts bos and eos around a text: training's documents had none of it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["post_processor"] = None
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _rebuild(source: Path, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json of a SentencePiece model; returns its special tokens."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    convert(_parse(source)).save(str(folder / "tokenizer.json"))
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    return {f"{name}_token": processor.id_to_piece(i) for name, i in ids.items() if i >= 0}


def check_tokenizer(path: Path | str, folder: Path, vocab_size: int, *, own_bos: bool = False) -> int:
    """Compare the ids that transformers gives for texts, with the tokenizer of `folder`, with those of training's at `path`.

    `own_bos`: as in :func:`write_tokenizer`; the special tokens that it adds are then left out. Returns how many texts were
    compared. Raises :class:`HFExportError` naming a text whose ids differ, or for ids that the model does not have.
    """
    tokenizer = load_tokenizer(path)
    transformers = needed("transformers")
    try:
        exported = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # for settings that it does not take
        raise HFExportError(
            f"tokenizer = {tokenizer.path}: transformers {transformers.__version__} cannot read it with the settings beside it: "
            f"{one_line(error)}"
        ) from error
    if (highest := max(exported.get_vocab().values())) >= vocab_size:
        raise HFExportError(
            f"tokenizer = {tokenizer.path}: the files beside it declare tokens that it lacks, and transformers gives them ids up "
            f"to {highest}, but model.vocab_size = {vocab_size}. Take those tokens out of tokenizer_config.json"
        )
    added = exported.added_tokens_decoder.values()
    # Text with a literal special token is the one known difference: training never parses it.
    special, symbols = ([str(token) for token in added if token.special is kind] for kind in (True, False))
    compared = 0
    for text in check_texts(symbols):
        if not any(token in text for token in special):
            _check(tokenizer, text, exported(text, add_special_tokens=not own_bos, verbose=False)["input_ids"])
            compared += 1
    return compared


def _check(tokenizer: Tokenizer, text: str, found: list[int]) -> None:
    wanted = tokenizer.encode(text)
    if wanted == found:
        return
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found)))
    shown = text if len(text) <= 80 else tokenizer.decode(wanted[max(at - 4, 0) : at + 4])
    remedy = "" if tokenizer.path.suffix == ".json" else (
        " A BPE model with identity normalisation converts exactly (tools/train_tokenizer.py makes such ones)."
    )  # fmt: skip
    raise HFExportError(
        f"tokenizer = {tokenizer.path}: {shown!r} has the ids {wanted[at : at + 4]} in training but {found[at : at + 4]} with "
        f"transformers (from the first difference on).{remedy} The model itself can be exported without a tokenizer: --no-tokenizer"
    )


def check_texts(symbols: list[str]) -> Iterator[str]:
    """Nasty strings, the user-defined `symbols` in context, and real text (the Python library's source)."""
    yield from NASTY
    for symbol in symbols[:50]:
        yield from (f"a{symbol}b", f"{symbol}a {symbol}", f" {symbol} ", f"{symbol}{symbol}\n")
        yield f"x {symbol}{symbols[-1]}{symbols[0]}"
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        text = path.read_text(encoding="utf-8", errors="replace")[:20_000]
        yield text
        yield from text.splitlines(keepends=True)[:50]


# --------------------------------------------------------------------------------------------------------- conversion


def convert(model: Any) -> Any:
    """`tokenizers.Tokenizer` with the ids of a SentencePiece `ModelProto` (BPE or unigram; no post-processor, so no BOS).

    User-defined symbols are vocabulary entries without merges (one character, BPE) or added tokens matched in the
    normalised text. With a dummy prefix, a text that is one user-defined symbol of several characters and nothing else
    lacks the prefix. Raises :class:`HFExportError` for other kinds of models.
    """
    tokenizers = needed("tokenizers")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kind = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}.get(trainer.model_type, "unknown")
    if kind not in ("unigram", "bpe") or trainer.treat_whitespace_as_suffix or model.denormalizer_spec.precompiled_charsmap:
        raise HFExportError(f"a SentencePiece model of type {kind}, with spaces as suffixes or with a denormaliser cannot be "
                            "converted. BPE and unigram models with the usual settings can")  # fmt: skip
    if kind == "bpe":
        core = _bpe(tokenizers, model)
    else:
        # sentencepiece never matches the other types in text; so low a score keeps them from being chosen.
        never = min(piece.score for piece in model.pieces if piece.type == _NORMAL) - 1000.0
        vocab = [(piece.piece, piece.score if piece.type == _NORMAL else never) for piece in model.pieces]
        core = tokenizers.models.Unigram(vocab, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    # Spaces have become _SPACE before symbols are matched, so a symbol with a plain space in it never occurs.
    symbols = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED and " " not in piece.piece]
    if kind == "bpe":
        symbols = [symbol for symbol in symbols if len(symbol) > 1]
    result = tokenizers.Tokenizer(core)
    steps = _normalizers(tokenizers.normalizers, tokenizers.Regex, normalizer, symbols)
    result.normalizer = tokenizers.normalizers.Sequence(steps)
    decoders = tokenizers.decoders
    tail = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    result.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    added = tokenizers.AddedToken
    result.add_tokens([added(symbol, special=False, normalized=True) for symbol in symbols])
    special = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    result.add_special_tokens([added(token, special=True, normalized=False) for token in special])
    return result


def _bpe(tokenizers: Any, model: Any) -> Any:
    """SentencePiece merges the adjacent pair whose joined piece scores highest; ranks of (left, right) pairs say the same."""
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocab[piece], cut, left, right))
    merges.sort()
    unknown = next((piece.piece for piece in model.pieces if piece.type == _UNKNOWN), None)
    return tokenizers.models.BPE(
        vocab, [(left, right) for *_, left, right in merges], unk_token=unknown, fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )  # fmt: skip


def _normalizers(library: Any, regex: Any, spec: Any, symbols: list[str]) -> list[Any]:
    steps = []
    if spec.precompiled_charsmap:
        steps.append(library.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [library.Strip(left=True, right=True), library.Replace(regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and symbols:
        # An added token's own text passes through the normaliser too, and must come out without the prefix.
        exact = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(library.Replace(regex(rf"\A(?!(?:{exact})\z)"), _SPACE))
    elif spec.add_dummy_prefix:
        steps.append(library.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(library.Replace(" ", _SPACE))
    return steps


def _parse(source: Path) -> Any:
    model = needed("sentencepiece.sentencepiece_model_pb2", package="protobuf").ModelProto()
    model.ParseFromString(source.read_bytes())
    return model
