"""Autotuning: of `tiles.candidates`, the tile that the GPU at hand is fastest with, found by timing each once.

Off, a launch takes the first candidate and nothing here matters. On by CONV_LAB_AUTOTUNE=1 or in `with enabled():`,
the first launch of a kind runs every candidate on its own operands, and the best one serves all that follow: a choice
is made once for a key and a process, so that sums keep their order, and it is written into the user's cache folder, so
that the next process finds it there. The key has no batch size: an odd last batch takes the tile of the others.

Bits: a tile decides the order of summation. One cache gives one tile, so runs that share it agree to the last bit; two
machines that tune apart may not.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from kernels import runtime, tiles
from kernels.geometry import ConvGeometry
from kernels.tiles import Tile

VARIABLE = "CONV_LAB_AUTOTUNE"

WARM_UP, ROUNDS = 2, 10
# Written before each timed launch: more than any L2 holds, and long enough (a third of a millisecond on an H100) that
# the host has queued the launch before the GPU gets to it.
FLUSH_BYTES, FLUSH_WRITES = 2**28, 4

# What compiling or launching a tile may end with: too much shared memory, a refusal of the compiler, no memory left.
_FAILURES = (RuntimeError, TritonError)

_lock = threading.RLock()
_contexts: list[Path | None] = []
_choices: dict["Key", "Choice"] = {}
_warned: set[str] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """All that a choice depends on."""

    op: str
    """"forward", "input_grad" or "weight_grad"."""
    gpu: str
    """As its maker calls it."""
    arch: str
    """"sm_80"."""
    dtype: str
    """"float16"."""
    precision: str
    """"ieee" or "tf32"."""
    geometry: ConvGeometry
    """Of one image, whatever the batch."""

    def __str__(self) -> str:
        g = self.geometry
        sizes = {"x": g.x_shape[1:], "w": g.w_shape, "stride": (g.SH, g.SW), "padding": (g.PH, g.PW)}
        sizes |= {"dilation": (g.DH, g.DW), "groups": (g.groups,)}
        words = [f"{name} {'x'.join(map(str, size))}" for name, size in sizes.items()]
        return ", ".join([self.op, self.gpu, self.arch, self.dtype, self.precision, *words])


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate, tried."""

    tile: Tile
    seconds: float | None
    """Median of ROUNDS launches with a cold L2; None of one that failed."""
    error: str | None = None
    """Why it failed, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The tile that all launches of a key take in this process, and how it came to be."""

    key: Key
    tile: Tile
    origin: str
    """"timed", "cached", or "untimed: ..." with the reason."""
    trials: tuple[Trial, ...]
    """In the order of `tiles.candidates`; none of an untimed choice."""


@contextlib.contextmanager
def enabled(folder: Path | None = None) -> Iterator[None]:
    """While open, launches in any thread tune; choices are kept in `folder`, or in the user's cache folder."""
    _contexts.append(folder)
    try:
        yield
    finally:
        _contexts.remove(folder)


def is_enabled() -> bool:
    """Whether launches tune. Raises ValueError for a CONV_LAB_AUTOTUNE other than 0 and 1."""
    asked = os.environ.get(VARIABLE) or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {asked!r}")
    return bool(_contexts) or asked == "1"


def record() -> tuple[Choice, ...]:
    """The choices of this process, in the order they were made."""
    with _lock:
        return tuple(_choices.values())


def forget() -> None:
    """This process makes its choices anew; those on disk stay."""
    with _lock:
        _choices.clear()


def tile(
    op: str,
    target: runtime.Target,
    geometry: ConvGeometry,
    operand: torch.Tensor,
    precision: str,
    run: Callable[[Tile], None],
) -> Tile:
    """The tile that a launch of `op` on `target` takes; `operand` is any of its tensors, for their dtype and device.

    `run(tile)` launches with that tile. Where tuning is on it is called many times, and writes the same result each
    time. Nothing is timed for tensors that are not on a GPU, while `torch.compile` traces, or in a CUDA graph capture.

    Raises what the first candidate raised if none of them runs.
    """
    candidates = tiles.candidates(op, target, geometry, operand.dtype, precision)
    if len(candidates) == 1 or not is_enabled() or operand.device.type != "cuda" or torch.compiler.is_compiling():
        return candidates[0]
    key = Key(
        op=op,
        gpu=_gpu_name(operand.device),
        arch=target.name,
        dtype=str(operand.dtype).removeprefix("torch."),
        precision=precision,
        geometry=replace(geometry, N=1),
    )
    with _lock:
        if key not in _choices:
            _choices[key] = _choose(key, candidates, run, operand.device)
        return _choices[key].tile


