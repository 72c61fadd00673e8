"""The configuration: options of the groups, their numbers, and what a user reads when something cannot work."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

from megatron_mamba.checkpoint import CheckpointError
from megatron_mamba.config import Config, ConfigError, TrainerConfig, from_dict, to_dict, to_yaml
from megatron_mamba.data.indexed import DataError
from megatron_mamba.model.parameters import count
from megatron_mamba.train.__main__ import CONFIG_DIR, compose, compose_tree, config_groups, log_folder, main
from megatron_mamba.train.resilience import TrainingError

ROOT = Path(__file__).resolve().parents[2]
RUN = ["data=synthetic", "trainer.train_samples=1000"]
GROUPS = config_groups()
PARAMETERS = {
    # arXiv 2406.07887 and, where released, the checkpoints' own inventories
    "transformer_8b": 8_540_135_424,
    "mamba_8b": 8_148_783_104,
    "mamba2_8b": 8_236_999_680,
    "hybrid_8b": 8_654_517_248,
    "llama_8b": 8_030_261_248,
    "nemotron_h_8b": 8_100_852_736,
    "mamba2_130m": 128_989_632,
    "mamba2_2_7b": 2_702_599_680,
}


@lru_cache
def model(name: str):
    return compose([f"model={name}", *RUN]).model


# ------------------------------------------------------------------------------------------------------------ options


def test_groups_hold_the_promised_options():
    assert {"mamba_8b", "mamba2_8b", "hybrid_8b", "transformer_8b", "nemotron_h_8b", "hybrid_800m", "llama_8b"} <= set(
        GROUPS["model"]
    )
    assert {f"mamba2_{size}" for size in ("130m", "370m", "780m", "1_3b", "2_7b")} <= set(GROUPS["model"])
    assert {f"{name}_tiny" for name in ("mamba", "mamba2", "hybrid", "transformer", "llama")} <= set(GROUPS["model"])
    recipes = {"empirical_study_1_1t", "empirical_study_3_5t", "long_context_16k", "long_context_32k", "long_context_128k", "none"}
    assert set(GROUPS["recipe"]) == recipes


@pytest.mark.parametrize("name", GROUPS["model"])
def test_every_model_is_valid_and_named_after_its_file(name):
    assert model(name).name == name


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS if g not in ("model", "data", "recipe") for o in GROUPS[g]])
def test_every_option_is_valid(group, option):
    config = compose(["model=hybrid_8b", *RUN, f"{group}={option}"])
    default = Config(model=config.model, trainer=TrainerConfig(train_samples=1000))
    assert (getattr(config, group) == getattr(default, group)) == (option in ("default", "none"))


def test_defaults_are_those_of_the_dataclasses():
    config = from_dict(Config, compose_tree(["model=hybrid_tiny"]))
    assert config == Config(model=config.model)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert count(model(name)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("hybrid_8b", {"mamba2": 24, "attention": 4, "mlp": 28}),
        ("nemotron_h_8b", {"mamba2": 24, "attention": 4, "mlp": 24}),
        ("hybrid_800m", {"mamba2": 20, "attention": 4, "mlp": 24}),
        ("transformer_8b", {"attention": 32, "mlp": 32}),
        ("mamba_8b", {"mamba": 56}),
    ],
)
def test_layers_of_the_patterns(name, layers):
    kinds = model(name).layers
    assert {kind: kinds.count(kind) for kind in set(kinds)} == layers


def test_8b_models_are_the_papers():
    hybrid, transformer, llama = model("hybrid_8b"), model("transformer_8b"), model("llama_8b")
    assert [i for i, kind in enumerate(hybrid.layers) if kind == "attention"] == [10, 22, 33, 45]
    assert (hybrid.mlp.activation, hybrid.attention.rotary_fraction, hybrid.attention.n_kv_heads) == ("gelu", 0.0, 8)
    assert (transformer.mlp.activation, transformer.attention.rotary_fraction, transformer.norm) == (
        "squared_relu",
        0.5,
        "layernorm1p",
    )
    assert (transformer.attention.n_kv_heads, transformer.init.depth) == (32, 32)
    assert (llama.mlp.activation, llama.attention.rotary_fraction, llama.attention.rope_base) == ("swiglu", 1.0, 500000.0)
    assert model("nemotron_h_8b").mlp.activation == "squared_relu"
    assert {model(name).norm_eps for name in GROUPS["model"]} == {1e-5}


def test_tiny_models_have_equal_parameters():
    counts = {name: count(model(f"{name}_tiny")) for name in ("mamba", "mamba2", "hybrid", "transformer", "llama")}
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts
    assert 3e6 < min(counts.values()) < 6e6
    assert set(model("hybrid_tiny").pattern) == set("M*-")


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("name", "batch", "lr", "min_lr", "tokens", "seq_length", "cp"),
    [
        ("empirical_study_1_1t", 256, 1e-4, 1e-5, 1.1e12, 4096, 1),
        ("empirical_study_3_5t", 1024, 3e-4, 3e-5, 3.5e12, 4096, 1),
        ("long_context_16k", 256, 3e-5, 3e-6, 50e9, 16384, 2),
        ("long_context_32k", 128, 3e-5, 3e-6, 50e9, 32768, 4),
        ("long_context_128k", 32, 3e-5, 3e-6, 50e9, 131072, 8),
    ],
)
def test_recipe(name, batch, lr, min_lr, tokens, seq_length, cp):
    start = ["checkpoint.init_from=runs/4k"] if name.startswith("long") else []
    config = compose(["model=hybrid_8b", "data.path=corpus", f"recipe={name}", *start, "parallel=tp4"])
    assert (config.parallel.cp, config.parallel.tp, config.parallel.sequence_parallel) == (cp, 4, True)
    optim, trainer = config.optim, config.trainer
    assert (trainer.global_batch_size, optim.lr, optim.min_lr, trainer.train_tokens) == (batch, lr, min_lr, tokens)
    assert (config.data.seq_length, trainer.precision) == (seq_length, "bf16")
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.schedule.kind) == (0.9, 0.95, 0.1, "cosine")
    if name.startswith("empirical"):
        assert (optim.schedule.warmup_samples, optim.schedule.warmup_tokens) == (122_000, None)
    assert config.train_samples == -(-int(tokens) // seq_length)


def test_command_line_wins_over_recipe_and_recipe_over_groups():
    config = compose(["model=hybrid_8b", "data.path=x", "optim=wsd", "recipe=empirical_study_1_1t", "optim.lr=2e-4"])
    assert (config.optim.schedule.kind, config.optim.lr) == ("cosine", 2e-4)


# ----------------------------------------------------------------------------------------------------- the command line


def test_settings_of_every_shape_can_be_overridden():
    config = compose(
        [
            "model=hybrid_tiny", "model.pattern=M-*|m-", "model.mamba.d_inner=64", "data.blend={/corpora/a-b_c.d:0.7,e:1}",
            "data.split=[98,1,1]", "trainer.train_tokens=1000000", "trainer.global_batch_size=16", "optim.lr=2e-4",
            "optim.min_lr=0", "trainer.batch_ramp.start=4", "trainer.batch_ramp.increment=2", "trainer.batch_ramp.samples=100",
            "checkpoint.init_from='a=b'", "checkpoint.dir=${run.dir}/deep", "run.dir=runs/x",
        ]
    )  # fmt: skip
    assert config.model.layers == ("mamba2", "mlp", "attention", "mamba", "mlp")
    assert config.data.blend == {"/corpora/a-b_c.d": 0.7, "e": 1.0}
    assert config.data.split == (98.0, 1.0, 1.0)
    assert config.trainer.batch_ramp is not None
    assert dataclasses.astuple(config.trainer.batch_ramp) == (4, 2, 100)
    assert (config.optim.min_lr, config.checkpoint.init_from, config.checkpoint.dir) == (0.0, "a=b", "runs/x/deep")


BAD = [
    (["model=hybrid_tiny", "optim.lrr=3"], "optim.lrr = 3", "Did you mean optim.lr?"),
    (["model=hybrid_tiny", "optm.lr=3"], "optm", "Did you mean optim?"),
    (["model=hybrid_tiny", "trainer.batch_ramp.strat=3"], "trainer.batch_ramp.strat", "Did you mean trainer.batch_ramp.start?"),
    (["model=hybrid_8"], "model = 'hybrid_8'", "Did you mean model=hybrid_8b? Known: hybrid_800m, hybrid_8b"),
    (["model=hybrid_tiny", "optim=adam"], "optim = 'adam'", "Known: default, wsd"),
    (["optim.lr=1"], "model = None", "Choose one: hybrid_800m"),
    (["model=hybrid_tiny", "model.hidden_size=big"], "model.hidden_size = 'big': expected int", "type int"),
    (["model=hybrid_tiny", "trainer.precision=fp8"], "trainer.precision = 'fp8'", "Choose from bf16, fp32"),
    (["model=hybrid_tiny", "data.split=7"], "data.split = 7", "data.split=[1,1,1]"),
    (["model=hybrid_tiny", "data.split=1,2,3"], "data.split = '1,2,3': several values", "data.split=[1,2]"),
    (["model=hybrid_tiny", "model.mamba2.head_dim=48"], "model.mamba2.head_dim = 48", "divisor of 512"),
    (["model=hybrid_tiny", "model.mamba2.n_groups=3"], "model.mamba2.n_groups = 3", "divisor of 8"),
    (["model=hybrid_tiny", "model.attention.n_kv_heads=3"], "model.attention.n_kv_heads = 3", "divisor of 4"),
    (["model=hybrid_tiny", "model.pattern=MXM"], "model.pattern = 'MXM': unknown letter 'X'", "Use M (Mamba-2)"),
    (["model=hybrid_tiny", "trainer.train_samples=1"], "data.path = None", "data.path=PREFIX"),
    (["model=hybrid_tiny", "data.path=x"], "trainer.train_samples = None", "trainer.train_samples=100000"),
    (["model=hybrid_tiny", *RUN, "trainer.micro_batch_size=3"], "trainer.micro_batch_size = 3", "divisor of 256"),
    (["model=hybrid_tiny", *RUN, "optim.min_lr=1"], "optim.min_lr = 1.0", "tenth of optim.lr"),
    (["model=hybrid_8b", "recipe=long_context_16k"], "checkpoint.init_from = None", "Set checkpoint.init_from=..."),
    (["model=hybrid_tiny", "data.path=${run.dri}/x"], "data.path = None", "'run.dri' not found"),
    (["model=hybrid_tiny", "data.path=a=b"], "data.path = 'a=b': cannot be read", "'data.path=\"...\"'"),
    (["model=hybrid_tiny", "optim.lr"], "optim.lr", "SETTING=VALUE"),
    (["model=hybrid_tiny", "+optim.lr=3"], "command line", "already at 'optim.lr'"),
]


@pytest.mark.parametrize(("overrides", "named", "remedy"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_names_field_value_and_remedy(overrides, named, remedy):
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert message.startswith(named)
    assert remedy in message
    assert "\n" not in message


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd or ROOT, check=False)


def test_command_line_reports_one_message_and_leaves_no_folder(tmp_path):
    done = run("-m", "megatron_mamba.train", "model=hybrid_tiny", "optim.lrr=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: optim.lrr = 3: unknown setting. Did you mean optim.lr?\n"
    done = run("-m", "megatron_mamba.train", "--multirun", "model=hybrid_tiny", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown flag" in done.stderr
    assert not list(tmp_path.iterdir())


def test_hydras_flags_print_the_whole_configuration(tmp_path):
    done = run("-m", "megatron_mamba.train", "--cfg", "job", "model=mamba_tiny", "optim.lr=3e-3", cwd=tmp_path)
    shown = yaml.safe_load(done.stdout)
    assert from_dict(Config, shown) == from_dict(Config, compose_tree(["model=mamba_tiny", "optim.lr=3e-3"]))
    assert not list(tmp_path.iterdir())
    assert "trainer.train_samples=N" in run("-m", "megatron_mamba.train", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("parallel.dp_shard", 3, "4 ranks are running", "Set it to 4"), 2),
        (DataError("corpus.bin is truncated"), 2),
        (CheckpointError("step_10 is damaged"), 2),
        (TrainingError("10 steps in a row were not finite"), 1),
        (0, 0),
    ],
)
def test_exit_code_and_message_of_training(monkeypatch, capsys, error, code):
    def train(config):
        assert config.model.name == "mamba_tiny"
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr("megatron_mamba.train.loop.train", train)
    monkeypatch.setattr(sys, "argv", ["train", "model=mamba_tiny", *RUN])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err == (f"error: {error}\n" if code else "")


# -------------------------------------------------------------------------------------------------------- saved configs


@pytest.fixture
def saved(tmp_path):
    config = compose(
        ["model=transformer_tiny", "recipe=empirical_study_3_5t", "data.blend={a/b:1,c:2}", "run.name='a: b'", "data.split=[1,1,0]"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(to_dict(config)))
    return config, path


def test_saved_config_repeats_the_run(saved):
    config, path = saved
    assert compose([], path) == config
    changed = compose(["optim.lr=1e-3", "trainer.batch_ramp={start:8,increment:8,samples:80}"], path)
    assert changed.optim == dataclasses.replace(config.optim, lr=1e-3)
    assert changed.trainer.batch_ramp is not None


def test_saved_config_of_an_older_version_gets_new_settings_by_default(saved):
    config, path = saved
    tree = to_dict(config)
    del tree["eval"], tree["optim"]["eps"]
    path.write_text(yaml.safe_dump(tree))
    assert compose([], path) == config


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        (None, [], "no such file"),
        ("model: [", [], "not a YAML file"),
        ("- 1\n", [], "holds no configuration of a run"),
        ("", [], "holds no configuration of a run"),
        ("keep", ["model=mamba_tiny"], "chooses an option of a group"),
        ("keep", ["optim.lrr=1"], "unknown setting. Did you mean optim.lr?"),
        ("model: {name: a, pattern: M, hidden_size: 8, colour: 3}", [], "model.colour = 3: unknown setting"),
        ("model: {name: a}\ndefaults: [{optim: wsd}]", [], "has the key defaults, which belongs to Hydra. Take it out"),
        ("model: {name: a}\nhydra: {searchpath: ['file:///x']}", [], "has the key hydra, which belongs to Hydra. Take it out"),
    ],
)
def test_bad_saved_config(saved, tmp_path, text, overrides, problem):
    path = saved[1]
    if text is None:
        path = tmp_path / "nowhere.yaml"
    elif text != "keep":
        path.write_text(text)
    with pytest.raises(ConfigError, match=problem.replace("?", r"\?")):
        compose(overrides, path)


@pytest.mark.parametrize(
    "value",
    ["${oc.env:USER}", "a-${oc.env:USER,x}", "${ oc.env : USER }", "${run.name}${oc.env:USER}", "${required:'${oc.env:USER}'}",
     "${${run.dir}:USER}", "${oc.decode:x}", "${model.${run.name}}"],
)  # fmt: skip
@pytest.mark.parametrize("where", ["name", "blend"])
def test_a_saved_config_resolves_nothing_but_its_own_values(saved, where, value, monkeypatch):
    """It may be a stranger's, and what it reads of the environment would lie in every checkpoint."""
    monkeypatch.setenv("USER", "secret")
    path, tree = saved[1], yaml.safe_load(saved[1].read_text())
    key = "run.name" if where == "name" else "data.split"
    tree |= {"run": {**tree["run"], "name": value}} if where == "name" else {"data": {**tree["data"], "split": [0.9, value, 0.1]}}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=rf"{key} = .*: {path} may refer to its own values only. Give it on the .*: {key}="):
        compose([], path)


