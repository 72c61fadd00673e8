"""The command line of generation: ``python -m megatron_mamba.generate checkpoint=DIR prompt="..." [SETTING=VALUE ...]``."""

from __future__ import annotations

import dataclasses
import sys
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from megatron_mamba.checkpoint import CheckpointError, read_metadata, resolve, tokenizer_path
from megatron_mamba.config import ConfigError, ParallelConfig, PathText, from_dict, require
from megatron_mamba.data.indexed import DataError
from megatron_mamba.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mamba.generate import GenerationSettings, generate
from megatron_mamba.generate.loading import check_finite, load_model
from megatron_mamba.generate.sampling import NotFiniteError
from megatron_mamba.model import LanguageModel
from megatron_mamba.parallel.context import ParallelContext

USAGE = """usage: python -m megatron_mamba.generate checkpoint=DIR prompt="TEXT" [SETTING=VALUE ...]

  checkpoint      a run's folder, a folder of checkpoints, or one step_XXXXXXXX in it
  prompt          the text to continue (empty: a new document), or a list: prompt='["one", "two"]'
  prompts_file    instead of prompt: a UTF-8 file with one prompt a line
  batch_size      prompts continued at one time (32)
  max_new_tokens  (256)     temperature  (1.0; 0 = greedy)     top_k  (0 = all)     top_p  (1.0 = all)     seed  (1234)
  prefill_length  positions of the prompts computed at one time (2048)
  tokenizer       SentencePiece .model or Hugging Face folder (default: the one saved with the run)
  device          auto, cpu or cuda (auto)
  precision       bf16, fp32 or fp64 (default: the run's)

The text goes to standard output, everything else to standard error."""


