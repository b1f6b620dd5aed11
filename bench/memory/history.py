"""An account as a history for PyTorch's memory viewer."""

from dataclasses import replace

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
from bench.measure.allocator import Request
from bench.measure.predict import GpuKind, choices, requests

# What a storage was for, if it was several things in its time; the viewer knows one label a storage.
_FOREMOST = (PARAMETERS, GRADIENTS, OPTIMIZER, INPUT, SAVED, WORKSPACE, TEMPORARY)


def history(account: Account, gpu: GpuKind, title: str) -> dict:
    """All steps of the account in the form of torch.cuda.memory._snapshot(); see bench.measure.snapshot.

    Of what cuDNN may choose it shows the first of `choices`, in which it takes nothing.
    """
    foremost: dict[int, str] = {}
    for entry in account.entries:
        if isinstance(entry, Change):
            known = foremost.get(entry.storage, TEMPORARY)
            foremost[entry.storage] = min(known, entry.category, key=_FOREMOST.index)

    def labelled(request: Request) -> Request:
        if request.key not in foremost or not request.label:
            return request
        operator, module, _ = request.label
        return replace(request, label=(operator or "there before the step", module, foremost[request.key]))

    asked = (request for each in requests(account, gpu, choices(account)[0]) for request in each)
    return snapshot.snapshot(map(labelled, asked), title=title)
