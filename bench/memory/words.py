"""What a report says in words: what a storage is, why one peak is above another, what a gap may consist of."""

from collections import Counter
from dataclasses import dataclass

from bench.measure.account import OUTSIDE, TEMPORARY, Account, Change
from bench.measure.predict import EAGER_CONTEXT, LAZY_CONTEXT, MIB, Range, in_mib

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


def unfolding_modules(account: Account) -> set[str]:
    """Those whose convolution unfolds its input."""
    return {entry.module for entry in account.entries if isinstance(entry, Change) and entry.operator == "aten.im2col"}


def describe(storage: Change, unfolding: set[str]) -> str:
    """What a storage is: for what an unfolding convolution leaves behind in words, else its category."""
    if storage.module in unfolding and storage.operator in OF_UNFOLDING and storage.category == TEMPORARY:
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
    ours, theirs = _by_description(account), _by_description(other)
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


def _by_description(account: Account) -> Counter[str]:
    sums: Counter[str] = Counter()
    unfolding = unfolding_modules(account)
    for storage in account.peak.live:
        sums[describe(storage, unfolding)] += storage.nbytes
    return sums


def gap_to(theirs: int, reserved: Range) -> str:
    """What must lie outside of the allocator for `theirs` (MiB), and whether a CUDA context may be that large."""
    left = Range(theirs * MIB - reserved.high, theirs * MIB - reserved.low)
    less = f"{theirs:,} less {in_mib(reserved)} reserved by the allocator (predicted)"
    if left.high < 0:
        return f"{less} leaves nothing: theirs was another network or step, averages below its peak, or this is wrong"
    shown = f"{less} leaves {in_mib(Range(max(0, left.low), left.high))}"
    if left.low > EAGER_CONTEXT.high:
        more = (left.low - EAGER_CONTEXT.high) / MIB
        return f"{shown}: {more:,.0f} more than is assumed of any CUDA context, which nothing here explains"
    kinds = [
        f"{kind} ({in_mib(context)})"
        for context, kind in (
            (LAZY_CONTEXT, "a context whose kernels load when first used"),
            (EAGER_CONTEXT, "a context with all kernels loaded"),
        )
        if left.low <= context.high and left.high >= context.low
    ]
    return f"{shown}, as {' or '.join(kinds) or 'no context'} would take"
