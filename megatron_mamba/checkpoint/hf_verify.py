"""Comparison of an exported folder, as transformers computes it, with the model it came from."""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mamba.checkpoint.hf_classes import CLASSES, HFExportError, needed

CACHE_ARGUMENTS = ("cache", "cache_params", "past_key_values")
"""Newest first: transformers 5.24; Mamba's classes up to 5.23; all others up to 5.23."""


@dataclass(frozen=True)
class Difference:
    """Largest difference of logits, absolute and relative to the largest reference logit, and where it occurred."""

    absolute: float
    relative: float
    where: str


def compare(
    folder: Path | str,
    logits: Callable[[Tensor], Tensor],
    tokens: list[int],
    *,
    decode: int = 16,
    device: torch.device | str = "cpu",
) -> Difference:
    """Difference of fp32 logits between transformers on `folder` and `logits` (ids `[1, S]` -> `[1, S, V]`) on `tokens`.

    transformers prefills all but the last `decode` tokens and then takes those one at a time with its cache, so that both
    of its paths are compared. Raises :class:`HFExportError` where the installed transformers is known to compute the
    class wrongly.
    """
    ids = torch.tensor([tokens], device=device)
    split = len(tokens) - decode
    with torch.no_grad():
        reference = logits(ids)[0].float().cpu()
        model = _load(Path(folder)).to(device)
        name = _cache_argument(model)
        output = model(input_ids=ids[:, :split], use_cache=True)
        rows = [output.logits[0].float().cpu()]
        for i in range(split, len(tokens)):
            output = model(input_ids=ids[:, i : i + 1], use_cache=True, **{name: getattr(output, name)})
            rows.append(output.logits[0].float().cpu())
    error = (torch.cat(rows) - reference).abs().amax(dim=-1)
    worst = int(error.argmax())
    part = "prefill" if worst < split else "cached decoding"
    # A NaN anywhere must come out as a failure, and max() alone keeps it.
    absolute = float(error.max())
    return Difference(absolute, absolute / float(reference.abs().max()), f"{part}, position {worst} of {len(tokens)}")


def sample_tokens(folder: Path | str, vocab_size: int, length: int) -> list[int]:
    """`length` ids of real text (the Python library's source) if the folder has a tokenizer, else random ids."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    from tokenizers import Tokenizer

    tokenizer, ids = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).ids
        if len(ids) >= length:
            break
    return ids[:length]


def _cache_argument(model: Any) -> str:
    """What the model's forward calls its cache. Another name is taken in silence and ignored."""
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in parameters:
            return name
    raise HFExportError(
        f"{type(model).__name__} takes its cache under none of the names {', '.join(CACHE_ARGUMENTS)}: install a transformers that "
        "was tried (README.md)"
    )


def _load(folder: Path) -> Any:
    transformers = needed("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    since = next(cls.since for cls in CLASSES if cls.model_type == config.model_type)
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if installed < tuple(int(part) for part in since.split(".")[:2]):
        raise HFExportError(f"transformers {transformers.__version__}: {config.architectures[0]} needs {since} or newer")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    return model.eval()
