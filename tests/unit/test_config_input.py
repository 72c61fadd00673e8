"""What is written to configure a run: corpora with their weights, and saved files that are not what they seem."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_mamba.config import ConfigError, to_dict
from megatron_mamba.train import __main__ as module
from megatron_mamba.train.__main__ import compose

BASE = ["model=hybrid_tiny", "trainer.train_samples=10"]
ODD = ["a=b,c", 'x{y}: "z"', "/a b/[1]"]


def blend(text: str) -> dict[str, float] | None:
    return compose([*BASE, f"data.blend={text}"]).data.blend


@pytest.mark.parametrize(
    "text",
    [
        "{a/b:0.5,c:2}",
        "[0.5,a/b,2,c]",
        "[{path:a/b,weight:0.5},{path: c, weight: 2}]",
        "[{weight:0.5,path:'a/b'},{path:\"c\",weight:2.0}]",
    ],
)
def test_blends_are_written_in_three_ways(text: str) -> None:
    assert blend(text) == {"a/b": 0.5, "c": 2.0}


def test_any_path_can_be_blended_and_comes_back_from_the_saved_file(tmp_path: Path) -> None:
    quoted = [(i + 1, path.replace('"', '\\"')) for i, path in enumerate(ODD)]
    flat = ",".join(f'{weight},"{path}"' for weight, path in quoted)
    keyed = ",".join(f'{{path:"{path}",weight:{weight}}}' for weight, path in quoted)
    assert blend(f"[{flat}]") == blend(f"[{keyed}]") == {path: i + 1.0 for i, path in enumerate(ODD)}
    config = compose([*BASE, f"data.blend=[{flat}]"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert compose([], tmp_path / "config.yaml") == config
    for text in ("[1,other]", "{other:1}", "[{path:other,weight:1}]"):
        assert compose([f"data.blend={text}"], tmp_path / "config.yaml").data.blend == {"other": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a:0.7,b:0}", r"data\.blend\[b\] = 0: must be positive"),
        ("[0.7,a,-1,b]", r"data\.blend\[2\] = -1: must be positive\. Raise it, or leave the corpus out"),
        ("[a,0.7]", r"data\.blend\[0\] = 'a': expected float, got str"),
        ("[0.7,a,0.3]", r"data\.blend = .*weight and path in turn, but their number is odd\. For example data\.blend=\{a:0\.7"),
        ("[0.7,5]", r"data\.blend\[1\] = 5: expected str, got int\. Quote what reads like a number"),
        ("[]", r"data\.blend = \[\]: names no corpus"),
        ("{}", r"data\.blend = \{\}: names no corpus"),
        ("a", r"data\.blend = 'a': expected corpora with their weights\. For example .*data\.blend=\[0\.7,\"a\",0\.3,\"b\"\]"),
        ("[{path:a,weight:1},{path:b}]", r"data\.blend\[1\] = \{'path': 'b'\}: expected the keys path and weight"),
        ("[{path:a,weight:1},{path:b,weight:x}]", r"data\.blend\[1\]\.weight = 'x': expected float"),
        ("[{path:a,weight:1},{path:'',weight:1}]", r"data\.blend\[1\]\.path = '': is empty"),
        ("[1,a,2,a]", r"data\.blend\[3\] = 'a': is given twice"),
        ("[1,'~/a',1,/home/me/a]", r"data\.blend\[3\] = '/home/me/a': is given twice"),
        ('{"a=b":1}', r"data\.blend = .*cannot be read\. Keys take no quotes: write such paths as a list, 'data\.blend=\[0\.7,"),
    ],
)
def test_errors_name_the_entry_of_a_blend(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(ConfigError, match=message):
        blend(text)


def saved(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    "text",
    [
        "model: &a [1, *a]\n",
        "a: &a {x: 1}\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nmodel: [*c, *c, *c, *c]\n",
        "a: &a {x: 1}\nb: &b {<<: [*a, *a, *a, *a]}\nc: &c {<<: [*b, *b, *b, *b]}\nmodel: {<<: [*c, *c, *c, *c]}\n",
    ],
)
def test_runaway_aliases_are_refused_before_they_are_copied(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_YAML_VALUES", 100)
    monkeypatch.setattr(module.OmegaConf, "load", lambda *_: pytest.fail("was read"))
    with pytest.raises(
        ConfigError, match=r"--config = .*: not a YAML file \(more than 100 values once its aliases are written out\)"
    ):
        compose([], saved(tmp_path, text))


def test_plain_aliases_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump(to_dict(compose([*BASE, "data.kind=synthetic"])))
    text = text.replace("dir: runs/default", "dir: &here runs/default").replace("name: default", "name: *here")
    assert compose([], saved(tmp_path, text)).run.name == "runs/default"


def test_other_files_are_no_saved_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=rf"--config = .*: {message}.*RUN_DIR/config\.yaml"):
            compose([], saved(tmp_path, text))

    refused("model: 0x_", r"not a YAML file \(invalid literal for int")
    refused("", "holds no configuration")
    refused("- model", "holds no configuration")
    monkeypatch.setattr(module, "_YAML_BYTES", 50)
    refused("a: 1\n" * 11, r"not a YAML file \(more than 50 bytes\)")
    monkeypatch.setattr(module.yaml, "compose", lambda *_: (_ for _ in ()).throw(RecursionError))
    refused("model: 1", "is nested too deep for a configuration")


def test_nesting_too_deep_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def deep(*_: object) -> None:
        raise RecursionError

    monkeypatch.setattr(module.OverridesParser, "parse_override", deep)
    with pytest.raises(ConfigError, match=r"data\.split = '\[\[1\]\]': cannot be read"):
        compose(["data.split=[[1]]"])


def test_a_vocabulary_that_cannot_be_split_is_offered_padding() -> None:
    given = [*BASE, "data.kind=synthetic", "parallel.tp=4"]
    message = r"parallel\.tp = 4: .*model\.vocab_size = 50257.*, or change model\.vocab_size \(a new model may pad it to 50260\)$"
    with pytest.raises(ConfigError, match=message):
        compose([*given, "model.vocab_size=50257"])
    assert compose([*given, "model.vocab_size=50260"]).model.vocab_size == 50260
