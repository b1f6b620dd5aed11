"""Data-parallel training of our convolutions: two processes, one model."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kernels import Conv2d


def build() -> nn.Sequential:
    torch.manual_seed(0)
    features = Conv2d(3, 6, 3, padding=1), nn.ReLU(), Conv2d(6, 6, 3, groups=6)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(96, 2))


def batch() -> torch.Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def train(rank: int, folder: str) -> None:
    """Two steps of one of two processes, on its half of the batch; the first writes the weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch()[rank::2]).pow(2).mean().backward()
        optimizer.step()
    if rank == 0:
        torch.save(model.module.state_dict(), f"{folder}/weights.pt")
    dist.destroy_process_group()


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    mp.spawn(train, args=(str(tmp_path),), nprocs=2)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch()).pow(2).mean().backward()
        optimizer.step()
    for name, weights in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(weights, model.state_dict()[name])
