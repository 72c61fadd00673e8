"""Generation: decoding equals recomputation, rows do not affect each other, and sampling draws from the right distribution."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch.distributed.tensor import DTensor

from megatron_mamba.checkpoint import CheckpointError, CheckpointManager
from megatron_mamba.config import ConfigError, to_dict
from megatron_mamba.data.tokenizer import load_tokenizer, save_tokenizer
from megatron_mamba.generate import GenerationSettings, Sampler, generate, prefill
from megatron_mamba.generate.__main__ import TextStream, main, parse, read_prompts
from megatron_mamba.generate.loading import check_finite, load_model
from megatron_mamba.generate.sampling import NotFiniteError, candidates
from megatron_mamba.model import LanguageModel
from megatron_mamba.parallel.context import ParallelContext
from tiny import ARCHITECTURES, assert_equal, one_process, random_model, random_tokens, tiny

ROOT = Path(__file__).resolve().parents[2]
GREEDY = GenerationSettings(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with one_process() as context:
        yield context


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, context: ParallelContext) -> LanguageModel:
    return random_model(ARCHITECTURES[request.param], context, sharded=False)


# ----------------------------------------------------------------------------------------- decoding and recomputation


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 6])
def test_decoding_equals_recomputation(model: LanguageModel, first: int) -> None:
    """Logits of every step from the cache are those of the whole text, also when the very first token is a decoding step."""
    tokens = random_tokens(3, 17, seed=first)
    whole = model(tokens)
    cache = model.new_cache(3, 17, torch.float64)
    assert_equal(model(tokens[:, :first], cache=cache), whole[:, :first], "prefill")
    for position in range(first, 17):
        step = model(tokens[:, position : position + 1], cache=cache, last_only=True)
        assert_equal(step, whole[:, position], f"position {position}")


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 6, 15])
def test_prefill_in_pieces(model: LanguageModel, length: int) -> None:
    """Prompts of one length, read in pieces (16 = 15 + 1 = 6 + 6 + 4): the same logits, and the same state to go on from."""
    prompts = random_tokens(2, 16, seed=1).tolist()
    next_tokens = random_tokens(2, 1, seed=2)
    logits, cache = prefill(model, prompts, 2, 16)
    in_pieces, cache_of_pieces = prefill(model, prompts, 2, length)
    assert_equal(in_pieces, logits, "after the prompt")
    steps = [model(next_tokens, cache=c, last_only=True) for c in (cache_of_pieces, cache)]
    assert_equal(*steps, "a step later")


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 10, 11])
def test_padding_leaves_no_trace(model: LanguageModel, length: int) -> None:
    """Rows of 1 to 11 tokens in one batch have the logits they have alone, whatever the pieces: a piece of all padding,
    a row that starts at a piece's first or last token, a last piece of one token with which a row starts."""
    lengths = [1, 4, 11, 7, 3]
    prompts = [random_tokens(n, seed=n).tolist() for n in lengths]
    following = random_tokens(len(prompts), 3, seed=3)
    logits, cache = prefill(model, prompts, 3, length)
    found = [logits] + [model(following[:, i : i + 1], cache=cache, last_only=True) for i in range(3)]
    for row, prompt in enumerate(prompts):
        text = torch.cat([torch.tensor(prompt), following[row]])
        alone = model(text[None])[0, len(prompt) - 1 :]
        assert_equal(torch.stack([step[row] for step in found]), alone, f"row of {len(prompt)} tokens")


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2", "hybrid"])
def test_state_goes_on_beyond_several_chunks(context: ParallelContext, name: str) -> None:
    """A prompt of several kernel chunks, then decoding across more of their borders; and the early tokens matter."""
    model = random_model(ARCHITECTURES[name], context, sharded=False)
    tokens = random_tokens(1, 220)
    whole = model(tokens)
    logits, cache = prefill(model, tokens[:, :180].tolist(), 40, 70)
    assert_equal(logits, whole[:, 179], "prompt of 180 tokens in pieces of 70")
    for position in range(180, 220):
        step = model(tokens[:, position : position + 1], cache=cache, last_only=True)
        assert_equal(step, whole[:, position], f"position {position}")
    tokens[0, 0] = (tokens[0, 0] + 1) % 61
    assert (model(tokens)[:, -1] - step).abs().max() > 1e-8