@dataclass(frozen=True, kw_only=True)
class Arguments(GenerationSettings):
    """What the command line may set."""

    checkpoint: PathText
    prompt: str | None = None
    prompts_file: PathText | None = None
    batch_size: int = 32
    tokenizer: PathText | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp32", "fp64"] | None = None

    def validate(self) -> None:
        super().validate()
        require(self.batch_size > 0, "batch_size", self.batch_size, "must be positive", "Use 1 or more")
        require((self.prompt is None) != (self.prompts_file is None), "prompt", self.prompt,
                "give exactly one of prompt and prompts_file", 'For example prompt="Once upon a time"')  # fmt: skip
        require(self.device != "cuda" or torch.cuda.is_available(), "device", self.device, "no CUDA device is visible",
                "Use device=cpu, or auto")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Generate what the command line says; returns the exit code: 2 and one message on stderr if that cannot work."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(USAGE)
        return 0
    try:
        _run(parse(arguments))
    except (ConfigError, CheckpointError, DataError, NotFiniteError) as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    return 0


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line as checked settings. Raises :class:`ConfigError`."""
    hints = typing.get_type_hints(Arguments)
    data = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        require(bool(equals), "command line", argument, "is not SETTING=VALUE", 'For example prompt="Once upon a time"')
        require(key not in data, key, value, "is given twice", "Give it once")
        data[key] = _value(value, hints.get(key), key)
    parsed = from_dict(Arguments, data)
    parsed.validate()
    return parsed


def _value(text: str, hint: Any, key: str) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text == "null":
        return None
    for kind, name in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError as error:
                raise ConfigError(key, text, f"is not {name}", f"Write {key}={kind(1)}, for example") from error
    return text


def read_prompts(settings: Arguments) -> list[str]:
    """The prompts, in order. A `prompt` that is a quoted text or a list of quoted texts in YAML's notation is read as such;
    any other text is taken as it stands."""
    if settings.prompts_file is not None:
        try:
            lines = Path(settings.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            remedy = "Name a UTF-8 text file with one prompt a line"
            raise ConfigError("prompts_file", settings.prompts_file, f"cannot be read ({error})", remedy) from error
        require(bool(lines), "prompts_file", settings.prompts_file, "is empty", "Write one prompt a line")
        return lines
    text = settings.prompt or ""
    if text[:1] in ("'", '"') or text[:2] in ("['", '["'):
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        prompts = value if isinstance(value, list) else [value]
        if all(isinstance(prompt, str) for prompt in prompts):
            return prompts
    return [text]


def _run(settings: Arguments) -> None:
    prompts = read_prompts(settings)
    folder = resolve(settings.checkpoint)
    metadata = read_metadata(folder)
    tokenizer = load_tokenizer(_tokenizer_path(settings.tokenizer, metadata, folder))
    require(tokenizer.eos_id is not None or all(map(tokenizer.encode, prompts)), "prompt", "",
            f"is empty, and {tokenizer.path} has no end-of-sequence token for a new document to start from",
            "Give a text to continue")  # fmt: skip
    precision = settings.precision or metadata["config"].get("trainer", {}).get("precision", "fp32")
    context = ParallelContext.create(ParallelConfig(), settings.device)
    try:
        started = time.perf_counter()
        model, _ = load_model(folder, context, precision)
        check_finite(model, folder)
        require(tokenizer.vocab_size <= model.config.vocab_size, "tokenizer", str(tokenizer.path),
                f"has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
                "Name the tokenizer the model was trained with")  # fmt: skip
        _say(f"{model.config.name} from {folder} in {precision} on {context.device}: {time.perf_counter() - started:.1f} s")
        if len(prompts) == 1:
            _stream(model, tokenizer, prompts[0], settings)
        else:
            _batches(model, tokenizer, prompts, settings)
    finally:
        context.close()


def _tokenizer_path(given: str | None, metadata: dict[str, Any], folder: Path) -> str:
    found = given if given is not None else tokenizer_path(folder, metadata)
    if found is None:
        remedy = "Give tokenizer=PATH, the one the model was trained with"
        raise ConfigError("tokenizer", None, f"the checkpoint {folder} does not name one", remedy)
    return str(found)


def _stream(model: LanguageModel, tokenizer: Tokenizer, prompt: str, settings: Arguments) -> None:
    """Print the text of one prompt as it is made."""
    tokens = tokenizer.encode(prompt)
    text = TextStream(tokenizer.decode, tokens)
    clock = Clock()
    print(prompt, end="", flush=True)

    def show(row: int, token: int) -> None:
        clock.tick(row)
        print(text.add(token), end="", flush=True)

    generate(model, [tokens], settings, tokenizer.eos_id, show, vocab_size=tokenizer.vocab_size)
    print(text.rest(), flush=True)
    _say(f"{len(tokens)} prompt tokens; {clock.report()}")


def _batches(model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], settings: Arguments) -> None:
    """Print each prompt with its continuation, a batch at a time."""
    tokens, clock = [tokenizer.encode(prompt) for prompt in prompts], Clock()
    for first in range(0, len(prompts), settings.batch_size):
        clock.start()
        rows = tokens[first : first + settings.batch_size]
        # Another batch, other random numbers; the first prompt's are those it would have alone.
        batch = dataclasses.replace(settings, seed=settings.seed + first)
        tick, ids = (lambda row, token: clock.tick(row)), tokenizer.vocab_size
        results = generate(model, rows, batch, tokenizer.eos_id, tick, vocab_size=ids)
        for i, new in enumerate(results):
            text = TextStream(tokenizer.decode, rows[i])
            body = "".join(map(text.add, new)) + text.rest()
            print(f"=== {first + i + 1}/{len(prompts)} ===\n{prompts[first + i]}{body}", flush=True)
    _say(f"{sum(map(len, tokens))} prompt tokens; {clock.report()}")


class TextStream:
    """Tokens to text piece by piece; what is added to a prompt's tokens, without repeating the prompt.

    A token's text may depend on its neighbours (spaces, characters of several bytes), so a few tokens before it are
    decoded again each time, and text that ends in part of a character (of at most four bytes) waits for the rest of it.
    """

    CONTEXT, LONGEST = 6, 4

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode, self._tokens = decode, list(prompt)
        self._first, self._shown = max(len(prompt) - self.CONTEXT, 0), len(prompt)

    def add(self, token: int) -> str:
        """The text that `token` makes certain."""
        self._tokens.append(token)
        new = self._new()
        if new.endswith("\ufffd") and len(self._tokens) - self._shown < self.LONGEST:
            return ""
        self._first, self._shown = max(self._shown - self.CONTEXT, 0), len(self._tokens)
        return new

    def rest(self) -> str:
        """What is left at the end, whole characters or not."""
        return self._new()

    def _new(self) -> str:
        before = self._decode(self._tokens[self._first : self._shown])
        return self._decode(self._tokens[self._first :])[len(before) :]


class Clock:
    """How fast tokens come, apart from the first of each row, which waits for its prompt to be read."""

    def __init__(self) -> None:
        self._tokens, self._later = 0, 0
        self._waited, self._worked = 0.0, 0.0
        self.start()

    def start(self) -> None:
        """A batch starts here."""
        self._rows, self._last = set[int](), time.perf_counter()

    def tick(self, row: int) -> None:
        """`row` got a token."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self._tokens += 1
        if row in self._rows:
            self._later, self._worked = self._later + 1, self._worked + elapsed
        else:
            self._waited += elapsed
            self._rows.add(row)

    def report(self) -> str:
        """One line for people."""
        rate = f", then {self._later / self._worked:,.1f} tokens/s" if self._later else ""
        return f"{self._tokens} new tokens: {self._waited:.2f} s to the first{rate}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
