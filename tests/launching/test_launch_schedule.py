"""Schedule of ``launch --policy`` in the training loop of an unchanged script."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ovsprune.core.errors import OptionError, ScheduleError, UnknownNameError
from ovsprune.launching.command import launch
from ovsprune.launching.training_loops import _ScheduleHooks
from tests.launching.test_launch import ALONE, place, run, script
from tests.schedules.helpers import model

__all__ = ["place"]  # a fixture

MODEL = """
from framework import clip
from torch import nn
visual = clip.load({base!r})[0].visual
pictures = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
before = {{n: p.detach().clone() for n, p in visual.named_parameters()}}

def tell():
    import json
    moved = sorted(n for n, p in visual.named_parameters() if not torch.equal(p, before[n]))
    json.dump(moved, open({out!r}, "w"))
"""
TRANSFORMERS = """
import transformers

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = visual
    def forward(self, pixels):
        return {{"loss": self.visual(pixels).square().mean()}}

arguments = transformers.TrainingArguments(
    output_dir={place!r}, max_steps=4, per_device_train_batch_size=4, learning_rate=0.01,
    use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
)
transformers.Trainer(Net(), arguments, train_dataset=[{{"pixels": x}} for x in pictures]).train()
tell()
"""
MMENGINE = """
from mmengine.model import BaseModel
from mmengine.runner import Runner

class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.visual = visual
    def forward(self, pixels, mode="loss"):
        return {{"loss": self.visual(pixels).square().mean()}}

Runner(
    Net(), {place!r},
    train_dataloader={{"dataset": [{{"pixels": x}} for x in pictures], "batch_size": 4,
                      "sampler": {{"type": "InfiniteSampler"}},
                      "collate_fn": {{"type": "default_collate"}}}},
    train_cfg={{"by_epoch": False, "max_iters": 4}},
    optim_wrapper={{"optimizer": {{"type": "SGD", "lr": 0.1}}}},
).train()
tell()
"""
LIGHTNING = """
import lightning.pytorch as lightning

class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.visual = visual
    def training_step(self, pixels, index):
        return self.visual(pixels).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

lightning.Trainer(
    accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False,
    default_root_dir={place!r}, enable_progress_bar=False,
).fit(Net(), torch.utils.data.DataLoader(pictures, batch_size=4))
tell()
"""
DETECTRON2 = """
from detectron2.engine import HookBase, SimpleTrainer

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = visual
    def forward(self, pixels):
        return {{"loss": self.visual(pixels).square().mean()}}

net = Net().train()
wanting = [p for p in net.parameters() if p.requires_grad]
trainer = SimpleTrainer(net, list(pictures.split(4)), torch.optim.SGD(wanting, lr=0.1))
trainer.register_hooks([HookBase()])
trainer.train(0, 4)
tell()
"""
LOOPS = [
    ("transformers", TRANSFORMERS),
    ("mmengine", MMENGINE),
    pytest.param("lightning", LIGHTNING, marks=pytest.mark.slow),
]
PATHS = os.pathsep.join((ALONE["PYTHONPATH"], os.environ.get("PYTHONPATH", "")))


@pytest.mark.framework
@pytest.mark.parametrize(
    ("library", "text"),
    [*LOOPS, pytest.param("detectron2", DETECTRON2, marks=pytest.mark.upstream)],
)
def test_only_the_layers_of_the_policy_change(place: Path, library: str, text: str) -> None:
    import json

    pytest.importorskip(library)
    given = {"base": str(place / "base.pth"), "out": str(place / "moved.json"), "place": str(place)}
    # detectron2 comes from a checkout, whose other folders would stand before libraries' names
    paths = PATHS if library == "detectron2" else ALONE["PYTHONPATH"]
    record = launch(
        script(place, (MODEL + text).format(**given)), place / "slim", weights="slim",
        policy="last-k", count=3, environment={**ALONE, "PYTHONPATH": paths},
    )  # fmt: skip
    assert record["returncode"] == 0
    (plan,) = record["schedules"]
    assert plan["policy"] == "last-k" and plan["total_steps"] == 4
    moved = json.loads((place / "moved.json").read_text())
    trained = {name.removeprefix("visual.") for name in plan["trainable"]}
    assert moved and set(moved) <= trained
    assert {n for n in moved if n.endswith("weight") and "ln" not in n} == {
        "transformer.resblocks.3.attn.out_proj.weight",
        "transformer.resblocks.3.mlp.c_fc.weight",
        "transformer.resblocks.3.mlp.c_proj.weight",
    }


def test_script_without_a_known_loop_is_an_error(place: Path) -> None:
    with pytest.raises(ScheduleError, match="no training loop used the policy alpha"):
        run(place, "from framework import clip\nclip.load('small')\n", policy="alpha")


def test_bad_schedules_are_refused_before_the_script_starts(place: Path) -> None:
    command = [sys.executable, "-c", f"open({os.fspath(place / 'ran')!r}, 'w')"]
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"policy": "alfa"}, UnknownNameError, "Did you mean 'alpha'"),
        ({"policy": "alpha", "fraction": 2.0}, OptionError, r"fraction 2\.0 is outside"),
    ]
    for given, error, match in cases:
        with pytest.raises(error, match=match):
            launch(command, place / "slim", environment=ALONE, **given)
    assert not (place / "ran").exists()


@pytest.mark.parametrize(("rest", "norms"), [("follow", True), ("keep", False)])
def test_frozen_parameters_are_enabled_for_the_optimiser(rest: str, norms: bool) -> None:
    net = model()
    net.requires_grad_(False)
    settings = {"policy": "alpha-refresh", "target": "auto", "pool": ["blocks.*"], "rest": rest}
    _ScheduleHooks(settings, lambda record: None).enable_gradients(net)
    opened = {name for name, p in net.named_parameters() if p.requires_grad}
    assert "blocks.1.up.weight" in opened and "head.weight" not in opened
    assert ("blocks.1.norm.weight" in opened) == norms