@torch.no_grad()
def test_greedy_batch_equals_greedy_alone(model: LanguageModel) -> None:
    prompts = [random_tokens(n, seed=n).tolist() for n in (2, 9, 5)]
    together = generate(model, prompts, GREEDY, None)
    for prompt, new in zip(prompts, together, strict=True):
        assert generate(model, [prompt], replace(GREEDY, prefill_length=4), None) == [new]
        text = list(prompt)
        for token in new:
            assert token == model(torch.tensor([text]))[0, -1].argmax()
            text.append(token)
        assert len(new) == 8


def test_cache_refuses_more_than_its_room(context: ParallelContext) -> None:
    model = random_model(tiny("*"), context, sharded=False).requires_grad_(False)
    cache = model.new_cache(1, 3, torch.float64)
    model(random_tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="cache of 3 tokens is full: 2 used, 2 more given"):
        model(random_tokens(1, 2), cache=cache)


# ------------------------------------------------------------------------------------------------------- ends and edges


@pytest.fixture
def hybrid(context: ParallelContext) -> LanguageModel:
    return random_model(ARCHITECTURES["hybrid"], context, sharded=False)


def test_rows_end_at_their_own_eos(hybrid: LanguageModel) -> None:
    prompts = [random_tokens(n, seed=n).tolist() for n in (3, 6, 4)]
    free = generate(hybrid, prompts, GREEDY, None)
    eos = free[0][3]
    expected = [new[: new.index(eos)] if eos in new else new for new in free]
    assert len(expected[0]) <= 3
    assert max(map(len, expected)) > 3
    calls: list[tuple[int, int]] = []
    assert generate(hybrid, prompts, GREEDY, eos, lambda row, token: calls.append((row, token))) == expected
    assert [[token for r, token in calls if r == row] for row in range(3)] == expected
    assert generate(hybrid, prompts, replace(GREEDY, max_new_tokens=2), None) == [new[:2] for new in free]


def test_generation_ends_once_all_rows_have(hybrid: LanguageModel) -> None:
    """No step is computed after the last row's end."""
    first = generate(hybrid, [[7, 8]], replace(GREEDY, max_new_tokens=1), None)[0][0]
    lengths: list[int] = []
    handle = hybrid.layers["0"].register_forward_pre_hook(lambda module, args: lengths.append(args[1].length))
    assert generate(hybrid, [[7, 8]], GREEDY, first) == [[]]
    handle.remove()
    assert lengths == [2]


def test_empty_prompt_starts_a_document(hybrid: LanguageModel) -> None:
    assert generate(hybrid, [[], [5, 6]], GREEDY, 2) == generate(hybrid, [[2], [5, 6]], GREEDY, 2)
    with pytest.raises(ValueError, match="one is empty and eos_id is None"):
        generate(hybrid, [[]], GREEDY, None)