def _choose(key: Key, candidates: tuple[Tile, ...], run: Callable[[Tile], None], device: torch.device) -> Choice:
    file = _cache_file(key)
    found = None if file is None else _read(file).get(str(key))
    if found is not None and (kept := _choice(key, found)).tile in candidates:
        return kept
    if _is_capturing(device):
        # Nothing can be timed here, and a later choice would change the bits within the process.
        return Choice(key=key, tile=candidates[0], origin="untimed: first met in a CUDA graph capture", trials=())
    trials = _try_all(key, candidates, run, device)
    best = min((trial for trial in trials if trial.seconds is not None), key=lambda trial: trial.seconds)
    choice = Choice(key=key, tile=best.tile, origin="timed", trials=trials)
    return choice if file is None else _store(file, choice)


def _try_all(
    key: Key, candidates: tuple[Tile, ...], run: Callable[[Tile], None], device: torch.device
) -> tuple[Trial, ...]:
    """Times each candidate; warns of those that fail, and raises the first one's error if all do."""
    trials, errors = [], []
    for candidate in candidates:
        try:
            trials.append(Trial(tile=candidate, seconds=_measure(run, candidate, device)))
        except _FAILURES as error:
            errors.append(error)
            words = " ".join(f"{type(error).__name__}: {error}".split())
            trials.append(Trial(tile=candidate, seconds=None, error=words[:500]))
    if len(errors) == len(candidates):
        errors[0].add_note(f"autotuning: all {len(candidates)} candidate tiles failed for {key}")
        raise errors[0]
    while errors:
        errors.pop().__traceback__ = None  # it knows the frames of the launch, whose tensors it would keep
    failed = [f"{trial.tile} ({trial.error})" for trial in trials if trial.error]
    if failed:
        warnings.warn(f"autotuning {key}: left out tiles that do not run: {'; '.join(failed)}", stacklevel=2)
    return tuple(trials)


def _measure(run: Callable[[Tile], None], tile: Tile, device: torch.device) -> float:
    """Seconds of GPU time of run(tile): the median of ROUNDS, each with a cold L2 cache, after WARM_UP."""
    with torch.cuda.device(device):
        for _ in range(WARM_UP):
            run(tile)
        torch.cuda.synchronize()  # a tile that compiles and then fails is known here
        buffer = runtime.empty((FLUSH_BYTES,), "autotuning's cache flush", dtype=torch.uint8, device=device)
        rounds = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
        for start, end in rounds:
            for _ in range(FLUSH_WRITES):
                buffer.zero_()
            start.record()
            run(tile)
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in rounds) / 1e3


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


# --- the cache on disk --------------------------------------------------------------------------------------------


@cache
def _source_hash() -> str:
    """Of every source file of the kernels, candidates included: a choice among others, or of other code, is stale."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cache_file(key: Key) -> Path | None:
    """The file of this GPU, this Triton and these kernels; None where no cache folder is known."""
    folder = next((folder for folder in reversed(_contexts) if folder is not None), None) or _user_folder()
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", key.gpu)
    return folder and folder / f"{gpu}-triton-{triton.__version__}-{_source_hash()}.json"


def _user_folder() -> Path | None:
    """$XDG_CACHE_HOME/conv-lab/tuning, or ~/.cache/conv-lab/tuning; None, with a warning, where neither is known."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG specification: a relative one is to be ignored
        return Path(named, "conv-lab", "tuning")
    try:
        return Path.home() / ".cache" / "conv-lab" / "tuning"
    except RuntimeError:
        _warn_once("home", "autotuning: choices are lost with this process: there is no home folder to keep them in")
        return None


def _read(file: Path) -> dict[str, dict]:
    """The entries of a cache file by key; none, with a warning, of one that is not what `_store` writes."""
    try:
        entries = json.loads(file.read_text())["choices"]
        for entry in entries.values():
            _entry(entry)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        _warn_once(f"read {file}", f"autotuning: ignored the cache file {file}, which cannot be read ({words})")
        return {}
    return entries


def _entry(entry: dict) -> tuple[Tile, tuple[Trial, ...]]:
    trials = [Trial(**{**trial, "tile": Tile(**trial["tile"])}) for trial in entry["trials"]]
    return Tile(**entry["tile"]), tuple(trials)


def _choice(key: Key, entry: dict) -> Choice:
    tile, trials = _entry(entry)
    return Choice(key=key, tile=tile, origin="cached", trials=trials)


def _store(file: Path, choice: Choice) -> Choice:
    """Adds a choice to the cache file, unless another process was first: then all go by that one's."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays: removed, it would be another file for those that wait than for those that come.
        with open(file.with_name(f"{file.name}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = _read(file)
            if str(choice.key) in entries:
                first = _choice(choice.key, entries[str(choice.key)])
                if first.tile in {trial.tile for trial in choice.trials}:
                    return first
            entries[str(choice.key)] = {
                "tile": asdict(choice.tile), "trials": [asdict(trial) for trial in choice.trials]
            }  # fmt: skip
            temporary.write_text(json.dumps({"choices": entries}, indent=1) + "\n")
            os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror or str(error)
        _warn_once(f"write {file}", f"autotuning: choices are lost with this process: cannot write {file}: {reason}")
    return choice


def _warn_once(what: str, message: str) -> None:
    if what not in _warned:
        _warned.add(what)
        warnings.warn(message, stacklevel=2)
