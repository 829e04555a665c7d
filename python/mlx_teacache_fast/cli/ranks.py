"""``run`` as one of several ranks: a part of the command's seeds, and what is said once."""

import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from itertools import chain, repeat, zip_longest
from operator import itemgetter
from typing import Any, cast

from .._command import FAILED, PROG
from ..distributed import Group, check_equal, gathered, installed, share
from ..errors import (
    DisabledWarning,
    NoBenefitWarning,
    TeaCacheError,
    UncalibratedWarning,
    UntestedVersionWarning,
    one_line,
)
from ..record.stats import GenerationStats
from ..record.trace import Trace


@contextmanager
def said_once(group: Group | None) -> Iterator[None]:
    """Until the end of the block, stdout, progress bars and warnings that all ranks have are rank 0's alone."""
    with ExitStack() as undo:
        if group is not None and group.rank() > 0:
            if "TQDM_DISABLE" not in os.environ:
                os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
                undo.callback(os.environ.pop, "TQDM_DISABLE", None)
            undo.enter_context(redirect_stdout(sys.stderr))  # where mflux says why it failed
            undo.enter_context(warnings.catch_warnings())
            for category in (DisabledWarning, NoBenefitWarning, UncalibratedWarning, UntestedVersionWarning):
                warnings.simplefilter("ignore", category)
        yield


class NothingToDo(BaseException):
    """There are fewer seeds than ranks."""


class _Seeds(list[int]):
    """Of a loop that makes a picture of each."""

    n_done = 0

    def __iter__(self) -> Iterator[int]:
        self.n_done = 0
        for seed in super().__iter__():
            yield seed
            self.n_done += 1


class Rank:
    """What ``run`` does as one of several ranks.

    Args:
        group: All of them.
        shares: Whether each makes some of the pictures; else all work on each.
        **equal: What must be the same on all, beside the versions.

    Attributes:
        is_first: Whether this one writes what is said once.
    """

    def __init__(self, group: Group, shares: bool, **equal: Any) -> None:
        self.group = group
        self.is_first = group.rank() == 0
        self._shares = shares
        self._mine = _Seeds()
        self._places: list[int] = []  # of this rank's seeds among all
        self._failed = False
        check_equal(group, "start", **installed(), **equal)

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        """This rank's; NothingToDo if there are none. Rank 0's count: the clock or chance may have chosen them."""
        seeds = cast(list[int], self._gathered("seeds", list(seeds))[0])
        if not self._shares:
            return seeds
        mine = set(share(dict.fromkeys(seeds), self.group))  # of equal ones mflux numbers the files: on one rank
        self._places = [i for i, seed in enumerate(seeds) if seed in mine]
        self._mine = _Seeds(seeds[i] for i in self._places)
        if self.is_first:
            print(f"{PROG} run: {len(seeds)} pictures on {self.group.size()} ranks", file=sys.stderr)
        if not self._mine:
            raise NothingToDo
        return self._mine

    def finish(self, code: int, traces: Sequence[Trace]) -> tuple[int, list[Trace]]:
        """The exit code and the traces of all ranks, when all have ended; says what went wrong here."""
        if missing := list(self._mine[self._mine.n_done :]):
            code = code or FAILED
            named = ", ".join(map(str, missing))
            _say(f"rank {self.group.rank()} has not made seeds {named}")
        if self._failed or not self._shares:
            return code, list(traces)
        try:
            ends = self._gathered("end", [code, self._places, [trace.record for trace in traces]])
        except TeaCacheError as error:
            if code == 0:
                _say(str(error))
            return code or FAILED, list(traces)
        code = code or max(code for code, _, _ in ends)
        return code, _together([(places, list(map(Trace.of_record, records))) for _, places, records in ends])

    def leave(self) -> None:
        """When all is said here: mlx.launch ends the others as soon as one rank has ended with a code that is not 0."""
        if self._shares and not self._failed:
            with suppress(TeaCacheError):
                self._gathered("said", None)

    def _gathered(self, stage: str, value: Any) -> list[Any]:
        try:
            return gathered(self.group, stage, value)
        except BaseException:  # Ctrl-C too, after which this rank is not where the others are
            self._failed = True
            raise


def _say(error: str) -> None:
    print(f"{PROG} run: error: {one_line(error)}", file=sys.stderr)


def _together(of_ranks: Sequence[tuple[Sequence[int], Sequence[Trace]]]) -> list[Trace]:
    """Of each rank its pictures' places and its pipelines' traces: in the order in which one process would make them.

    What has no place, as of a program that did not ask for seeds, is behind, by rank.
    """
    merged = []
    for traces in zip_longest(*(traces for _, traces in of_ranks)):
        found = [(places, trace) for (places, _), trace in zip(of_ranks, traces, strict=True) if trace is not None]
        placed: list[tuple[float, GenerationStats]] = []
        for places, trace in found:
            placed += zip(chain(places, repeat(math.inf)), trace.generations, strict=False)
        generations = tuple(generation for _, generation in sorted(placed, key=itemgetter(0)))
        merged.append(replace(found[0][1], generations=generations))
    return merged
