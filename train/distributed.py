"""Data-parallel training: several processes, started by torchrun or Slurm, that train one model together.

Each process takes its share of every global batch; gradients are averaged by DistributedDataParallel, batch norms
see the whole batch, sums are added up over the processes, and rank 0 alone writes and speaks.
"""

import atexit
import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.cli import UserError

# Building a cache of the images may keep the other processes waiting this long.
PATIENCE = timedelta(hours=4)

MISTAKE = "conv-lab/mistake"  # set in torchrun's store where the run ended by something that its user can put right


class World:
    """The processes of this run; of a plain `python -m train.run`, this one alone."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This process's device of the kind "cpu" or "cuda"; raises UserError where there are too few GPUs."""
        if kind == "cpu":
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(f"process {self.local_rank} of this machine has no GPU: there are {count}")
        if self.size == 1:
            return torch.device("cuda")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over the processes, the same on each; changes `values` itself."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true on any of the processes."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor([int(flag)], device=device)).item())

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The module to train through; its parameters are those of `model`, whose batch norms are replaced."""
        if self.size == 1:
            return model
        ids = [device] if device.type == "cuda" else None
        # Buffers are equal on all processes already, since the batch norms' statistics are.
        return DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)

    def sync_norms(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norms over the global batch, so that N processes train as one would."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.__class__ = CpuSyncBatchNorm
        return model


def launched() -> bool:
    """Whether torchrun, or a script that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def restarts() -> int:
    """How often torchrun's agent has started the run again after a process had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start_time() -> float:
    """Seconds since the epoch at which the run began; the same after torchrun has restarted its processes.

    That is when torchrun's agent, this process's parent, began: proc(5), stat's field 22 and /proc/stat's btime.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return time.time()
    with open(f"/proc/{os.getppid()}/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/stat") as file:
        booted = next(int(line.split()[1]) for line in file if line.startswith("btime "))
    return booted + ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def connect() -> Iterator[World]:
    """The World of this process; NCCL connects GPUs, gloo CPUs.

    Whatever ends one process ends all, and the first to fail tells why: the others leave with exit code 2 in silence.
    """
    if not launched():
        yield World()
        return
    world = World(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    )
    lasting, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=PATIENCE))
    # torchrun's store outlives a restart, and processes would read the addresses of their dead predecessors in it.
    store = dist.PrefixStore(f"conv-lab/{restarts()}", lasting)
    if restarts() and lasting.check([MISTAKE]):
        raise SystemExit(2)  # started again, it would come to the same end and tell it once more
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    with contextlib.ExitStack() as group:
        group.callback(dist.destroy_process_group)
        try:
            try:
                yield world
            except RuntimeError as error:
                end_if_lost(error, store, group)
                raise
            except (UserError, OSError, MemoryError) as error:
                if isinstance(error, UserError):
                    with contextlib.suppress(RuntimeError):  # the store may have died with another process
                        lasting.set(MISTAKE, "")
                tell_once(store)
                raise
        except KeyboardInterrupt as error:  # torchrun's SIGTERM, which may come while the block above is at it
            end_if_lost(error, store, group)
            raise


def end_if_lost(error: BaseException, store: dist.Store, group: contextlib.ExitStack) -> None:
    """Raises UserError where `error` says that a process at the other end is gone, or ends this one in silence.

    Nothing waits for that process then, as destroying the group may and PyTorch's threads at the interpreter's end:
    torchrun kills who takes too long, and the line would not be told.
    """
    if not is_lost_peer(error):
        return
    tell_once(store)
    group.pop_all()
    atexit.register(os._exit, 2)
    raise UserError(
        "another process of this run ended or cannot be reached; "
        "go on with the same command and --resume DIR, from the run folder's last.pt"
    ) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because a process at the other end is gone.

    Also where torchrun's SIGTERM, for the same reason, comes while that failure is on its way out.
    """
    if isinstance(error, KeyboardInterrupt):
        return isinstance(error.__context__, RuntimeError) and is_lost_peer(error.__context__)
    return isinstance(error, dist.DistError) or bool(
        re.search(r"gloo|NCCL|closed by peer|reset by peer|socket", str(error), re.IGNORECASE)
    )


def tell_once(store: dist.Store) -> None:
    """Ends this process in silence where another one, by the store they share, has told of the failure already."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, who has seen the other process end and would cut us off
    try:
        first = store.add("failed", 1) == 1
    except RuntimeError:  # the store died with rank 0, which told nothing if it was killed
        first = True
    if not first:
        raise SystemExit(2)


class Sum(torch.autograd.Function):
    """The sum over the processes. Each one's loss depends on every one's input, so the gradient is a sum too."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, which must be equally large; torch's own is for GPUs only."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(x)
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = [0, *range(2, x.dim())]
        count = dist.get_world_size() * x.numel() // x.shape[1]
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = Sum.apply(values.sum(dims)) / count
        centred = values - mean.view(shape)
        variance = Sum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
