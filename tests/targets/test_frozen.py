"""A frozen network is used where the input is, and is no part of the module that holds it."""

import torch
from torch import nn

from fastmim.targets.frozen import Frozen


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.teacher = Frozen(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)))

    def forward(self, x):
        return self.linear(x), self.teacher(x)


def test_it_is_not_registered_cast_or_trained():
    holder = Holder().bfloat16().train()
    assert list(holder.state_dict()) == ["linear.weight", "linear.bias"]
    linear = holder.teacher.module[0]
    assert linear.weight.dtype == torch.float32 and not linear.weight.requires_grad
    x = torch.randn(4, 2, requires_grad=True)
    features = holder.teacher(x)
    assert not features.requires_grad
    assert torch.equal(features, x.detach() @ linear.weight.T + linear.bias)  # no dropout


def test_it_moves_to_the_device_of_its_input():
    teacher = Frozen(nn.Linear(2, 3))
    assert teacher(torch.ones(1, 2)).device.type == "cpu"
    assert teacher(torch.ones(1, 2, device="meta")).device.type == "meta"
    assert teacher.module.weight.device.type == "meta"


def test_its_fingerprint_follows_its_weights():
    torch.manual_seed(0)
    first, second = (Frozen(nn.BatchNorm1d(3)) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    second.module.running_mean[1] = 1.0
    assert first.fingerprint() != second.fingerprint()
