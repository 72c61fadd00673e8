"""How far a run has read each of its corpora, so that it goes on with another blend, repeats nothing and leaves nothing out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_mamba.config import ConfigError, DataConfig
from megatron_mamba.data.blend import Blend, blend_counts

SYNTHETIC = "synthetic"
"""What stands for the prefix and the contents of data.kind=synthetic."""


@dataclass(frozen=True)
class Corpus:
    """A corpus of a run. Which documents its sample n holds depends on `contents`, `seed`, `seq_length` and `split`."""

    prefix: str
    weight: float
    """In the blend; 0: the run read it once, and keeps in mind how far."""
    seed: int
    seq_length: int
    split: list[float]
    contents: str | None = None
    """Its fingerprint; None: in a checkpoint from before there were any."""
    before: int = 0
    """Samples of it that were read before the blend began."""

    def is_read_alike(self, other: Corpus, name: str) -> bool:
        """Whether the setting `name` is the same for both, or gives the same samples."""
        mine, theirs = getattr(self, name), getattr(other, name)
        if name != "split":
            return bool(mine == theirs)
        return all(math.isclose(a * sum(theirs), b * sum(mine)) for a, b in zip(mine, theirs, strict=False))


@dataclass(frozen=True)
class Standing:
    """The corpora of a run, in the order in which its blend knows them, and the sample of the run at which that blend began."""

    corpora: tuple[Corpus, ...]
    since: int = 0

    @classmethod
    def of_config(cls, data: DataConfig) -> Standing:
        """Of a run that begins."""
        blend = {SYNTHETIC: 1.0} if data.kind == "synthetic" else data.blend or {str(data.path): 1.0}
        contents, split = (SYNTHETIC, []) if data.kind == "synthetic" else (None, list(data.split))
        return cls(tuple(Corpus(prefix, weight, data.seed, data.seq_length, split, contents) for prefix, weight in blend.items()))

    @classmethod
    def of_checkpoint(cls, metadata: dict[str, Any]) -> Standing:
        """Of the run that saved a checkpoint; one from before standings were kept has that of its settings."""
        if "data" in metadata:
            saved = metadata["data"]
            return cls(tuple(Corpus(**corpus) for corpus in saved["corpora"]), saved["since"])
        settings = metadata["config"]["data"]
        return cls.of_config(DataConfig(**{f.name: settings[f.name] for f in fields(DataConfig) if f.name in settings}))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @property
    def weights(self) -> dict[str, float]:
        """Of the corpora in the blend, by prefix."""
        return {corpus.prefix: corpus.weight for corpus in self.corpora if corpus.weight}

    @property
    def befores(self) -> list[int]:
        """Samples of each corpus in the blend that were read before it began."""
        return [corpus.before for corpus in self.corpora if corpus.weight]

    def read(self, position: int) -> list[int]:
        """How many samples of each of the corpora the first `position` samples of the run hold."""
        taken = iter(Blend(self.weights).taken(position - self.since))
        return [corpus.before + (next(taken) if corpus.weight else 0) for corpus in self.corpora]

    def filled(self, contents: dict[str, str]) -> Standing:
        """With the fingerprints of the corpora."""
        return replace(self, corpora=tuple(replace(c, contents=contents.get(c.prefix, c.contents)) for c in self.corpora))

    def continued(self, now: Standing, position: int, anew: bool) -> tuple[Standing, list[str]]:
        """The standing of a run that goes on at sample `position` with the corpora of `now`, and what has changed, in words.

        A corpus is known by its contents. It goes on where it stood, whatever the blend; one that was not in it begins at its first
        sample. A blend that is the same but for names and order goes on as if nothing had changed. Raises ConfigError for
        a corpus that would repeat samples or mix the splits, because it is read otherwise than before or was replaced;
        with `anew` it begins at its first sample.
        """
        was = self.read(position)
        matches = self._matches(now.corpora)
        corpora, begun, changes = list(now.corpora), False, []
        for number, corpus in enumerate(now.corpora):
            old = next((old for old, new in matches.items() if new == number), None)
            problem = self._problem(corpus, old, was, matches)
            if problem is not None and not anew:
                raise problem
            if old is None or problem is not None:
                begun = True
                changes.append(f"{corpus.prefix} begins at its first sample" + (f": {problem.problem}" if problem else ""))
                continue
            corpora[number] = replace(corpus, before=was[old])
            if self.corpora[old].prefix != corpus.prefix:
                changes.append(f"{self.corpora[old].prefix} is now {corpus.prefix}")
        kept = [
            corpora[matches[old]] if old in matches else replace(corpus, weight=0.0, before=was[old])
            for old, corpus in enumerate(self.corpora)
        ]
        added = [corpus for number, corpus in enumerate(corpora) if number not in matches.values()]
        following = Standing((*kept, *added), position)
        if not begun and self._blend() == following._blend():
            befores = [corpus.before for corpus in self.corpora]
            same = tuple(replace(corpus, before=before) for corpus, before in zip(kept, befores, strict=True))
            return Standing(same, self.since), changes
        for before, after in zip(self.corpora, kept, strict=True):
            shares = [f"{c.weight / sum(s.weights.values()):.4g}" for c, s in ((before, self), (after, following))]
            if shares[0] != shares[1]:
                changes.append(f"{after.prefix}: share {shares[0]} -> {shares[1]} after {after.before:,} samples")
        return following, changes

    def _blend(self) -> list[int]:
        counts = iter(blend_counts(self.weights))
        return [next(counts) if corpus.weight else 0 for corpus in self.corpora]

    def _matches(self, corpora: Iterable[Corpus]) -> dict[int, int]:
        """Number of each corpus that is still there -> its number in `corpora`; copies are told apart by their places."""
        found: dict[int, int] = {}
        for by_place in (True, False):
            for new, corpus in enumerate(corpora):
                for old, known in enumerate(self.corpora):
                    same = known.contents == corpus.contents or (by_place and known.contents is None)
                    free = old not in found and new not in found.values()
                    if same and free and (not by_place or _same_place(known, corpus)):
                        found[old] = new
        return found

    def _problem(self, corpus: Corpus, old: int | None, was: Sequence[int], matches: dict[int, int]) -> ConfigError | None:
        """Why a corpus cannot go on, or begin beside what the run has read."""
        restart = "begin the corpus anew with data.on_change=restart"
        if old is not None:
            known = self.corpora[old]
            for name in ("seed", "seq_length", "split"):
                if was[old] and not known.is_read_alike(corpus, name):
                    before, after = getattr(known, name), getattr(corpus, name)
                    problem = f"{before!r} -> {after!r} gives other samples of {corpus.prefix} than the {was[old]:,} that were read"
                    return ConfigError(f"data.{name}", after, problem, f"Set it back, or {restart}")
            return None
        for number, known in enumerate(self.corpora):
            if number in matches or not was[number]:
                continue
            if _same_place(known, corpus):
                problem = f"its contents are others than when {was[number]:,} samples were read (fingerprint {known.contents} -> "
                return ConfigError("data.path", corpus.prefix, f"{problem}{corpus.contents})", f"Put them back, or {restart}")
            if known.contents is None:
                problem = f"{was[number]:,} samples of {known.prefix} were read, and no fingerprint tells whether this is it, moved"
                return ConfigError("data.path", corpus.prefix, problem, f"Name the corpus as it was named, or {restart}")
        return None


def _same_place(one: Corpus, other: Corpus) -> bool:
    return os.path.abspath(one.prefix) == os.path.abspath(other.prefix)
