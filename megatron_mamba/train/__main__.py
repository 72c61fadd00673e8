"""The command line of training, and the border behind which nothing knows Hydra.

``python -m megatron_mamba.train model=hybrid_tiny data.path=PREFIX trainer.train_samples=10000 run.dir=DIR`` composes
``configs/`` with the given options into a :class:`~megatron_mamba.config.Config` and trains it;
``--config RUN_DIR/config.yaml [SETTING=VALUE ...]`` starts from a saved configuration instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import re
import sys
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MappingNode, Node, SequenceNode, YAMLError

from megatron_mamba.config import Config, ConfigError, check_names, from_dict, require, to_dict, to_yaml
from megatron_mamba.files import one_line, reason

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
"""Hydra's folder of groups and options (a link to the repository's configs/, or package data in an installed wheel)."""

_PLAIN_INTERPOLATION = re.compile(r"\$\{\s*(required\s*:|[^:{}$]*\})")
"""Begins what a saved configuration may interpolate: the value of another setting, or what must be given."""
_ESCAPED = re.compile(r"(?<!\\)(\\\\)*\\\$\{")
"""A ``${`` that is text: an odd number of backslashes stands before it."""

_YAML_BYTES, _YAML_VALUES = 1 << 20, 50_000
"""Largest saved configuration, and the most values in it with its aliases written out: a run's has some hundred."""
_HYDRA_FLAGS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}
"""Flags with which Hydra prints something and starts nothing."""


def compose(overrides: Sequence[str], saved: str | Path | None = None) -> Config:
    """The checked configuration of a run.

    `overrides` are ``group=option`` and ``setting=value`` in Hydra's grammar; `saved` is a ``config.yaml`` written by an
    earlier run, which then takes the place of groups and defaults. Raises :class:`ConfigError`.
    """
    return from_dict(Config, compose_tree(overrides, saved)).validate()


def compose_tree(overrides: Sequence[str], saved: str | Path | None = None) -> dict[str, Any]:
    """As :func:`compose`, but plain data in which no value has been checked yet."""
    composed = _composed(overrides, saved)
    try:
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or ""
        if key.partition(".")[0] != "model":
            raise ConfigError(key, MISSING, "stands for a value that is missing", f"Set {key}=...") from error
        remedy = f"Choose one: {', '.join(config_groups()['model'])}"
        raise ConfigError("model", None, "is required and was not given", remedy) from error
    except OmegaConfBaseException as error:
        raise _as_config_error(error, overrides) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def composed_yaml(overrides: Sequence[str], saved: str | Path | None = None, *, resolve: bool = False) -> str:
    """What Hydra composes, as YAML that ``--config`` reads. Names are checked and values are not; what is missing is ???, and what
    refers to another value still does so unless `resolve`. Raises :class:`ConfigError`."""
    composed = _composed(overrides, saved)
    try:
        tree = OmegaConf.to_container(composed, resolve=resolve)
    except OmegaConfBaseException as error:
        raise _as_config_error(error, overrides) from error
    check_names(Config, tree)
    return to_yaml(tree, escape=resolve)


