"""The rules that keep the code small and one-way, read from the source with `ast`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("megatron_mamba", "kernels", "tools")
ORDER = [
    "mamba_kernels", "schema", "files", "progress", "layout", "architecture", "config", "parallel", "model", "data", "optim",
    "checkpoint", "generate", "train", "evaluate", "tools",
]  # fmt: skip
"""A module imports only its own package and those to the left of it."""

FILE_LINES, FUSED_LINES = 500, 700
FUNCTION_LINES, KERNEL_LINES = 100, 200
# Fused kernels: 4,700; their benchmark: 1,450; checks of them: 1,000; what watches over a run: 850; start-up: 330; torch's private
# names: 90.
PRODUCT_LINES = 24_400


@dataclass(frozen=True)
class Source:
    """One Python file: its path below the root, its text and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def product(self) -> bool:
        return self.path.parts[0] in PRODUCT

    @property
    def module(self) -> list[str]:
        """Dotted name in parts; a package's is that of its folder."""
        parts = list(self.path.with_suffix("").parts)
        parts = parts[1:] if parts[0] == "kernels" else parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def within(self, *folders: str) -> bool:
        return any(self.path.is_relative_to(folder) for folder in folders)

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


@lru_cache(maxsize=1)
def sources(root: Path) -> tuple[Source, ...]:
    """Every Python file of the product and the tests below `root`."""
    files = sorted(file for folder in (*PRODUCT, "tests") for file in (root / folder).rglob("*.py"))
    texts = [(file.relative_to(root), file.read_text(encoding="utf-8")) for file in files]
    return tuple(Source(path, text, ast.parse(text, str(path))) for path, text in texts)


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every (node, absolute dotted name) that the file imports; ``from a import b`` is a.b."""
    is_package = source.path.name == "__init__.py"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = source.module[: len(source.module) - up] if node.level else []
            names = [*base, *([node.module] if node.module else [])]
            yield from ((node, ".".join([*names, alias.name])) for alias in node.names)


def mentions(source: Source, *names: str) -> Iterator[tuple[ast.AST, str]]:
    """Imports of, or attribute chains through, one of the dotted `names`."""
    seen = [(node, name) for node, name in imports(source)]
    seen += [(node, ast.unparse(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    lines = set()
    for node, found in seen:
        for name in names:
            if (found == name or found.startswith(f"{name}.")) and (source.at(node), name) not in lines:
                lines.add((source.at(node), name))
                yield node, name


def _package(module: list[str]) -> str | None:
    """The entry of ORDER that a dotted name belongs to; None for other libraries and for the bare top package."""
    if module[0] == "megatron_mamba":
        return module[1] if len(module) > 1 and module[1] in ORDER else None
    return module[0] if module[0] in ("mamba_kernels", "tools") else None


# --------------------------------------------------------------------------------------------------------------- rules


def one_way_imports(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        own = _package(source.module)
        if not source.product or own is None:
            continue
        for node, name in imports(source):
            other = _package(name.split("."))
            if other is not None and ORDER.index(other) > ORDER.index(own):
                yield f"{source.at(node)}: {own} imports {name}; imports go one way: {' <- '.join(ORDER)}"


def known_packages(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        if source.module[0] == "megatron_mamba" and len(source.module) > 1 and source.module[1] not in ORDER:
            yield f"{source.path}:1: megatron_mamba.{source.module[1]} has no place in the order of imports; add it to ORDER"


def kernels_stand_alone(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        if source.within("kernels"):
            for node, name in imports(source):
                top = name.split(".")[0]
                if top not in ("torch", "triton", "mamba_kernels") and top not in sys.stdlib_module_names:
                    yield f"{source.at(node)}: mamba_kernels imports {name}; it may import only torch (and triton in fused.py)"


def triton_only_in_fused(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        if source.product and not (source.within("kernels") and source.path.name == "fused.py"):
            for node, name in mentions(source, "triton"):
                yield f"{source.at(node)}: {name} outside kernels/mamba_kernels/<op>/fused.py"


def distributed_only_in_parallel(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        if source.product and not source.within("megatron_mamba/parallel", "megatron_mamba/checkpoint"):
            for node, name in mentions(source, "torch.distributed"):
                yield f"{source.at(node)}: {name} outside megatron_mamba/parallel and megatron_mamba/checkpoint"


def hydra_only_in_main(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        if source.product and source.path.name != "__main__.py":
            for node, name in mentions(source, "hydra", "omegaconf"):
                yield f"{source.at(node)}: {name} outside a __main__ module"


def environment_only_in_context(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        if source.within("megatron_mamba") and source.path != Path("megatron_mamba/parallel/context.py"):
            for node, name in mentions(source, "os.environ", "os.getenv", "os.environb"):
                yield f"{source.at(node)}: {name} outside megatron_mamba/parallel/context.py"


def file_length(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        limit = FUSED_LINES if source.path.name == "fused.py" else FILE_LINES
        if source.lines > limit:
            yield f"{source.path}:{limit + 1}: file of {source.lines} lines; the limit is {limit}"


def function_length(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                limit = KERNEL_LINES if kernel else FUNCTION_LINES
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > limit:
                    yield f"{source.at(node)}: {node.name} has {length} lines; the limit is {limit}"


def product_length(files: tuple[Source, ...]) -> Iterator[str]:
    total = sum(source.lines for source in files if source.product)
    if total > PRODUCT_LINES:
        yield f"{', '.join(PRODUCT)}:1: {total} lines of product; the limit is {PRODUCT_LINES}"


def public_docstrings(files: tuple[Source, ...]) -> Iterator[str]:
    for source in files:
        for node in source.tree.body if source.product else []:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{source.at(node)}: public {node.name} has no docstring"


RULES: list[Callable[[tuple[Source, ...]], Iterator[str]]] = [
    one_way_imports, known_packages, kernels_stand_alone, triton_only_in_fused, distributed_only_in_parallel, hydra_only_in_main,
    environment_only_in_context, file_length, function_length, product_length, public_docstrings,
]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule):
    violations = list(rule(sources(ROOT)))
    assert not violations, "\n" + "\n".join(violations)


def test_source_was_found():
    modules = {".".join(source.module) for source in sources(ROOT)}
    assert {"megatron_mamba.config", "mamba_kernels.ssd.reference", "tools.plan", "tests.unit.test_architecture"} <= modules


LONG_BODY = "\n".join("    x = 1" for _ in range(100))
PLANTED = [
    (one_way_imports, "megatron_mamba/model/lm.py", "import torch\nfrom megatron_mamba.train import loop\n", 2),
    (one_way_imports, "megatron_mamba/config.py", "def f():\n    import megatron_mamba.parallel.context\n", 2),
    (one_way_imports, "megatron_mamba/parallel/x.py", "from megatron_mamba import optim\n", 1),
    (one_way_imports, "megatron_mamba/data/x.py", "from ..checkpoint import sharded\n", 1),
    (one_way_imports, "megatron_mamba/data/__init__.py", "from .. import checkpoint\n", 1),
    (one_way_imports, "kernels/mamba_kernels/ssd/reference.py", "from megatron_mamba.config import Config\n", 1),
    (one_way_imports, "megatron_mamba/train/loop.py", "from tools import plan\n", 1),
    (known_packages, "megatron_mamba/utils/x.py", "", 1),
    (kernels_stand_alone, "kernels/mamba_kernels/ssd/reference.py", "import math\nimport numpy as np\n", 2),
    (triton_only_in_fused, "kernels/mamba_kernels/ssd/__init__.py", "import triton.language as tl\n", 1),
    (triton_only_in_fused, "megatron_mamba/model/fused.py", "def f():\n    from triton import jit\n", 2),
    (distributed_only_in_parallel, "megatron_mamba/model/lm.py", "import torch.distributed as dist\n", 1),
    (distributed_only_in_parallel, "megatron_mamba/train/loop.py", "from torch import distributed\n", 1),
    (distributed_only_in_parallel, "tools/x.py", "import torch\n\ntorch.distributed.barrier()\n", 3),
    (hydra_only_in_main, "megatron_mamba/train/loop.py", "from omegaconf import OmegaConf\n", 1),
    (hydra_only_in_main, "tools/plan.py", "import hydra\n", 1),
    (environment_only_in_context, "megatron_mamba/train/loop.py", "import os\n\nrank = os.environ['RANK']\n", 3),
    (environment_only_in_context, "megatron_mamba/data/x.py", "from os import getenv\n", 1),
    (file_length, "tools/x.py", "x = 1\n" * 501, 501),
    (file_length, "kernels/mamba_kernels/ssd/fused.py", "x = 1\n" * 701, 701),
    (file_length, "tests/unit/test_x.py", "x = 1\n" * 501, 501),
    (function_length, "tools/x.py", f"\ndef f():\n{LONG_BODY}\n", 2),
    (function_length, "kernels/mamba_kernels/ssd/fused.py", f"@triton.jit\ndef f():\n{LONG_BODY}\n{LONG_BODY}\n", 2),
    (public_docstrings, "tools/x.py", "def f():\n    return 1\n", 1),
    (public_docstrings, "megatron_mamba/model/x.py", "class A:\n    x: int\n", 1),
]  # fmt: skip
ALLOWED = [
    (one_way_imports, "megatron_mamba/train/loop.py", "from megatron_mamba.model import build\nimport mamba_kernels\n"),
    (one_way_imports, "megatron_mamba/model/lm.py", "from .attention import Attention\nfrom ..parallel import context\n"),
    (kernels_stand_alone, "kernels/mamba_kernels/ssd/reference.py", "import math\nimport torch.nn.functional as F\n"),
    (triton_only_in_fused, "kernels/mamba_kernels/ssd/fused.py", "import triton\n"),
    (distributed_only_in_parallel, "megatron_mamba/parallel/context.py", "import torch.distributed as dist\n"),
    (distributed_only_in_parallel, "megatron_mamba/checkpoint/x.py", "from torch.distributed.checkpoint import save\n"),
    (distributed_only_in_parallel, "tests/harness.py", "import torch.distributed as dist\n"),
    (hydra_only_in_main, "megatron_mamba/generate/__main__.py", "import hydra\n"),
    (environment_only_in_context, "megatron_mamba/parallel/context.py", "import os\nos.environ['RANK']\n"),
    (file_length, "kernels/mamba_kernels/ssd/fused.py", "x = 1\n" * 700),
    (function_length, "kernels/mamba_kernels/ssd/fused.py", f"@triton.jit\ndef f():\n{LONG_BODY}\n"),
    (public_docstrings, "megatron_mamba/model/x.py", "def _f():\n    return 1\n"),
]  # fmt: skip


def _plant(root: Path, path: str, text: str) -> tuple[Source, ...]:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(text, encoding="utf-8")
    return sources(root)


@pytest.mark.parametrize(("rule", "path", "text", "line"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_rule_finds_a_planted_violation(tmp_path, rule, path, text, line):
    (message,) = rule(_plant(tmp_path, path, text))
    assert message.startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED, ids=lambda value: getattr(value, "__name__", None))
def test_rule_lets_pass_what_is_right(tmp_path, rule, path, text):
    assert not list(rule(_plant(tmp_path, path, text)))


def test_product_length_counts_the_product_only():
    def file(path: str, lines: int) -> Source:
        return Source(Path(path), "x = 1\n" * lines, ast.parse(""))

    files = (file("megatron_mamba/a.py", 7000), file("kernels/mamba_kernels/b.py", PRODUCT_LINES - 7000), file("tests/c.py", 9000))
    assert not list(product_length(files))
    (message,) = product_length((*files, file("tools/d.py", 1)))
    assert f"{PRODUCT_LINES + 1} lines" in message
