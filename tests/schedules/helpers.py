"""Small model to train by a schedule, and a plain training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ovsprune

STEPS = 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """Patch embedding, positions, three blocks, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(16, 16))
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    return (
        torch.randn(4, 3, 16, 16, generator=generator),
        torch.randint(0, 5, (4,), generator=generator),
    )


def loss(net: nn.Module, index: int) -> Tensor:
    images, labels = batch(index)
    return nn.functional.cross_entropy(net(images), labels)


def refresh(net: nn.Module, total_steps: int = STEPS, **more: object) -> ovsprune.TrainPlan:
    """Return a plan that chooses again every three steps."""
    return ovsprune.schedule(
        net, "alpha-refresh", total_steps=total_steps, every=3, fit="hill", **more
    )


def expected() -> tuple[dict[str, Tensor], list[tuple[str, ...]]]:
    """Return the weights after a plain loop, and the trainable parameters at each step."""
    net = model()
    plan = refresh(net)
    optimizer = torch.optim.AdamW(plan.groups(lr=0.05, weight_decay=0.1))
    plan.bind(optimizer)
    trained = []
    for i in range(STEPS):
        plan.step(i)
        trained.append(plan.trainable)
        optimizer.zero_grad()
        loss(net, i).backward()
        optimizer.step()
    return {k: v.clone() for k, v in net.state_dict().items()}, trained