def test_what_a_saved_config_may_refer_to(saved, monkeypatch):
    monkeypatch.setenv("USER", "me")
    path, tree = saved[1], yaml.safe_load(saved[1].read_text())
    tree["run"] |= {"name": "big: {a}", "dir": "runs/${run.name}-${ model.name }"}
    path.write_text(yaml.safe_dump(tree))
    assert compose(["run.name=x-${oc.env:USER}"], path).run.dir == f"runs/x-me-{tree['model']['name']}"
    assert compose([], path).run.name == "big: {a}"
    tree["checkpoint"] |= {"init_from": "${required:'the checkpoint to begin from'}"}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="is required and was not given: the checkpoint to begin from"):
        compose([], path)


def test_config_folder_is_the_repositorys():
    assert CONFIG_DIR.resolve() == ROOT / "configs"


MINIMAL = {"model": {"name": "tiny", "pattern": "M", "hidden_size": 64}, "data": {"path": "corpus"}}
PATHS = ["run.dir", "checkpoint.dir", "checkpoint.init_from", "data.path", "data.tokenizer", "data.cache_dir"]


@pytest.mark.parametrize("setting", PATHS)
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_path_is_refused(setting, value):
    """What `run.dir=$RUNS` is where RUNS is not set; it would be the folder one is in, or the root with what follows it."""
    group, name = setting.split(".")
    with pytest.raises(ConfigError, match=rf"{setting} = '{value}': is empty\. Give a path, or leave the setting out; a variable"):
        from_dict(Config, {**MINIMAL, group: {**MINIMAL.get(group, {}), name: value}})


