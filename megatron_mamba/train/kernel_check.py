"""Before training: whether the fused kernels that this model uses compute the right thing, on this GPU with this compiler.

What passed is remembered by the versions, the device, the code of the kernels and the shape, so that only the first start looks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import mamba_kernels
from mamba_kernels import backend
from mamba_kernels.checking import Case, check
from megatron_mamba.config import Config
from megatron_mamba.data.indexed import atomic_write
from megatron_mamba.model.kernel_cases import kernel_cases
from megatron_mamba.parallel.context import ParallelContext, cache_folder
from megatron_mamba.train.resilience import TrainingError

log = logging.getLogger(__name__)

KNOWN_RIGHT = "torch 2.11 with Triton 3.6.0, whose ptxas is 12.8.93, on an H200"
"""What cases of tools/check_kernels.py have passed with; docs/kernels.md says which."""

REMEMBERED = 2000
"""Cases that the file holds at most; the oldest are dropped."""


class Checked(NamedTuple):
    """Of one rank."""

    host: str
    wrong: list[str]
    """Cases that failed, with their errors."""
    cases: int
    known: int
    """Cases that had passed before."""
    seconds: float


def check_kernels(config: Config, context: ParallelContext) -> Checked | None:
    """Check on every rank the kernels that it uses (a collective). None where no kernel is fused. Raises TrainingError on all ranks
    if one is wrong on any, with the figures and what to do."""
    probe = torch.empty(0, dtype=torch.bfloat16, device=context.device)
    cases = kernel_cases(config, context) if backend.use_fused(probe) else []
    if not cases:
        return None
    made_by = _made_by(context.device)
    memory = Memory(cache_folder() / "checked_kernels.json", made_by)
    begin = time.perf_counter()
    new, wrong = [case for case in cases if case not in memory], []
    for case in new:
        result = check(case, context.device)
        if result.passed:
            memory.add(case)
        else:
            bad = [f"{name} is off by {error:.2g}" for name, error in result.wrong.items()]
            wrong.append(f"{case}: {', '.join(bad)} (rounding explains {result.limit:.2g})")
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)
    memory.write()
    seconds = time.perf_counter() - begin
    own = Checked(context.job.get("host", "this host"), wrong, len(cases), len(cases) - len(new), seconds)
    everywhere: list[Checked] = context.gather(own)
    _refuse(everywhere, made_by)
    log.info("kernels: %d cases agree with float64 in %.1f s, %d had before (%s)", own.cases, seconds, own.known, memory.path)
    return own


def _refuse(everywhere: Sequence[Checked], made_by: str) -> None:
    """Raise if a rank found a wrong kernel."""
    ranks = [f"rank {rank} on {of.host}" for rank, of in enumerate(everywhere) if of.wrong]
    if not ranks:
        return
    lines = list(dict.fromkeys(line for of in everywhere for line in of.wrong))
    more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
    shown = "".join(f"\n  {line}" for line in lines[:8])
    raise TrainingError(
        f"fused kernels compute the wrong thing on {', '.join(ranks[:8])}{' and others' if len(ranks) > 8 else ''}, made by "
        f"{made_by}:{shown}{more}\n"
        "Nothing was trained. If only some of many ranks are named, take their machines out of service; otherwise it is the "
        f"compiler. Use another Triton (known to be right: {KNOWN_RIGHT}) or another assembler (TRITON_PTXAS_PATH=...), and try it "
        "with tools/check_kernels.py; or trainer.kernels=reference, which is slower and right. trainer.health_check=false does not "
        "look"
    )


def _made_by(device: torch.device) -> str:
    """The compiler, in words."""
    if device.type != "cuda":
        return "Triton's interpreter"
    from mamba_kernels.checking.fused import toolchain

    return toolchain()


class Memory:
    """What has passed, in a file that processes share: a line of JSON a case, by a digest of all that its result depends on."""

    def __init__(self, path: Path, made_by: str) -> None:
        """Read the file. One that is not there, or not one of ours, holds nothing."""
        self.path, self.made_by, self.code = path, made_by, _digest_of_kernels()
        self.new: dict[str, str] = {}
        self.passed = self._read()

    def __contains__(self, case: Case) -> bool:
        return self._key(case) in self.passed

    def add(self, case: Case) -> None:
        """Remember a case."""
        self.new[self._key(case)] = f"{case}, {self.made_by}"

    def write(self) -> None:
        """Add the new cases to the file, at once. A folder that cannot be written costs the next start a check, and no more."""
        if not self.new:
            return
        kept = dict(list((self._read() | self.new).items())[-REMEMBERED:])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(kept, indent=0).encode())
        except OSError as error:
            log.warning("kernels that were checked will be checked again at the next start: %s", error)

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _key(self, case: Case) -> str:
        return hashlib.sha256(f"{self.code} {self.made_by} {case}".encode()).hexdigest()[:32]


def _digest_of_kernels() -> str:
    """Of every file of the kernels, measured configurations too."""
    folder, digest = Path(mamba_kernels.__file__).parent, hashlib.sha256()
    for file in sorted([*folder.rglob("*.py"), *folder.glob("*.json")]):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
