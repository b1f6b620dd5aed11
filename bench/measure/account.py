"""What a tracker saw, in order: which storages were taken and freed, by whom and for what, and what was live when.

    tracker.account.peak.nbytes                                bytes at the highest moment of the step
    tracker.account.peak.split("category", "module")           ... of which {(category, module): bytes}
    tracker.account.phases["backward"].peak                    the highest moment of one phase

All figures are bytes of storages. The order is that of operators; there are no times in it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

PARAMETERS = "parameters"
"""Parameters and buffers of a watched model."""
GRADIENTS = "gradients"
"""What `.grad` of a watched parameter holds."""
OPTIMIZER = "optimizer state"
INPUT = "input"
"""Whatever the tracked computation reads and did not make: the batch, its labels."""
SAVED = "saved for backward"
"""Activations that autograd keeps at that moment."""
TEMPORARY = "temporaries"
"""Everything else an operator returned, gradients of activations among them."""
WORKSPACE = "workspaces"
"""Buffers that a launcher takes inside an operator, until the operator returns them as its result."""
CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER, INPUT, SAVED, TEMPORARY, WORKSPACE)

OUTSIDE = "outside the model"
"""The module of whatever no module of a watched model made."""


@dataclass(frozen=True, slots=True)
class Change:
    """From here on storage number `storage` is this; with 0 bytes it is freed."""

    storage: int
    nbytes: int
    category: str
    """One of CATEGORIES."""
    module: str
    """Path of the module whose forward or backward pass made it, as "block1.0"; OUTSIDE elsewhere."""
    operator: str
    """What made it: an operator as "aten.convolution", or what a launcher calls its buffer; "" if it was there."""


@dataclass(frozen=True, slots=True)
class ConvolutionCall:
    """Here a library convolved. On a GPU it may have taken a workspace and given it back, which nobody saw."""

    operator: str
    module: str
    nbytes: int
    """Of the two operands and the result."""


@dataclass(frozen=True, slots=True)
class ReductionCall:
    """Here values were added up along the outer dimensions; see bench.measure.reduction for what a GPU takes."""

    operator: str
    module: str
    results: int
    terms: int
    """Of each result."""
    element: int
    """Bytes of what is added up in."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What was done since the mark before, or since the beginning, is called `phase`."""

    phase: str


@dataclass(frozen=True, slots=True)
class ScratchCall:
    """Here an operator first took a buffer, and gave it back once it had its result, which comes next."""

    operator: str
    module: str
    nbytes: int


Entry = Change | ConvolutionCall | ReductionCall | ScratchCall | Mark


@dataclass(frozen=True, slots=True)
class Moment:
    """What is live at one moment."""

    index: int
    """Of the entry after which it is so."""
    live: tuple[Change, ...]

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in self.live)

    def split(self, *names: str) -> dict[tuple[str, ...], int]:
        """Bytes by the attributes of `Change` that are named, largest first: ("category", "module")."""
        sums: Counter[tuple[str, ...]] = Counter()
        for storage in self.live:
            sums[tuple(getattr(storage, name) for name in names)] += storage.nbytes
        return dict(sums.most_common())

    def by_category(self) -> dict[str, int]:
        """Bytes of every one of CATEGORIES."""
        sums = self.split("category")
        return {category: sums.get((category,), 0) for category in CATEGORIES}


@dataclass(frozen=True, slots=True)
class Phase:
    """All stretches of one name together."""

    peak: Moment
    """The highest moment in it, the one it began with included."""
    end: Moment
    """What was live when it last ended."""


@dataclass(frozen=True, slots=True)
class Account:
    """The entries of a tracker, and where the step that counts begins among them.

    Everything but `entries` is of that step, the entries from `start` on.
    """

    entries: tuple[Entry, ...]
    start: int = 0

    @property
    def peak(self) -> Moment:
        """The highest moment."""
        return self._highest(self.start, len(self.entries))

    @property
    def phases(self) -> dict[str, Phase]:
        """In the order of their first marks; what follows the last mark is in none."""
        stretches: dict[str, list[tuple[int, int]]] = {}
        begin = self.start
        for index in range(self.start, len(self.entries)):
            if isinstance(entry := self.entries[index], Mark):
                stretches.setdefault(entry.phase, []).append((begin, index))
                begin = index + 1
        phases = {}
        for name, places in stretches.items():
            peak = max((self._highest(begin, end) for begin, end in places), key=lambda moment: moment.nbytes)
            phases[name] = Phase(peak, self.moment(places[-1][1]))
        return phases

    def moment(self, index: int) -> Moment:
        """What is live after the first `index` entries."""
        live: dict[int, Change] = {}
        for entry in self.entries[:index]:
            _apply(entry, live)
        return Moment(index, tuple(live.values()))

    def curve(self) -> Iterator[dict[str, int]]:
        """Bytes of every category: at the beginning, then after each entry."""
        live = {storage.storage: storage for storage in self.moment(self.start).live}
        sums = Moment(self.start, tuple(live.values())).by_category()
        yield dict(sums)
        for entry in self.entries[self.start :]:
            if isinstance(entry, Change):
                if entry.storage in live:
                    sums[live[entry.storage].category] -= live[entry.storage].nbytes
                sums[entry.category] += entry.nbytes
                _apply(entry, live)
            yield dict(sums)

    def _highest(self, begin: int, end: int) -> Moment:
        """The highest moment from before entry `begin` to before entry `end`.

        What a storage is for is often known only after it was made (a result that autograd then saves). So of several
        moments of the same height the last one counts in which each storage turned out to be something, before any
        stopped being it.
        """
        live: dict[int, Change] = {}
        for entry in self.entries[:begin]:
            _apply(entry, live)
        now = highest = sum(storage.nbytes for storage in live.values())
        place, kept = begin, dict(live)
        for index in range(begin, end):
            entry = self.entries[index]
            if not isinstance(entry, Change):
                continue
            before = live.get(entry.storage)
            now += entry.nbytes - (before.nbytes if before else 0)
            _apply(entry, live)
            turned_out = before and before.category in (TEMPORARY, WORKSPACE) and entry.category != before.category
            if now > highest or (now == highest and turned_out):
                highest, place, kept = now, index + 1, dict(live)
        return Moment(place, tuple(kept.values()))


def _apply(entry: Entry, live: dict[int, Change]) -> None:
    if isinstance(entry, Change):
        if entry.nbytes:
            live[entry.storage] = entry
        else:
            live.pop(entry.storage, None)