def test_bad_prompts(hybrid: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: token 61 is not in the model's vocabulary \[0, 61\)"):
        generate(hybrid, [[1], [3, 61]], GREEDY, 2)
    with pytest.raises(ValueError, match="the list is empty"):
        generate(hybrid, [], GREEDY, 2)


def test_leaves_the_model_as_it_was(hybrid: LanguageModel) -> None:
    hybrid.train()
    generate(hybrid, [[1]], GREEDY, 2)
    assert hybrid.training
    assert all(parameter.requires_grad for parameter in hybrid.parameters())


# ------------------------------------------------------------------------------------------------------------- sampling

LOGITS = torch.tensor([[0.05, 0.5, 0.15, 0.25, 0.05]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.05, 0.5, 0.15, 0.25, 0.05]),
        ({"temperature": 0.5}, [p * p / 0.34 for p in (0.05, 0.5, 0.15, 0.25, 0.05)]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 99}, [0.05, 0.5, 0.15, 0.25, 0.05]),
        ({"top_p": 0.4}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3, 0]),  # the token that crosses is kept
        ({"top_p": 0.76}, [0, 5 / 9, 1.5 / 9, 2.5 / 9, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3, 0]),  # 5/9 and 2.5/9 of the three
        ({"temperature": 0.5, "top_p": 0.8}, [0, 0.8, 0, 0.2, 0]),  # 0.735 and 0.184 after the temperature
        ({"temperature": 1e-300}, [0, 1, 0, 0, 0]),
    ],
)
def test_distribution(settings: dict[str, float], expected: list[float]) -> None:
    chosen = GenerationSettings(**settings)  # type: ignore[arg-type]
    probabilities, tokens = candidates(torch.cat([LOGITS, LOGITS.flip(1)]) + 1000.0, chosen)
    full = torch.zeros(2, 5, dtype=torch.float64).scatter(1, tokens, probabilities)
    target = torch.tensor(expected, dtype=torch.float64)
    assert (full - torch.stack([target, target.flip(0)])).abs().max() < 1e-12


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.76}])
def test_draws_follow_the_distribution(settings: dict[str, float]) -> None:
    """Frequencies of 4,000 rows, within 4.5 standard deviations; impossible tokens never."""
    chosen = GenerationSettings(**settings)  # type: ignore[arg-type]
    probabilities, tokens = candidates(LOGITS, chosen)
    expected = torch.zeros(1, 5, dtype=torch.float64).scatter(1, tokens, probabilities)[0]
    rows = 4000
    drawn = Sampler(chosen, rows)(LOGITS.expand(rows, -1)).bincount(minlength=5).double() / rows
    assert ((drawn - expected).abs() <= 4.5 * (expected * (1 - expected) / rows).sqrt()).all(), (drawn, expected)


def test_greedy_takes_the_largest() -> None:
    logits = torch.stack([LOGITS[0], LOGITS[0].roll(2)])
    assert Sampler(GenerationSettings(temperature=0.0, top_k=2, top_p=0.5), 2)(logits).tolist() == [1, 3]


