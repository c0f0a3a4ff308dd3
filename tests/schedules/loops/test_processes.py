"""Training loops in two processes: equal weights on both ranks, or an early error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from ovsprune.core.errors import ScheduleError
from tests.schedules.helpers import STEPS, batch, loss, model, refresh
from tests.schedules.test_ddp import free_port

pytestmark = pytest.mark.framework


def environment(rank: int, port: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0",
        "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    torch.set_num_threads(1)


def with_accelerate(rank: int, place: str, port: str) -> None:
    environment(rank, port)
    import accelerate

    from ovsprune.schedules.loops.accelerate import ScheduledSteps

    able = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = accelerate.Accelerator(cpu=True, kwargs_handlers=[able])

    net = model()
    plan = refresh(net)
    prepared, optimizer = accelerator.prepare(net, torch.optim.AdamW(plan.groups(lr=0.05)))
    with pytest.raises(ScheduleError, match=r"2 processes train.*plan\.open\(\)"):
        ScheduledSteps(accelerator, plan, optimizer).begin()

    net = model()
    plan = refresh(net)
    optimizer = torch.optim.AdamW(plan.groups(lr=0.05))
    with plan.open():
        prepared, optimizer = accelerator.prepare(net, optimizer)
    steps, seen = ScheduledSteps(accelerator, plan, optimizer), []
    for i in range(STEPS):
        with accelerator.accumulate(prepared):
            steps.begin()
            seen.append(plan.chosen)
            accelerator.backward(loss(prepared, 2 * i + rank))
            optimizer.step()
            optimizer.zero_grad()
    assert len(set(seen)) > 1
    torch.save(net.state_dict(), Path(place) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def with_lightning(rank: int, place: str, port: str) -> None:
    environment(rank, port)
    from lightning.pytorch import LightningModule, Trainer

    from ovsprune.schedules.loops.lightning import ScheduleCallback

    class Wrapped(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def training_step(self, given, index):
            return loss(self.inner, 2 * index + rank)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    def trained(strategy, hook):
        net = Wrapped()
        plan = refresh(net.inner) if hook == "plan" else refresh
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_steps=STEPS,
            callbacks=[ScheduleCallback(plan)],
            default_root_dir=place,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        images = [batch(i) for i in range(STEPS)]
        trainer.fit(net, torch.utils.data.DataLoader(images, batch_size=None))
        return net.inner.state_dict()

    for hook in ("plan", "function"):
        with pytest.raises(ScheduleError, match="ddp_find_unused_parameters_true"):
            trained("ddp", hook)
    able = "ddp_find_unused_parameters_true"
    state = {**trained(able, "plan")}
    state |= {f"again.{n}": v for n, v in trained(able, "function").items()}
    torch.save(state, Path(place) / f"{rank}.pt")


@pytest.mark.parametrize(
    ("loop", "library"),
    [
        (with_accelerate, "accelerate"),
        pytest.param(with_lightning, "lightning.pytorch", marks=pytest.mark.slow),
    ],
)
def test_ranks_have_equal_weights(loop, library, tmp_path):
    """Refuse a wrapper that cannot follow the plan, then train with one that can."""
    pytest.importorskip(library)
    mp.spawn(loop, (str(tmp_path), free_port()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first and first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
