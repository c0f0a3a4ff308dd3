"""Checks that DistributedDataParallel averages every gradient that a plan produces.

DistributedDataParallel lists the parameters with ``requires_grad`` when it wraps a model. Later it
averages the gradients of those parameters only, and by default it waits for all of them. A plan
that changes during the training therefore needs two things: all of its parameters must require
gradients while the model is wrapped, and ``find_unused_parameters=True`` must be set.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from ovsprune.core.errors import ScheduleError

__all__ = ["check_averaged", "check_process_count", "check_wrapped_before", "process_count"]

_REMEDY = (
    "for a policy that changes during the training, wrap the model inside `with plan.open():` and "
    "with find_unused_parameters=True (Lightning: strategy='ddp_find_unused_parameters_true')"
)


def process_count() -> int:
    """Return the number of processes of the default process group, 1 without one."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1


def check_wrapped_before(wrapper: DistributedDataParallel, all_required_grad: bool) -> None:
    """Check a model that was wrapped before its plan was made.

    ``all_required_grad`` is True if every parameter that will train required gradients then.

    Raises:
        ScheduleError: The wrapper waits for gradients of parameters that the plan freezes, or did
            not register some that will train.
    """
    if all_required_grad and _allows_unused(wrapper):
        return
    raise ScheduleError(
        "DistributedDataParallel wrapped the model before the plan was made, and waits for the "
        "gradients of the parameters that it registered then. Make the plan first and wrap "
        f"afterwards; {_REMEDY}"
    )


def check_averaged(wrapper: DistributedDataParallel, expected: int) -> None:
    """Check the wrapper of a changing plan, which trains ``expected`` tensors at some step.

    Raises:
        ScheduleError: The wrapper waits for the gradients of all parameters, or averages fewer
            than ``expected``.
    """
    if not _allows_unused(wrapper):
        raise ScheduleError(
            "DistributedDataParallel waits for the gradients of all parameters that it registered; "
            f"{_REMEDY}"
        )
    # torch has no public way to ask a wrapper which parameters it averages.
    registered = int(wrapper._get_ddp_logging_data()["num_parameter_tensors"])  # type: ignore[no-untyped-call]
    if registered < expected:
        raise ScheduleError(
            f"DistributedDataParallel wrapped the model while the plan froze parts of it: it "
            f"averages {registered} of the {expected} parameters that will train; {_REMEDY}"
        )


def check_process_count(policy: str, processes: int) -> None:
    """Refuse several processes for a changing plan that was never opened before wrapping.

    Raises:
        ScheduleError: There are several processes.
    """
    if processes > 1:
        raise ScheduleError(
            f"{processes} processes train, and the layers that the policy {policy} trains later "
            f"would get different weights in each process: {_REMEDY}"
        )


def _allows_unused(wrapper: DistributedDataParallel) -> bool:
    """Return True if the wrapper tolerates parameters without a gradient."""
    # With static_graph, the parameters that have gradients must be the same in every step.
    return wrapper.find_unused_parameters and not wrapper.static_graph
