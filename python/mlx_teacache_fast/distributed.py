"""More than one machine, by MLX's own engine: pictures shared out, or the guidance's two branches side by side.

``mlx.launch`` starts the processes and ``mx.distributed`` moves the data. docs/distributed.md says how.
"""

import base64
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, starmap
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from .errors import TeaCacheError, TeaCacheValueError, TeaCacheWarning, shown, version_of, warn_caller
from .step.captured import Captured
from .step.tap import Make, Step

Group = mx.distributed.Group
T = TypeVar("T")


# ---- The ranks

# Of how many processes the two kinds of mpirun say that they have started. mlx.launch sets MLX_RANK.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# MLX's errors begin with the backend's name.
_BACKENDS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")


@functools.cache
def world() -> Group | None:
    """All ranks that ``mlx.launch`` or ``mpirun`` started; None in one process, where MLX's engine stays off.

    Raises:
        TeaCacheError: The engine does not start, or not with mpirun's other processes.
    """
    hosts = os.environ.get("MLX_HOSTFILE")
    is_one = hosts is not None and Path(hosts).is_file() and not Path(hosts).read_text().strip()  # mlx.launch -n 1
    n_started = max(int(size) if (size := os.environ.get(name, "")).isdecimal() else 1 for name in _SIZES)
    if is_one or (n_started == 1 and "MLX_RANK" not in os.environ):
        return None
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise TeaCacheError(f"MLX's distributed engine does not start: {error}") from error
    if group.size() == 1 and n_started > 1:  # each would make all pictures, in the same files
        raise TeaCacheError(f"mpirun has started {n_started} processes, and MLX's engine finds only this one")
    return group if group.size() > 1 else None


