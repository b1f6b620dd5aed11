"""The sweep: the bits of its settings one by one, for fewer queries."""

import pytest
import torch

import models
from attacks import Setting, pgd, sweep
from attacks.sweep import WRITEUP

SETTINGS = [Setting(num_steps=n, step_size=s, epsilon=e) for n, s, e in ((2, 0.1, 0.3), (5, 0.1, 0.3), (3, 0.1, 9.0))]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = models.build("simplenet", "torch", 10, 32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return model.eval()


@pytest.fixture
def images():
    random = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 32, 32, generator=random), torch.randint(10, (6,), generator=random)


@pytest.mark.parametrize("target", ["least_likely", "most_likely", "untargeted"])
def test_logits_are_those_of_each_attack_alone(target, model, images):
    x, y = images
    before = x.clone()
    found = sweep(model, x, target, y, settings=SETTINGS)
    for setting, swept in zip(SETTINGS, found, strict=True):
        alone = pgd(
            model, x, target, y, num_steps=setting.num_steps, step_size=setting.step_size, epsilon=setting.epsilon
        )
        with torch.no_grad():
            assert torch.equal(model(alone), swept.logits)
    assert torch.equal(x, before)


def test_the_writeups_settings_cost_120_gradients_instead_of_140(model, images):
    asked = []
    model.register_forward_hook(lambda _module, _inputs, out: asked.append(out.requires_grad))
    found = sweep(model, images[0][:1], "most_likely")
    assert sum(setting.num_steps for setting in WRITEUP) == 140
    assert (sum(asked), len(asked)) == (120, 124)
    # An epsilon that no step can reach changes nothing, though nothing was shared between the two.
    torch.testing.assert_close(found[0].logits, found[3].logits, rtol=1e-3, atol=1e-3)


def test_vanished_gradients_are_counted(model, images):
    healthy = sweep(model, images[0], "most_likely", settings=SETTINGS)
    model.head.weight.data *= 1e6  # the cross-entropy's gradient is 0 in float32
    masked = sweep(model, images[0], "most_likely", settings=SETTINGS)
    assert all(swept.zero_gradient.max() < 0.1 for swept in healthy)
    assert all(swept.zero_gradient.min() == 1 for swept in masked)


def test_the_model_is_left_as_it_was(model, images):
    model.train()
    sweep(model, images[0], "most_likely", settings=SETTINGS[:1])
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_setting_that_is_none_is_refused(model, images):
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        sweep(model, images[0], "most_likely", settings=[Setting(num_steps=0, step_size=0.1, epsilon=0.1)])
