"""Optimizers and the schedule: against formulas written out for one tensor, and against torch's own Adam."""

import copy

import pytest
import torch
from small_models import SETTINGS
from torch import nn

import bertfast
from bertfast.train.optimizers import Lamb, linear_schedule, make_optimizer, parameter_groups


def test_only_matrices_decay():
    model = bertfast.BertForPreTraining(bertfast.BertConfig(**SETTINGS))
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    decaying, others = parameter_groups(model, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(names[p].endswith("bias") or "LayerNorm" in names[p] for p in others["params"])
    assert all(names[p].endswith("weight") and "LayerNorm" not in names[p] for p in decaying["params"])
    # Each once, the tied word table too, and the frozen table not at all.
    assert len(decaying["params"]) + len(others["params"]) == len(names) - 1


def updates(optimizer, parameters, gradients, schedule=None):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def written_out_lamb(x, gradients, lr, decay, eps=1e-6, beta1=0.9, beta2=0.999):
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        u = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps) + decay * x
        ratio = x.norm() / u.norm() if decay and x.norm() > 0 and u.norm() > 0 else 1.0
        x = x - lr * ratio * u
    return x


def test_lamb_is_its_formula():
    starts = [torch.randn(5, 7).double(), torch.zeros(3, 4).double(), torch.randn(6).double()]
    gradients = [[torch.randn_like(s) for s in starts] for _ in range(5)]
    parameters = [nn.Parameter(s.clone()) for s in starts]
    lamb = Lamb([{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}], 0.05, weight_decay=0.1)
    updates(lamb, parameters, gradients)
    for i, decay in enumerate((0.1, 0.1, 0.0)):
        wanted = written_out_lamb(starts[i], [step[i] for step in gradients], 0.05, decay)
        torch.testing.assert_close(parameters[i].detach(), wanted, rtol=1e-12, atol=1e-12)


def test_lamb_without_decay_is_adam():
    start, gradients = torch.randn(9), [[torch.randn(9)] for _ in range(4)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    updates(Lamb([ours], 0.01, weight_decay=0.0), [ours], gradients)
    updates(torch.optim.Adam([theirs], 0.01, eps=1e-6), [theirs], gradients)
    torch.testing.assert_close(ours, theirs)


def test_lamb_takes_a_closure_and_skips_what_has_no_gradient():
    moved, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    lamb = Lamb([moved, still])

    def closure():
        loss = moved.sum()
        loss.backward()
        return loss

    assert lamb.step(closure) == 4
    assert (moved < 1).all() and (still == 1).all() and not lamb.state[still]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_saved_optimizer_goes_on_as_if_nothing_had_happened(name):
    gradients = [[torch.randn_like(p) for p in nn.Linear(3, 4).parameters()] for _ in range(6)]
    whole = nn.Linear(3, 4)
    first = copy.deepcopy(whole)
    optimizer = make_optimizer(name, whole, 0.1, 0.01)
    updates(optimizer, list(whole.parameters()), gradients, linear_schedule(optimizer, 2, 6))

    optimizer = make_optimizer(name, first, 0.1, 0.01)
    schedule = linear_schedule(optimizer, 2, 6)
    updates(optimizer, list(first.parameters()), gradients[:3], schedule)
    second = copy.deepcopy(first)
    resumed = make_optimizer(name, second, 0.1, 0.01)
    schedule_of_resumed = linear_schedule(resumed, 2, 6)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule_of_resumed.load_state_dict(schedule.state_dict())
    updates(resumed, list(second.parameters()), gradients[3:], schedule_of_resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("warmup", "steps", "shares"),
    [
        (2, 6, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (0, 3, [1, 2 / 3, 1 / 3]),
        (3, 3, [1 / 3, 2 / 3, 1]),
    ],
)
def test_the_learning_rate_rises_and_falls(warmup, steps, shares):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 8.0)
    schedule = linear_schedule(optimizer, warmup, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 8.0)
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(shares)


def test_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="one of adamw, lamb, not 'sgd'"):
        make_optimizer("sgd", model, 0.1)
    with pytest.raises(ValueError, match="between 0 and all 5 steps, not be 6"):
        linear_schedule(make_optimizer("adamw", model, 0.1), 6, 5)
