"""run.dir/config.yaml and what ``--cfg job`` prints: every value comes back through ``--config`` as it was."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_mamba.config import BatchRampConfig, Config, ConfigError, from_dict, to_dict, to_yaml
from megatron_mamba.train.__main__ import compose, main

RUN = ["model=hybrid_tiny", "data=synthetic", "trainer.train_samples=1000"]
TEXTS = [
    "1e5", "7e12", "12e34567", "0x10", "0o7", "0b1", "017", "1_000", "1.", ".5", "+1", "-1e3", "1:30", "1:30.5", ".inf", "-.INF",
    ".nan", "yes", "No", "on", "y", "null", "~", "Null", "true", "2024-01-01", "2024-01-01 10:00:00", "=", "<<", "-", "?", ":",
    "${a}", "${run.seed}", "$${a}", "\\${a}", "\\\\${a}", "a\\${b}\\", "${", "$", "\\", "${oc.env:HOME}", "${${a}}",
    "", " ", " a", "a ", "a: b", "a #b", "#a", "- a", "!a", "&a", "*a", "%a", "@a", "`a", "{a}", "[a, b]", "'", '"', "'\"",
    "a\nb", "a\n", "\n", "\t", "\r\n", "\x00", "\x1b", "\x85", "\u2028", "\ufeff", "\udc80", "é", "北京", "😀", "...", "---",
    "a" * 300 + " b" * 300,
]  # fmt: skip


def round_trip(config: Config, path: Path) -> Config:
    path.write_text(to_yaml(to_dict(config)))
    return compose([], path)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:20])
def test_a_text_comes_back(text: str, tmp_path: Path) -> None:
    """As a value and as a name; in the metadata of checkpoints too."""
    config = compose(RUN)
    config = replace(config, run=replace(config.run, name=text), data=replace(config.data, blend={f"a{text}": 0.1, "b": 1e-7}))
    back = round_trip(config, tmp_path / "config.yaml")
    assert back == config
    assert list(back.data.blend or {}) == [f"a{text}", "b"]
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_random_data_comes_back(tmp_path: Path) -> None:
    """Texts of what YAML and OmegaConf give a meaning to, and everything that is no text."""
    draw, path = random.Random(0), tmp_path / "tree.yaml"
    others = [None, True, False, 0, -7, 10**30, 1e-300, 1.5, -2.0, 1e22, 5e-324, [], {}, [[], {"a": None}]]
    for _ in range(20):
        texts = ["".join(draw.choice("\\\\${{}}a1e5_'\" :.,-\n\té~") for _ in range(draw.randint(0, 9))) for _ in range(60)]
        texts = [text for text in texts if text != "???"]
        tree = {"values": dict(zip(texts, reversed(texts), strict=True)), "list": [*texts, *others]}
        path.write_text(to_yaml(tree))
        assert OmegaConf.to_container(OmegaConf.load(path), resolve=True) == tree


def test_values_that_are_no_text_come_back(tmp_path: Path) -> None:
    config = compose([*RUN, "optim.lr=1e-4", "optim.eps=1e-300", "run.seed=12345678901234567890", "data.split=[1,0.5,1e-7]"])
    ramp = BatchRampConfig(start=8, increment=8, samples=80)
    config = replace(config, trainer=replace(config.trainer, batch_ramp=ramp, watchdog_seconds=None, train_samples=10**12))
    assert round_trip(config, tmp_path / "config.yaml") == config


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"], ["--cfg", "job", "--resolve"]], ids=" ".join)
def test_what_cfg_job_prints_is_a_configuration(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """It takes what training takes, a saved configuration too; values that refer to others do so still."""
    settings = [*RUN, "trainer.batch_ramp={start:8,increment:8,samples:80}", "trainer.batch_ramp.start=16", "run.name='1e5 \\${a}'",
                "checkpoint.dir=${run.dir}/deep"]  # fmt: skip
    path = tmp_path / "printed.yaml"
    path.write_text(printed(capsys, monkeypatch, *settings, *flags))
    expected = compose(settings)
    assert (expected.run.name, expected.checkpoint.dir) == ("1e5 ${a}", "runs/default/deep")
    assert compose([], path) == expected
    followed = "runs/default/deep" if "--resolve" in flags else "runs/b/deep"
    assert compose(["run.dir=runs/b"], path).checkpoint.dir == followed
    path.write_text(printed(capsys, monkeypatch, "--config", str(path), "optim.lr=1e-3", *flags))
    assert compose([], path) == replace(expected, optim=replace(expected.optim, lr=1e-3))


def test_cfg_job_shows_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = printed(capsys, monkeypatch, "recipe=long_context_16k", "--cfg", "job")
    assert '  pattern: "???"' in shown
    assert 'init_from: "${required:' in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "job", "optim.lrr=3"], "optim.lrr = 3: unknown setting. Did you mean optim.lr?"),
        (["--cfg", "job", "trainer.batch_ramp.strat=3"], "trainer.batch_ramp.strat = 3: unknown setting"),
        (["--cfg", "job", "--config", "none.yaml"], "--config = 'none.yaml': no such file"),
        (["--help", "--config", "none.yaml"], "--config = 'none.yaml': does not go with --help. Use --config FILE --cfg job"),
        ([*RUN, "run.name=???"], "run.name = '???': stands for a value that is missing. Set run.name=..."),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        printed(capsys, monkeypatch, *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["1e5", "2024", "1_000", "1.5"])
def test_a_corpus_whose_name_reads_like_a_number(name: str) -> None:
    base = ["model=hybrid_tiny", "trainer.train_samples=1000"]
    with pytest.raises(ConfigError, match=r"data\.blend = .* reads like a number\. As a path, write it with \./ before"):
        compose([*base, f"data.blend={{{name}:1}}"])
    assert compose([*base, f"data.blend={{./{name}:1}}"]).data.blend == {f"./{name}": 1.0}
