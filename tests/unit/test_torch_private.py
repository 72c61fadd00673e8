"""The table of torch's private names: whole, and true of the torch at hand; and what does without those that are gone."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mamba.parallel import torch_private
from megatron_mamba.parallel.torch_private import NAMES, Private

ROOT = Path(__file__).parents[2]
NOT_TORCH = {"_make", "_replace", "_asdict", "_fields", "_exit", "_C"}
"""Of named tuples, of os, and the module that others are in."""

MODULES = ("torch.testing._internal.distributed.fake_pg", "torch.utils._python_dispatch", "torch.utils._pytree")


def is_there(private: Private) -> bool:
    module, _, path = private.name.partition(":")
    found: object = torch.ops.aten if module == "torch.ops.aten" else importlib.import_module(module)
    for part in path.split("."):
        if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
            # Attributes of instances are set in their class's own code.
            source = getattr(found, "__init__", None)
            return source is not None and part in getattr(getattr(source, "__code__", None), "co_names", ())
        found = getattr(found, part, None)
    return True


def gone(private: Private) -> bool:
    version = [int(part) for part in torch.__version__.split("+")[0].split(".")[:2]]
    return bool(private.until) and version >= [int(part) for part in private.until.split(".")]


def test_no_name_is_missing_in_this_torch() -> None:
    """Lists those that are: with a new torch, the first thing to look at."""
    here = [name for name in NAMES if not gone(name) and (not name.needs or torch.version.cuda is not None)]
    missing = [f"{name.name} ({name.why})" for name in here if not is_there(name)]
    assert not missing, f"torch {torch.__version__} lacks {missing}"
    back = [name.name for name in NAMES if gone(name) and is_there(name)]
    assert not back, f"torch {torch.__version__} has again {back}"


def private_names(path: Path) -> set[str]:
    """Attributes with an underscore that the file reads, and what it imports from modules with one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found |= {alias.name for alias in node.names}
    return found


def own_names(path: Path) -> set[str]:
    """What the file defines or assigns."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def test_the_table_names_what_the_product_uses_and_no_more() -> None:
    files = [file for folder in ("megatron_mamba", "kernels") for file in (ROOT / folder).rglob("*.py")]
    ours = set().union(*map(own_names, files)) - {"_get_init_p2p_neighbors_ops"}
    used = set().union(*map(private_names, files)) - ours - NOT_TORCH
    # Beside the table's own file, where names are text, its functions use some.
    table = {name.last_part for name in NAMES}
    assert used <= table | {"_fsdp_param_group", "_distributed_c10d"}, f"not in the table: {sorted(used - table)}"
    texts = [file.read_text(encoding="utf-8") for file in files if file.name != "torch_private.py"]
    texts.append((ROOT / "megatron_mamba/parallel/torch_private.py").read_text(encoding="utf-8").partition("\n)\n")[2])
    unused = [name.name for name in NAMES if not any(name.last_part in text for text in texts)]
    assert not unused


def test_gradients_are_kept_with_and_without_the_names() -> None:
    """torch before 2.15 is told to; later ones have done it."""
    calls: list[str] = []
    names = ("accumulate_unsharded_grad_if_needed", "to_accumulated_grad_if_needed")
    old = SimpleNamespace(**{name: (lambda name=name: calls.append(name)) for name in names})
    torch_private.keep_gradients([old, SimpleNamespace(), old])
    assert calls == [*names] * 2


@pytest.mark.parametrize("group", [None, SimpleNamespace(fsdp_params=["a", "b"])])
def test_parameters_of_a_unit_of_torch_2_11_and_later(group: object) -> None:
    params = [] if group is None else ["a", "b"]
    old = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_group=group))
    new = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_groups=[] if group is None else [group]))
    assert torch_private.unit_parameters(old) == torch_private.unit_parameters(new) == params


@pytest.mark.parametrize(
    ("version", "recorder", "found"), [((2, 13), "nccl2", b"."), ((2, 15), "nccl2", b"nccl2: two"), ((2, 15), "", b".")]
)
def test_last_collectives_are_those_of_the_backend_in_use(version, recorder, found, monkeypatch) -> None:
    c10d = torch._C._distributed_c10d
    monkeypatch.setattr(torch_private, "VERSION", version)
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: b".", raising=False)
    monkeypatch.setattr(c10d, "_dump_fr_trace", lambda backend: b"nccl2: two" if backend == recorder else b"-", raising=False)
    assert torch_private.last_collectives() == found
