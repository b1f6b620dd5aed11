"""Data-parallel training of our convolutions: two processes, one model."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
from attacks.pgd import pgd
from kernels import Conv2d
from train.distributed import World, is_lost_peer


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


def images() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 32, 32, generator=random, dtype=torch.float64), torch.randint(10, (8,), generator=random)


def custom_net() -> nn.Module:
    torch.manual_seed(0)
    return models.build("customnet", "torch", num_classes=10, image_size=32).double()


def crafted(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Adversarial images, as Trainer.attacked makes them: of the model in evaluation mode."""
    return pgd(model, x, "least_likely", y, num_steps=3, step_size=0.1, epsilon=0.2)


def normed_step(rank: int, folder: str, adversarial: bool) -> None:
    """Images, gradients and batch norm statistics of one of two processes, on its half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    world, cpu = World(rank, 2, rank), torch.device("cpu")
    model = world.sync_norms(custom_net(), cpu)
    wrapped = world.wrap(model, cpu)
    x, y = (values[rank::2] for values in images())
    if adversarial:
        x = crafted(model, x, y)
    nn.functional.cross_entropy(wrapped(x), y).backward()
    if rank == 1:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save((x, gradients, model.state_dict()), f"{folder}/step.pt")
    dist.destroy_process_group()


# In float64, for an attack goes by signs: in float32 rounding, which depends on the size of a batch, turns some.
@pytest.mark.parametrize(
    "adversarial", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "adversarial"]
)
def test_batch_norms_see_the_batches_of_all_processes(adversarial, tmp_path):
    mp.spawn(normed_step, args=(str(tmp_path), adversarial), nprocs=2)
    theirs, gradients, state = torch.load(tmp_path / "step.pt", weights_only=True)
    model = custom_net()
    x, y = images()
    if adversarial:
        original, x = x, crafted(model, x, y)
        assert (x - original).abs().max() > 0.1
    torch.testing.assert_close(theirs, x[1::2], rtol=0, atol=1e-12)
    nn.functional.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m)
    for name, value in model.state_dict().items():  # running means and variances among them
        torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)


def interrupted_while(error: Exception | None) -> KeyboardInterrupt:
    """What SIGTERM raises, alone or in a block that an error is on its way out of."""
    try:
        try:
            if error is not None:
                raise error
        finally:
            raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        return interrupt


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        pytest.param(RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1"), True, id="closed"),
        pytest.param(RuntimeError("shapes do not fit"), False, id="another-error"),
        pytest.param(interrupted_while(RuntimeError("Connection reset by peer")), True, id="sigterm-meanwhile"),
        pytest.param(interrupted_while(ValueError("gloo")), False, id="interrupted-in-another-error"),
        pytest.param(interrupted_while(None), False, id="ctrl-c"),
    ],
)
def test_a_lost_process_is_told_from_an_interruption(error, is_lost):
    assert is_lost_peer(error) is is_lost
