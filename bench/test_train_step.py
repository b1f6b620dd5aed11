"""A whole training step of SimpleNet: forward, cross-entropy, backward and SGD with momentum, by each convolution.

The gradients of the first step are checked against the same model in float64 before any is timed.
"""

import torch
from torch.nn.functional import cross_entropy

import models
from bench.rows import MODEL, TOLERANCE, relative_error


def test_train_step(conv, device, size, timed):
    images, pixels = size
    torch.manual_seed(0)
    model = models.build(MODEL, conv=conv, image_size=pixels).to(device)
    x = torch.randn(images, 3, pixels, pixels, device=device).contiguous(memory_format=models.memory_format(conv))
    y = torch.randint(100, (images,), device=device)

    exact = models.build(MODEL, conv="torch", image_size=pixels).to(device, torch.float64)
    exact.load_state_dict(model.state_dict())
    error = relative_error(gradients(model, x, y), gradients(exact, x.double(), y))
    assert error <= TOLERANCE["step"], f"{conv} is wrong by {error:.1e}, so its time means nothing"

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(x), y).backward()
        optimizer.step()

    timed(step, conv=conv, layer=None, error=error)


def gradients(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """All gradients of one step in one row."""
    parameters = list(model.parameters())
    parts = torch.autograd.grad(cross_entropy(model(x), y), parameters)
    return torch.cat([part.flatten().double() for part in parts])