@contextmanager
def others_wanted() -> Iterator[None]:
    """Raises TeaCacheError where MLX finds that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_BACKENDS):
            raise
        raise TeaCacheError(f"another rank is gone: {error}") from error


def check_group(group: object) -> None:
    """TeaCacheValueError if it is no group of ranks, and not None."""
    if not isinstance(group, Group | None):
        raise TeaCacheValueError(f"group must be of mx.distributed, as init() returns it, got {shown(group)}")


def share(items: Iterable[T], group: Group | None = None) -> list[T]:
    """This rank's part of the items.

    Args:
        items: The same on all ranks.
        group: Of ranks; left out: all that ``mlx.launch`` started.

    Returns:
        list: Of N items on R ranks those at ``rank, rank + R, rank + 2 R, ...``: N // R of them, or one more, and none
            where there are fewer items than ranks. In one process all.

    Raises:
        TeaCacheValueError: ``group`` is none.
        TeaCacheError: MLX's engine does not start.
    """
    check_group(group)
    group = world() if group is None else group
    return list(items) if group is None else list(items)[group.rank() :: group.size()]


def gathered(group: Group, stage: str, value: Any) -> list[Any]:
    """What each rank gives, of JSON's kinds and bytes, by rank. All must call this, at the same ``stage``.

    Raises:
        TeaCacheError: Another rank is gone, or is at another stage: there something failed.
    """
    text = json.dumps([stage, value], default=_encoded).encode()
    with others_wanted():
        sizes = cast(list[int], mx.distributed.all_gather(mx.array([len(text)]), group=group).tolist())
        padded = mx.array(cast(Any, memoryview(text.ljust(max(sizes)))))
        rows = mx.distributed.all_gather(padded[None], group=group)
        mx.eval(rows)  # here an error is raised; where bytes() reads it, it would end the process
        given = [json.loads(bytes(cast(Any, row)), object_hook=_decoded) for row in rows]
    for rank, (its_stage, _) in enumerate(given):
        if its_stage != stage:
            raise TeaCacheError(f"rank {rank} failed, which its own message is about")
    return [value for _, value in given]


def _encoded(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is none of JSON's kinds")
    return {"base64": base64.b64encode(value).decode()}


def _decoded(data: dict[str, Any]) -> Any:
    return base64.b64decode(data["base64"]) if data.keys() == {"base64"} else data


def check_equal(group: Group, stage: str, /, **values: Any) -> None:
    """Raises TeaCacheValueError on all ranks where one has another value than rank 0; another ``chip`` is a warning."""
    first, *others = gathered(group, stage, values)
    for rank, other in enumerate(others, 1):
        for name in first | other:
            if (a := first.get(name)) == (b := other.get(name)):
                continue
            if name == "chip":
                if group.rank() == 0:
                    _warn_of_chips(f"rank 0 has {a} and rank {rank} {b}: the last bits of what they compute may differ")
                continue
            raise TeaCacheValueError(
                f"{name} must be the same on all ranks, got {shown(a)} on rank 0 and {shown(b)} on rank {rank}"
            )


@functools.cache
def _warn_of_chips(message: str) -> None:
    """Once in a process."""
    warn_caller(message, TeaCacheWarning)


def installed() -> dict[str, str | None]:
    """What must be the same on all machines, and the chip, which may be another one."""
    chip = str(mx.device_info(mx.default_device()).get("device_name"))
    return {"chip": chip} | {name: version_of(name) for name in ("mlx-teacache-fast", "mlx", "mflux")}


# ---- Jobs that rank 0 has and all ranks do


def done(make: Callable[..., Any], jobs: Sequence[Sequence[Any]], group: Group | None) -> Iterator[Any]:
    """What ``make`` gives of each of rank 0's jobs, in their order; the others call ``assist`` meanwhile.

    Of as many jobs as there are ranks each rank does one, then of the next ones. In one process all, one by one.

    Args:
        make: The same on all ranks.
        jobs: ``make``'s arguments, of JSON's kinds, as is what it gives, or bytes.

    Raises:
        TeaCacheError: Another rank is gone.
    """
    if group is None:
        return starmap(make, jobs)
    gathered(group, "jobs", jobs)
    return _in_rounds(make, jobs, group)


def assist(make: Callable[..., Any], group: Group) -> Any:
    """Do this rank's part of what rank 0 has ``done``, until it says what this returns, by ``dismiss``."""
    while isinstance(jobs := gathered(group, "jobs", None)[0], list):
        for _ in _in_rounds(make, jobs, group):
            pass
    return jobs


def dismiss(value: dict[str, Any], group: Group) -> None:
    """Rank 0 has no more jobs."""
    gathered(group, "jobs", value)


def _in_rounds(make: Callable[..., Any], jobs: Sequence[Sequence[Any]], group: Group) -> Iterator[Any]:
    n = group.size()
    rounds = (share(jobs[i : i + n], group) for i in range(0, len(jobs), n))
    return chain.from_iterable(chain.from_iterable(gathered(group, "done", list(starmap(make, own))) for own in rounds))


# ---- Guidance in parallel: of each picture one branch on each of two ranks


