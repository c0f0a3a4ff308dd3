from __future__ import annotations

import pytest
import torch

from ovsprune.core.errors import ScheduleError
from tests.schedules.helpers import STEPS, loss, model, refresh

accelerate = pytest.importorskip("accelerate")

from ovsprune.schedules.loops.accelerate import ScheduledSteps  # noqa: E402

pytestmark = pytest.mark.framework


def train(place, resume=False, accumulate=2):
    net = model(1 if resume else 0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    plan = refresh(net)
    optimizer = torch.optim.AdamW(plan.groups(lr=0.05, weight_decay=0.1))
    prepared, optimizer = accelerator.prepare(net, optimizer)
    steps = ScheduledSteps(accelerator, plan, optimizer)
    if resume:
        accelerator.load_state(str(place))
    seen = {}
    for i in range(accumulate * steps.count, accumulate * STEPS):
        with accelerator.accumulate(prepared):
            steps.begin()
            seen[i] = plan.trainable
            accelerator.backward(loss(prepared, i))
            optimizer.step()
            optimizer.zero_grad()
        if i == accumulate * 7 - 1 and not resume:
            accelerator.save_state(str(place))
    return net.state_dict(), seen


def test_the_loop_follows_the_plan_and_resumes_exactly(tmp_path):
    weights, seen = train(tmp_path / "kept")
    changes = [i for i in range(1, 2 * STEPS) if seen[i] != seen[i - 1]]
    assert changes and set(changes) <= {6, 12, 18}  # never within a step of two passes
    resumed, again = train(tmp_path / "kept", resume=True)
    assert again == {i: seen[i] for i in range(14, 2 * STEPS)}
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


def test_another_object_than_an_accelerator_is_refused():
    with pytest.raises(ScheduleError, match="expected accelerate.Accelerator"):
        ScheduledSteps(object(), refresh(model()))