def test_seed_decides(hybrid: LanguageModel) -> None:
    """The same seed repeats; another does not; rows differ; and a row draws the same in a batch of any size."""
    settings = GenerationSettings(max_new_tokens=12, temperature=1.5)
    prompts = [[1, 2, 3], [1, 2, 3], [4]]
    first = generate(hybrid, prompts, settings, None)
    assert generate(hybrid, prompts, settings, None) == first
    assert generate(hybrid, prompts, replace(settings, seed=5), None) != first
    assert first[0] != first[1]
    assert generate(hybrid, prompts[:2], settings, None) == first[:2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be positive. Use 1 or more"),
        ({"prefill_length": 0}, "prefill_length = 0"),
        ({"temperature": -1.0}, "temperature = -1.0: must be a number >= 0. Use 0 for greedy"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1: must not be negative"),
        ({"top_p": 0.0}, "top_p = 0.0: must lie in"),
        ({"top_p": 1.5}, "top_p = 1.5: must lie in"),
        ({"seed": -1}, "seed = -1: must lie in"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        Sampler(GenerationSettings(**settings), 1)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ checkpoints, command line


def save(model: LanguageModel, directory: Path, tokenizer: Path | None = None) -> None:
    manager = CheckpointManager(directory, keep_last=1, keep_every=0, async_save=False, on_damage="error")
    config = {"model": to_dict(model.config), "trainer": {"precision": "fp32"}}
    kept = tokenizer and str(save_tokenizer(tokenizer, directory / "tokenizer").relative_to(directory))
    metadata = {"config": config, "tokenizer": kept}
    manager.save(3, {"model": dict(model.named_parameters())}, metadata)
    manager.close()


@pytest.mark.parametrize("name", ["hybrid", "everything", "transformer"])
def test_load_model(context: ParallelContext, tmp_path: Path, name: str) -> None:
    """Weights come back bit for bit, from a run's folder too; bf16 keeps what must stay fp32; both compute."""
    model = random_model(ARCHITECTURES[name], context, precision="fp32")
    save(model, tmp_path / "checkpoints")
    loaded, metadata = load_model(tmp_path, context)
    assert metadata["config"]["model"] == to_dict(model.config)
    narrow, _ = load_model(tmp_path / "checkpoints" / "step_00000003", context, "bf16")
    for found in (loaded, narrow):
        assert found.config == model.config
        assert not found.training
        pairs = zip(found.table_parameters(), model.table_parameters(), strict=True)
        for (name, parameter, row), (expected_name, expected, _) in pairs:
            assert name == expected_name
            assert not parameter.requires_grad
            dtype = torch.float32 if row.fp32 or found is loaded else torch.bfloat16
            values = [p.to_local() if isinstance(p, DTensor) else p for p in (parameter, expected)]
            assert values[0].dtype == dtype
            assert torch.equal(values[0], values[1].to(dtype)), name
    prompts = [[1, 2, 3], [4]]
    assert generate(loaded, prompts, GREEDY, None) == generate(model, prompts, GREEDY, None)
    logits, cache = prefill(narrow, prompts, 1, 2)
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        step = narrow(torch.tensor([[1], [2]]), cache=cache, last_only=True)
        expected = [model(torch.tensor([[*prompt, next_]]))[0, -1] for prompt, next_ in zip(prompts, (1, 2), strict=True)]
    assert_equal(step.float(), torch.stack(expected), "bf16 against fp32", tolerance=0.1)


def test_load_model_errors(context: ParallelContext, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model(tmp_path, context)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(context: ParallelContext, tmp_path: Path, value: float) -> None:
    model = random_model(ARCHITECTURES["hybrid"], context, precision="fp32")
    dict(model.named_parameters())["layers.2.norm.weight"].to_local().detach()[3] = value
    save(model, tmp_path / "checkpoints")
    loaded, _ = load_model(tmp_path, context)
    with pytest.raises(CheckpointError, match=r"parameter layers\.2\.norm\.weight has values that are not finite numbers"):
        check_finite(loaded, tmp_path)
    for settings in (GREEDY, GenerationSettings(max_new_tokens=2)):
        with pytest.raises(NotFiniteError, match=r"logits are not finite numbers.*precision=fp32"):
            generate(loaded, [[1, 2]], settings, None)


def test_generation_refuses_a_model_of_nan(
    context: ParallelContext, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParallelContext, "create", classmethod(lambda *_: context))
    monkeypatch.setattr(ParallelContext, "close", lambda _: None)
    model = random_model(tiny("M*-", vocab_size=300), context, precision="fp32")
    dict(model.named_parameters())["final_norm.weight"].to_local().detach()[0] = math.nan
    save(model, tmp_path / "checkpoints", run / "tokenizer.model")
    assert main([f"checkpoint={tmp_path}", "prompt=a", "device=cpu"]) == 2
    assert "error: checkpoint " in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, context: ParallelContext) -> Path:
    """A run's folder: a tokenizer and a checkpoint that names it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer, lines = folder / "tokenizer.model", [f"def f{i}(x): return x + {i}  # größer" for i in range(300)]
    with open(tokenizer, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    save(random_model(tiny("M*-", vocab_size=300), context, precision="fp32"), folder / "checkpoints", tokenizer)
    return folder


def test_ids_beyond_the_tokenizer_are_never_drawn(
    context: ParallelContext, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A vocabulary padded to share out evenly has ids that stand for no text."""
    model = random_model(tiny("M*-", vocab_size=500), context, precision="fp32")
    settings = replace(GREEDY, temperature=100.0, max_new_tokens=40)
    drawn = [token for row in generate(model, [[1], [2]], settings, None) for token in row]
    assert max(drawn) >= 300, "the test would show nothing"
    drawn = [token for row in generate(model, [[1], [2]], settings, None, vocab_size=300) for token in row]
    assert 200 < max(drawn) < 300
    save(model, tmp_path / "checkpoints", run / "tokenizer.model")
    arguments = [f"checkpoint={tmp_path}", "temperature=100", "max_new_tokens=40", "device=cpu"]
    monkeypatch.setattr(ParallelContext, "create", classmethod(lambda cls, *args: context))
    monkeypatch.setattr(ParallelContext, "close", lambda self: None)
    for prompts in ("prompt=def", "prompt=['def', 'return']"):
        assert main([*arguments, prompts]) == 0
    assert capsys.readouterr().out.count("return") >= 1


def generation(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_mamba.generate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_line(run: Path, context: ParallelContext) -> None:
    """One process: text streamed to stdout is the prompt and what the library makes, figures go to stderr."""
    result = generation(f"checkpoint={run}", "prompt=def f1(x):", "max_new_tokens=7", "temperature=0", "device=cpu")
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(run / "tokenizer.model")
    model, _ = load_model(run, context)
    tokens = tokenizer.encode("def f1(x):")
    new = generate(model, [tokens], replace(GREEDY, max_new_tokens=7), tokenizer.eos_id)[0]
    assert result.stdout == tokenizer.decode(tokens + new) + "\n"
    assert f"{len(tokens)} prompt tokens; {len(new)} new tokens" in result.stderr
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promt=a"], "promt = 'a': unknown setting. Did you mean prompt?"),
        (["prompt"], "command line = 'prompt': is not SETTING=VALUE"),
        (["prompt=a"], "checkpoint = None: is required"),
        (["checkpoint=x"], "prompt = None: give exactly one of prompt and prompts_file"),
        (["checkpoint=x", "prompt=a", "prompts_file=b"], "prompt = 'a': give exactly one"),
        (["checkpoint=x", "prompt=a", "prompt=b"], "prompt = 'b': is given twice"),
        (["checkpoint=x", "prompt=a", "top_k=many"], "top_k = 'many': is not a whole number"),
        (["checkpoint=x", "prompt=a", "top_p=2"], "top_p = 2.0: must lie in (0, 1]"),
        (["checkpoint=x", "prompt=a", "device=tpu"], "device = 'tpu': not one of the choices"),
        (["checkpoint=/nowhere", "prompt=a"], "/nowhere holds no checkpoint"),
        (["checkpoint=RUN", "prompts_file=/nowhere"], "prompts_file = '/nowhere': cannot be read"),
        (["checkpoint=RUN", "prompt=a", "tokenizer=/nowhere"], "/nowhere: no tokenizer there"),
    ],
)
def test_command_line_errors(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("Once upon, a time: (x)", ["Once upon, a time: (x)"]),
        ("", [""]),
        ("[INST] hi", ["[INST] hi"]),
        ("'def main('", ["def main("]),
        ('"a" or "b"', ['"a" or "b"']),
        (r'"two\nlines"', ["two\nlines"]),
        ('["a, b", "c"]', ["a, b", "c"]),
        ("[1, 2]", ["[1, 2]"]),
        ("{x: 1}", ["{x: 1}"]),
        ("null is text", ["null is text"]),
    ],
)
def test_prompts(text: str, prompts: list[str]) -> None:
    assert read_prompts(parse(["checkpoint=x", f"prompt={text}"])) == prompts


def test_prompts_file(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\n\ntwo, drei größer\n", encoding="utf-8")
    assert read_prompts(parse(["checkpoint=x", f"prompts_file={tmp_path / 'prompts'}"])) == ["one", "", "two, drei größer"]


def test_streamed_text_is_the_decoded_text() -> None:
    """Characters of several bytes appear once they are whole; nothing is lost, repeated or shown half."""
    text = "naïve 😀 größer"
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"), list(b"to "))
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert [stream.add(byte) for byte in "😀".encode()[:2]] == ["", ""]
    assert stream.rest() == "\ufffd"


def test_streamed_text_keeps_spaces() -> None:
    """Many tokenizers drop the space before the first word they decode: it must not go missing between two pieces."""
    words = ["▁the", "▁sta", "te", "▁of", "▁a", "▁long", "▁text", "▁goes", "▁on", "."]
    stream = TextStream(lambda tokens: "".join(words[i] for i in tokens).replace("▁", " ").removeprefix(" "), [0])
    assert [stream.add(i) for i in range(1, 10)] == [" sta", "te", " of", " a", " long", " text", " goes", " on", "."]
    assert stream.rest() == ""
