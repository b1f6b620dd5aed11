"""An account as a history for PyTorch's memory viewer."""

from bench.measure import snapshot
from bench.measure.account import (
    GRADIENTS,
    INPUT,
    OPTIMIZER,
    PARAMETERS,
    SAVED,
    TEMPORARY,
    WORKSPACE,
    Account,
    Change,
)

# What a storage was for, if it was several things in its time; the viewer knows one label a storage.
_FOREMOST = (PARAMETERS, GRADIENTS, OPTIMIZER, INPUT, SAVED, WORKSPACE, TEMPORARY)


def history(account: Account, title: str) -> dict:
    """All steps of the account in the form of torch.cuda.memory._snapshot(); see bench.measure.snapshot."""
    changes = [entry for entry in account.entries if isinstance(entry, Change)]
    foremost: dict[int, str] = {}
    for change in changes:
        known = foremost.get(change.storage, TEMPORARY)
        foremost[change.storage] = min(known, change.category, key=_FOREMOST.index)
    return snapshot.snapshot(
        (
            snapshot.Change(change.storage, change.nbytes, (*label(change), foremost[change.storage]))
            for change in changes
        ),
        title=title,
    )


def label(change: Change) -> tuple[str, str]:
    """By whom it was made: the operator, and its module."""
    return change.operator or "there before the step", change.module