class Branches:
    """The conditional branch on rank 0, the unconditional one on rank 1, and each gets the other's prediction.

    What decides is rank 0's on both, so that no rank skips a step that the other computes.

    Raises:
        TeaCacheValueError: The group is not one of two ranks.
    """

    def __init__(self, group: Group | None) -> None:
        if not isinstance(group, Group) or group.size() != 2:
            got = f"{group.size()}" if isinstance(group, Group) else shown(group)
            raise TeaCacheValueError(
                f"guidance in parallel is for a group of 2 ranks, as mlx.launch -n 2 starts them, got {got}"
            )
        self._group = group
        self._rank = group.rank()
        self._n_calls = 0  # of the transformer, in this step
        self._first: mx.array | None = None  # the first one's prediction

    def check_pipeline(self, flux: Any, policy: Any, transformer: Any) -> None:
        """TeaCacheValueError where the ranks have not the same to do."""
        leaves = cast(list[tuple[str, mx.array]], tree_flatten(transformer.parameters()))
        about = {
            "pipeline": type(flux).__name__,
            "model": getattr(getattr(flux, "model_config", None), "model_name", None),
            "LoRAs": [Path(path).name for path in getattr(flux, "lora_paths", None) or ()],
            "LoRAs' scales": _plain(getattr(flux, "lora_scales", None)),
            "transformer": hashlib.sha256(repr([(n, a.shape, a.dtype) for n, a in leaves]).encode()).hexdigest()[:12],
        }
        check_equal(self._group, "apply", **installed(), **about, **policy.flat)

    def check_arguments(self, given: dict[str, Any]) -> None:
        """TeaCacheValueError where the ranks make different pictures."""
        self._n_calls, self._first = 0, None
        check_equal(self._group, "picture", **{name: _plain(value) for name, value in given.items()})

    def sigmas(self, sigmas: Sequence[float]) -> list[float]:
        """Rank 0's."""
        return cast(list[float], gathered(self._group, "sigmas", [float(sigma) for sigma in sigmas])[0])

    def decided(self, measured: mx.array) -> mx.array:
        """Rank 0's, on both."""
        return mx.distributed.all_gather(measured[None], group=self._group)[0]

    def split(self, make: Make, get_transformer: Callable[[], Any], *, is_compiled: bool) -> Step:
        """mflux's step, where it is one function that calls the transformer for each branch."""

        def step(_: Any, arguments: dict[str, Any]) -> list[mx.array]:
            made: list[mx.array] = []
            transformer = get_transformer()

            def note(*args: Any, **kwargs: Any) -> mx.array:
                made.append(transformer(*args, **kwargs))
                return made[-1]

            make(_Stand(transformer, note))(**arguments)  # MLX is lazy: what nobody reads is not computed
            self._check(len(made))
            both = iter(mx.distributed.all_gather(made[self._rank][None], group=self._group))
            return [make(_Stand(transformer, lambda *args, **kwargs: next(both)))(**arguments)]

        run: Any = Captured(step) if is_compiled else step
        return lambda **arguments: cast(mx.array, run([], arguments)[0])

    def exchanged(self, own: Step) -> Step:
        """mflux's call of the transformer for one branch, where a step is two of them. Lazy, but for its own."""

        def call(**arguments: Any) -> mx.array:
            prediction = own(**arguments)  # of the other's branch only its shape is read
            branch, self._n_calls = self._n_calls, self._n_calls + 1
            self._check(max(2, self._n_calls))
            if branch == 0:
                self._first = self._sent(branch, prediction)
                return self._first
            # One after the other, and the sender of the first one first: two that send at once may wait for ever.
            mx.eval(prediction if self._rank == branch else [], self._first)
            self._first = None
            return self._sent(branch, prediction)

        return call

    def _sent(self, branch: int, prediction: mx.array) -> mx.array:
        if branch == self._rank:
            return mx.distributed.send(prediction, 1 - branch, group=self._group)
        return mx.distributed.recv_like(prediction, branch, group=self._group)

    def end_step(self) -> None:
        """No call of it comes any more."""
        n_calls, self._n_calls = self._n_calls, 0
        self._check(n_calls or 2)

    def _check(self, n_calls: int) -> None:
        if n_calls != 2:
            raise TeaCacheValueError(
                f"guidance in parallel wants a step of 2 calls of the transformer, one for each branch, got {n_calls}: "
                "without guidance (of 1) leave out group, or --guidance-parallel"
            )


def _plain(value: Any) -> Any:
    """Of JSON's kinds, the same for values that are the same on all ranks; of a picture in memory only its class."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str | int | float | None):
        return value
    return str(value) if isinstance(value, Path) else type(value).__name__


class _Stand:
    """Stands for a transformer that is called in another way."""

    def __init__(self, transformer: Any, call: Callable[..., mx.array]) -> None:
        self._transformer = transformer
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)