def test_paths_of_the_home_folder(monkeypatch):
    """The shell leaves `run.dir=~/a` as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    data = {"blend": {"~/corpora/a": 1.0, "b~": 2.0}, "tokenizer": "~/tok.model"}
    config = from_dict(Config, {**MINIMAL, "data": data, "run": {"dir": "~/a", "name": "~"}})
    assert (config.run.dir, config.run.name, config.checkpoint_dir) == ("/home/me/a", "~", "/home/me/a/checkpoints")
    assert config.data.blend == {"/home/me/corpora/a": 1.0, "b~": 2.0}
    assert config.data.tokenizer == "/home/me/tok.model"
    assert to_dict(config)["run"]["dir"] == "/home/me/a"
    with pytest.raises(ConfigError, match=r"run\.dir = '~nobody_has_this_name/a': names a home folder that is not known"):
        from_dict(Config, {**MINIMAL, "run": {"dir": "~nobody_has_this_name/a"}})


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["run.dir=runs/a"], "runs/a/logs"),
        (["run.dir='runs/a b'"], "runs/a b/logs"),
        (["++run.dir=runs/a"], "runs/a/logs"),
        (["run.name=big", "run.dir=runs/${run.name}"], "runs/big/logs"),
        ([], "runs/default/logs"),
        (["--cfg", "job"], "logs"),
    ],
)
def test_logs_lie_in_the_run_s_folder(arguments, folder, capsys):
    """However run.dir is written on the command line of launch/torchrun.sh."""
    log_folder(["model=hybrid_tiny", "data.kind=synthetic", "trainer.train_samples=256", *arguments])
    assert capsys.readouterr().out == f"{folder}\n"


def test_logs_of_a_saved_run(saved, capsys):
    _, path = saved
    log_folder(["--config", str(path), "run.name=other"])
    assert capsys.readouterr().out == "runs/default/logs\n"


def test_a_mistake_ends_the_launcher_too(capsys):
    with pytest.raises(SystemExit) as ended:
        log_folder(["model=hybrid_tiny", "data.kind=synthetic", "run.dir="])
    assert ended.value.code == 2
    assert "run.dir = '': is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("path", "problem"), [("x" * 300, "cannot be read"), (".", "no such file"), ("none.yaml", "no such file")])
def test_a_saved_config_that_cannot_be_read(path, problem):
    with pytest.raises(ConfigError, match=rf"--config = .*: {problem}.*RUN_DIR/config\.yaml"):
        compose([], path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr=0.0"], r"optim\.lr = 0\.0: must be positive\. Set optim\.lr above 0$"),
        (["trainer.global_batch_size=0"], r"must be positive\. Set trainer\.global_batch_size to 1 or more$"),
        (["optim.lr=inf"], r"optim\.lr = inf: is not a finite number"),
        (["data.kind=indexed", "data.blend={a:inf}"], r"data\.blend\[a\] = inf: is not a finite number"),
        (["trainer.stop_after_samples=-1"], r"trainer\.stop_after_samples = -1: must be positive\. Use null"),
        (["lr=3e-4"], r"lr = 0\.0003: unknown setting\. Did you mean optim\.lr\?"),
        (["warmup_samples=5"], r"warmup_samples = 5: unknown setting\. Did you mean optim\.schedule\.warmup_samples\?"),
        (["optim.warmup_samples=5"], r"optim\.warmup_samples = 5: .*Did you mean optim\.schedule\.warmup_samples\?"),
        (["run.name=20240101"], r"run\.name = 20240101: expected str, got int\. Quote .* a number: run\.name=\\'20240101\\'$"),
    ],
)
def test_remedies_work(arguments, message):
    """And what they say to write is taken."""
    base = ["model=hybrid_tiny", "data.kind=synthetic", "trainer.train_samples=256"]
    with pytest.raises(ConfigError, match=message):
        compose([*base, *arguments])
    assert compose([*base, "run.name='20240101'"]).run.name == "20240101"