def _composed(overrides: Sequence[str], saved: str | Path | None) -> DictConfig:
    groups = config_groups()
    _register_defaults()
    name = "train" if saved is None else _register_saved(Path(saved).expanduser())
    arguments = [_argument(text, groups, saved is not None) for text in overrides]
    if any(argument.startswith("++data.blend=") for argument in arguments):
        # Another blend takes the place of a saved one: Hydra would merge the two.
        arguments.insert(0, "++data.blend=null")
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose(name, arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise _as_config_error(error, overrides) from error


def config_groups() -> dict[str, list[str]]:
    """Names of the options of every config group."""
    folders = sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def main() -> None:
    """Train what the command line says. Exit codes: 0 done, 2 input that cannot work, 1 training that cannot go on, 130
    interrupted before it began; all but the first with one message on stderr."""
    try:
        _main()
    except KeyboardInterrupt:
        print("interrupted: nothing was trained", file=sys.stderr)
        sys.exit(130)
    finally:
        _let_go_of_full_logs()


def _main() -> None:
    arguments, saved = _split(sys.argv[1:], "--config")
    rest, shown = _split(arguments, "--cfg", "-c")
    flags = [argument for argument in arguments if argument.startswith("-")]
    try:
        if shown == "job" and {*rest} & {*flags} <= {"--resolve"}:
            settings = [argument for argument in rest if argument not in flags]
            print(composed_yaml(settings, saved, resolve=settings != rest), end="")
            return
        if _HYDRA_FLAGS.intersection(flag.partition("=")[0] for flag in flags):
            require(saved is None, "--config", saved, f"does not go with {' '.join(flags)}", "Use --config FILE --cfg job")
            _register_defaults()
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")(lambda config: None)()
            return
        require(not flags, "command line", " ".join(flags), "unknown flag", "Known: --config FILE, --cfg job, --info, --help")
        config = compose(arguments, saved)
    except ConfigError as error:
        sys.exit(_report(error, 2))

    # Only now, so that a mistake in the options is told at once and not after PyTorch has been loaded.
    from megatron_mamba.checkpoint import CheckpointError
    from megatron_mamba.data.indexed import DataError
    from megatron_mamba.parallel.watchdog import crash, record
    from megatron_mamba.train.loop import train
    from megatron_mamba.train.resilience import TrainingError

    try:
        code = train(config)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        record(error)
        code = _report(error, 1 if isinstance(error, TrainingError) else 2)
    except Exception as error:
        crash(error)
    sys.exit(code)


def log_folder(arguments: Sequence[str]) -> None:
    """Print where launch/torchrun.sh leaves its logs for such a command line: run.dir/logs. Ends with code 2 and one message on
    stderr for one that cannot work."""
    rest, saved = _split(arguments, "--config")
    if any(argument.startswith("-") for argument in rest):  # To be told so, or to be shown something, by what is started.
        print("logs")
        return
    try:
        print(Path(compose(rest, saved).run.dir) / "logs")
    except ConfigError as error:
        sys.exit(_report(error, 2))


def _let_go_of_full_logs() -> None:
    """Keep the exit code what it is: Python makes it 120 where the last words find no room on the disk of a log."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, None)


def _report(error: Exception, code: int) -> int:
    with suppress(OSError):  # The disk of the log may be full; the exit code says it too.
        print(f"error: {error}", file=sys.stderr)
    return code


def _split(arguments: Sequence[str], *flags: str) -> tuple[list[str], str | None]:
    """Take ``FLAG VALUE`` or ``FLAG=VALUE`` out of the arguments; the value is None where no such flag is given."""
    rest, value, given = [], None, iter(arguments)
    for argument in given:
        flag, equals, text = argument.partition("=")
        if flag in flags:
            value = text if equals else next(given, "")
        else:
            rest.append(argument)
    return rest, value


# ------------------------------------------------------------------------------------------------ what Hydra composes


def _register_defaults() -> None:
    """Make the dataclasses' defaults the entry `schema` of train.yaml's defaults list, so that Hydra knows every setting,
    and ``${required:WHAT}`` a value that the user must give (a ??? would not replace a default of null)."""
    ConfigStore.instance().store(name="schema", node=_defaults(Config))
    OmegaConf.register_new_resolver("required", _required, replace=True)


def _required(what: str) -> None:
    raise LookupError(f"is required and was not given: {what}")


def _defaults(cls: type) -> dict[str, Any]:
    """The dataclass's defaults as plain data, with Hydra's ??? for what has none."""
    hints, tree = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            tree[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = to_dict(field.default_factory())
        else:
            hint = hints[field.name]
            tree[field.name] = _defaults(typing.cast(type, hint)) if dataclasses.is_dataclass(hint) else MISSING
    return tree


def _register_saved(path: Path) -> str:
    """Make a run's config.yaml a primary config; returns its name."""
    remedy = "Give the config.yaml of a run: --config RUN_DIR/config.yaml"
    try:
        saved = _load_yaml(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError("--config", str(path), "no such file", remedy) from error
    except OSError as error:
        raise ConfigError("--config", str(path), f"cannot be read ({reason(error)})", remedy) from error
    except RecursionError as error:
        raise ConfigError("--config", str(path), "is nested too deep for a configuration", remedy) from error
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError("--config", str(path), f"not a YAML file ({one_line(error)})", remedy) from error
    require(isinstance(saved, DictConfig) and "model" in saved, "--config", str(path), "holds no configuration of a run", remedy)
    for key in ("defaults", "hydra"):  # They would read other files, which nobody looks through.
        require(key not in saved, "--config", str(path), f"has the key {key}, which belongs to Hydra", f"Take it out. {remedy}")
    _refuse_resolvers(OmegaConf.to_container(saved, resolve=False), "", path)
    ConfigStore.instance().store(name="saved", node=saved)
    return "saved"


def _refuse_resolvers(tree: Any, key: str, path: Path) -> None:
    """Raise ConfigError where a file that may be a stranger's asks for more than its own values: ``${oc.env:TOKEN}`` would write
    the environment into checkpoints. The command line may, and ``${run.name}`` and ``${required:WHAT}`` stay."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            _refuse_resolvers(value, f"{key}.{name}".lstrip("."), path)
    elif isinstance(tree, list):
        for value in tree:
            _refuse_resolvers(value, key, path)
    elif isinstance(tree, str):
        plain = _PLAIN_INTERPOLATION.sub("", _ESCAPED.sub("", tree))
        require("${" not in plain, key, tree, f"{path} may refer to its own values only", f"Give it on the command line: {key}=...")


def _load_yaml(path: Path) -> Any:
    """The file as OmegaConf reads it, which copies whatever an alias names: only once it is known to stay small then."""
    with open(path, "rb") as file:
        content = file.read(_YAML_BYTES + 1)
    if len(content) > _YAML_BYTES:
        raise YAMLError(f"more than {_YAML_BYTES:,} bytes")
    text = content.decode("utf-8")
    if _written_out(yaml.compose(text, yaml.SafeLoader), {}) > _YAML_VALUES:
        raise YAMLError(f"more than {_YAML_VALUES:,} values once its aliases are written out")
    return OmegaConf.load(io.StringIO(text))


def _written_out(node: Node | None, sizes: dict[int, float]) -> float:
    """Number of values under `node` with aliases written out; infinite if it holds itself. `sizes`: of nodes met before."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inner = node.value if isinstance(node, SequenceNode) else []
        inner = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else inner
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in inner)
    return sizes[id(node)]


def _argument(text: str, groups: dict[str, list[str]], saved: bool) -> str:
    """One override, checked for its grammar. Settings get Hydra's ++, which leaves unknown ones to :func:`from_dict`: it
    knows the nearest name, and it lets a group that is off (trainer.batch_ramp=null) be switched on key by key."""
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError) as error:
        key, _, value = text.partition("=")
        remedy = f"Write SETTING=VALUE, with quotes around special characters: '{key}=\"...\"'"
        if key == "data.blend":
            remedy = f"Keys take no quotes: write such paths as a list, '{key}=[0.7,\"...\",0.3,\"...\"]'"
        raise ConfigError(key, value, "cannot be read", remedy) from error
    key, value = override.key_or_group, text.partition("=")[2]
    require(not override.is_sweep_override(), key, value, "several values",
            f"Write a list as {key}=[1,2], text with a comma as '{key}=\"a,b\"'")  # fmt: skip
    if override.type is not OverrideType.CHANGE:
        return text
    if key not in groups:
        return f"++{text}"
    require(not saved, key, value, "chooses an option of a group, but --config gives the whole configuration",
            f"Override single settings ({key}.NAME=VALUE), or leave out --config")  # fmt: skip
    near = difflib.get_close_matches(value, groups[key], n=1)
    hint = f"Did you mean {key}={near[0]}? " if near else ""
    require(override.value() in groups[key], key, value, "no such option", f"{hint}Known: {', '.join(groups[key])}")
    return text


# ------------------------------------------------------------------------------------------------------------- errors


def _as_config_error(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's or OmegaConf's complaint in our words."""
    problem = one_line(error).split(" full_key")[0].rstrip(".")
    key = getattr(error, "full_key", None)
    if key:  # of a value that refers to others
        return ConfigError(key, None, problem.rpartition("while resolving interpolation: ")[2], f"Set {key}=...")
    return ConfigError("command line", " ".join(overrides), problem, "See python -m megatron_mamba.train --help")


if __name__ == "__main__":
    main()
