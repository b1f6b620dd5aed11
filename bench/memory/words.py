"""What a report says in words: what a storage is, why one peak is above another, what a gap may consist of."""

from collections import Counter
from dataclasses import dataclass

from bench.measure.account import OUTSIDE, Account, Change, Moment
from bench.measure.predict import EAGER_CONTEXT, LAZY_CONTEXT, MIB

# What operators of the unfolding convolution leave behind, which nn.Conv2d does not have.
OF_UNFOLDING = {
    "aten.im2col": "the unfolded matrix: every input value R*S times",
    "aten.clone": "matmul's clone of that matrix, or of a product as large, made in order to flatten it",
    "aten.col2im": "fold's result, which keeps a storage of R*S times its size",
    "aten.bmm": "a weight gradient for each image, before they are added up",
    "aten.mm": "a product as large as the unfolded matrix",
}
WORTH_TELLING = 0.02
"""Of the larger peak; what differs by less is told in one sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Why the peak with one convolution is above or below that with another."""

    conv: str
    reference: str
    nbytes: int
    """Of the peak of `conv` above that of `reference`."""
    where: str
    reference_where: str
    """Where their peaks lie: the phase, and the module and operator that made what came last."""
    items: tuple[tuple[int, str], ...]
    """Bytes that `conv` has more (or less) at its peak than `reference` at its own, and what they are; they add up."""


def describe(conv: str, storage: Change) -> str:
    """What a storage is: by the operator that made it, in words where it is known."""
    if conv == "unfold" and storage.operator in OF_UNFOLDING and storage.category == "temporaries":
        return f"{OF_UNFOLDING[storage.operator]} ({storage.operator}, {storage.module})"
    return storage.category


def peak_place(account: Account) -> str:
    """As "backward, block2.3, aten.im2col": what was made last before the peak."""
    peak = account.peak
    phase = next((name for name, phase in account.phases.items() if phase.peak.nbytes == peak.nbytes), "")
    newest = max(peak.live, key=lambda storage: storage.storage)
    return ", ".join(part for part in (phase, newest.module, newest.operator) if part and part != OUTSIDE)


def difference(conv: str, account: Account, reference: str, other: Account) -> Difference:
    """Between the peaks of two accounts of the same step."""
    ours, theirs = _by_description(conv, account.peak), _by_description(reference, other.peak)
    items = {what: ours[what] - theirs[what] for what in {**ours, **theirs} if ours[what] != theirs[what]}
    limit = WORTH_TELLING * max(account.peak.nbytes, other.peak.nbytes)
    told = [(nbytes, what) for what, nbytes in sorted(items.items(), key=lambda item: -item[1]) if abs(nbytes) >= limit]
    rest = sum(items.values()) - sum(nbytes for nbytes, _ in told)
    return Difference(
        conv=conv,
        reference=reference,
        nbytes=account.peak.nbytes - other.peak.nbytes,
        where=peak_place(account),
        reference_where=peak_place(other),
        items=tuple(told) + (((rest, "all else together"),) if rest else ()),
    )


def _by_description(conv: str, peak: Moment) -> Counter[str]:
    sums: Counter[str] = Counter()
    for storage in peak.live:
        sums[describe(conv, storage)] += storage.nbytes
    return sums


def gap_to(theirs: int, reserved: int) -> str:
    """What would have to lie outside of the allocator for `theirs` (MiB), where it reserves that many bytes."""
    rest = theirs * MIB - reserved
    shown = f"{theirs:,} - {reserved / MIB:,.0f} reserved by the allocator (predicted) = {rest / MIB:,.0f} MiB"
    if rest < 0:
        return f"{shown}: less than the network built here reserves, so it was another one or another step"
    for context, kind in (
        (LAZY_CONTEXT, "whose kernels load when first used"),
        (EAGER_CONTEXT, "with all kernels loaded"),
    ):
        if context.low <= rest <= context.high:
            return f"{shown}, about what is assumed of a CUDA context {kind} ({in_mib(context.low, context.high)})"
    if rest > EAGER_CONTEXT.high:
        more = rest - EAGER_CONTEXT.high
        return f"{shown}: {more / MIB:,.0f} more than is assumed of any CUDA context, which nothing here explains"
    return f"{shown}: less than is assumed of any CUDA context"


def in_mib(low: int, high: int) -> str:
    """A range of bytes as "1,055-2,110 MiB", or "1,055 MiB" where it is none."""
    ends = dict.fromkeys(f"{nbytes / MIB:,.0f}" for nbytes in (low, high))
    return f"{'-'.join(ends)} MiB"
