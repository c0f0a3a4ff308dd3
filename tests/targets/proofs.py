"""Checks for frameworks around a CLIP ViT, for small models and for the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.graph.costs import count_costs
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.load import tower_of
from ovsprune.slim.spec import LayerSpec
from ovsprune.targets import TARGETS, load_into
from ovsprune.targets.layout import Layout
from tests.targets.by_hand import (
    error,
    masked,
    saved,
    slim_by_hand,
    snapshot,
    unchanged,
)

BOUND = 1e-4
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Framework with a tower.

    Attributes:
        name: Of the target.
        tower: Canonical name to tensor.
        slim: Made of ``tower`` by hand, not repaired.
        build: A tower to the framework's model, every parameter with a value.
        run: A model to its outputs, named.
        loss: A model to a number that every part of the tower has a share in.
        heads: Of the dense tower.
        size: Of the dense tower's pictures.
        counted: Height and width of what the tower sees in ``example``.
        example: A model to what it is counted on; None for what the target gives.
        times: A model to how many pictures its tower sees then.
    """

    name: str
    tower: Mapping[str, Tensor]
    slim: SlimCheckpoint
    build: Callable[[Mapping[str, Tensor]], Any]
    run: Callable[[Any], State]
    loss: Callable[[Any], Tensor]
    heads: int
    size: int
    counted: tuple[int, int]
    example: Callable[[Any], Any] | None = None
    times: Callable[[Any], int] = lambda model: 1

    @property
    def target(self) -> Any:
        return TARGETS.get(self.name)

    def layout(self, model: nn.Module) -> Layout:
        depth = len({n.split(".")[2] for n in self.tower if n.startswith("transformer.resblocks.")})
        return self.target.layout(model.state_dict(), depth)  # type: ignore[no-any-return]

    def masked(self, model: Any, slim: SlimCheckpoint | None = None) -> State:
        """Return the outputs of the dense model with the cut units masked."""
        with torch.no_grad(), masked(model, slim or self.slim, self.layout(model)):
            return self.run(model)

    def attached(self, model: Any, slim: SlimCheckpoint | None = None, **options: Any) -> State:
        """Return the outputs of the slim model, which is dense again afterwards."""
        with torch.no_grad(), self.target.attach(model, slim or self.slim, **options):
            return self.run(model)

    def recut(self, kept: Mapping[str, list[int]]) -> SlimCheckpoint:
        """Build a slim checkpoint of the same base with other units in some layers."""
        kept = {name: chosen.tolist() for name, chosen in self.slim.mask.items()} | dict(kept)
        base = self.slim.spec.base
        return slim_by_hand(self.tower, kept, heads=self.heads, size=self.size, base=base)


def slim_equals_masked(case: Case, model: Any, slim: SlimCheckpoint | None = None) -> State:
    """Check that slim and masked outputs are equal, and that the cut changes every output."""
    with torch.no_grad():
        dense = case.run(model)
    wanted = case.masked(model, slim)
    errors = error(case.attached(model, slim, weights="slim"), wanted)
    changed = error(dense, wanted)
    print("slim to masked", errors, "dense to masked", changed)
    assert max(errors.values()) <= BOUND
    assert min(changed.values()) > 100 * BOUND
    return wanted


def _gradients(case: Case, model: Any) -> State:
    model.zero_grad()
    case.loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _shares(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of every gradient, relative to its largest entry.

    Gradients that are zero but for rounding (of keys' biases) are measured by the others.
    """
    assert found.keys() == wanted.keys()
    least = 1e-6 * max(float(w.abs().max()) for w in wanted.values())
    return {
        k: float((found[k] - w).abs().max()) / max(float(w.abs().max()), least)
        for k, w in wanted.items()
    }


def gradients_equal_masked(case: Case, model: Any, bound: float = 1e-6) -> None:
    """Compare the gradients of all parameters, frozen by the framework or not, in float64."""
    model = model.double().requires_grad_(True)
    layout, dense = case.layout(model), _gradients(case, model)
    with masked(model, case.slim, layout):
        model.requires_grad_(True)  # masked puts frozen consumers in
        wanted = _gradients(case, model)
    with case.target.attach(model, case.slim, weights="slim"):
        assert all(p.requires_grad for p in model.parameters())
        found = _gradients(case, model)
    cut = cut_state(layout.tower_state(wanted), case.slim.spec, case.slim.mask)
    assert cut.keys() == case.slim.tower().keys()
    tower = _shares(layout.tower_state(found), cut)
    rest = [name for name in wanted if layout.canonical(name) is None]
    own = _shares({n: found[n] for n in rest}, {n: wanted[n] for n in rest})
    changed = _shares({n: dense[n] for n in rest}, {n: wanted[n] for n in rest})
    print("tower", max(tower.values()), "rest", max(own.values()), "dense", max(changed.values()))
    assert max({**tower, **own}.values()) <= bound
    assert max(changed.values()) > 1e4 * bound


def _reach(case: Case, layer: LayerSpec) -> Tensor:
    """Return the norm of the weights that read each unit of a layer, [units]."""
    read_by = [part.module for part in layer.slices if part.axis == "in"]
    weight = case.tower[f"{(read_by or [f'{layer.name}.out_proj'])[0]}.weight"]
    return weight.unflatten(1, (layer.units, -1)).flatten(2).norm(dim=(0, 2))


def swapped_unit_is_caught(case: Case, model: Any, name: str, wanted: State | None = None) -> None:
    """Check that exchanging the strongest kept and cut units exceeds the bound 100 times."""
    wanted = wanted or case.masked(model)
    reach, kept = _reach(case, case.slim.spec.layer(name)), case.slim.mask[name].tolist()
    order = [int(unit) for unit in reach.argsort(descending=True)]
    gone = next(unit for unit in order if unit in kept)
    come = next(unit for unit in order if unit not in kept)
    swapped = case.recut({name: sorted({*kept, come} - {gone})})
    errors = error(case.attached(model, swapped, weights="slim"), wanted)
    print(name, errors)
    assert max(errors.values()) >= 100 * BOUND


def attach_detach_attach(case: Case, model: Any) -> None:
    """Check that detaching restores the same objects bit for bit, and leaves no hook."""
    changed = {k: v + 0.01 if k.endswith("ln_1.bias") else v for k, v in case.slim.tensors.items()}
    slim = replace(case.slim, tensors=changed)
    before, modules = snapshot(model), dict(model.named_modules())
    hooks = {name: dict(m._forward_hooks) for name, m in modules.items()}
    with torch.no_grad():
        dense = case.run(model)
    states = []
    for _ in range(2):
        attached = case.target.attach(model, slim, weights="slim")
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        with torch.no_grad():
            case.run(model)
        attached.detach()
        assert unchanged(model, before)
        now = dict(model.named_modules())
        assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
        assert {name: dict(m._forward_hooks) for name, m in now.items()} == hooks
        assert not any(m._load_state_dict_pre_hooks for m in now.values())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with torch.no_grad():
        after = case.run(model)
    assert all(torch.equal(after[name], dense[name]) for name in dense)


def trained_parameters_stay(case: Case, model: Any) -> set[str]:
    """Check that attaching changes no ``requires_grad``; return the trained parameters."""
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with case.target.attach(model, case.slim, weights="slim"):
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    return {name for name, learns in before.items() if learns}


def costs_drop_by_the_tower_costs(case: Case, model: Any) -> tuple[int, int, int, int]:
    """Check the lost MACs and parameters; return MACs before and after, then parameters."""
    every = {layer.name: list(range(layer.units)) for layer in case.slim.spec.layers}
    whole = count_costs(tower_of(case.recut(every)).tower, case.counted)
    small = count_costs(tower_of(case.slim).tower, case.counted)
    example = None if case.example is None else case.example(model)
    with torch.no_grad():
        times = case.times(model)
    with transfer(model, case.slim, case.name, weights="slim", example=example) as attached:
        assert attached.macs_before is not None and attached.macs_after is not None
        lost = attached.macs_before - attached.macs_after
        print("MACs", attached.macs_before, attached.macs_after, "tower", whole.macs, small.macs)
        print("parameters", attached.params_before, attached.params_after)
        assert lost == times * (whole.macs - small.macs) > 0, attached.counted_on
        assert attached.params_before - attached.params_after == whole.params - small.params > 0
        counts = attached.macs_before, attached.macs_after
        return (*counts, attached.params_before, attached.params_after)


def tuned_weights_are_cut(case: Case, model: Any) -> None:
    """Check that ``auto`` recognises a finetuned tower and cuts its own weights."""
    layout = case.layout(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if layout.canonical(name) is not None:
                tensor.mul_(1.05)
    own = layout.tower_state({k: v.clone() for k, v in model.state_dict().items()})
    cut = cut_state(own, case.slim.spec, case.slim.mask)
    wanted = case.masked(model)
    with torch.no_grad(), case.target.attach(model, case.slim) as attached:
        assert attached.weights == "target" and "finetuned CLIP" in attached.reason
        found = layout.tower_state(model.state_dict())
        assert found.keys() == cut.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in cut.items())
        assert max(error(case.run(model), wanted).values()) <= BOUND
    with torch.no_grad(), case.target.attach(model, case.slim, weights="slim") as attached:
        assert attached.weights == "slim" and attached.reason == "as requested"
        found = layout.tower_state(model.state_dict())
        assert all(torch.equal(found[name], t) for name, t in case.slim.tower().items())


def round_trip_on_disk(
    case: Case, model: Any, fresh: Any, path: Path, weights: str = "auto", file: Path | None = None
) -> dict[str, Any]:
    """Check that converting the framework's checkpoint gives the same state as attaching.

    Args:
        case: The framework.
        model: It, dense.
        fresh: It again, with other values.
        path: A folder.
        weights: ``auto`` or ``target``.
        file: What the framework's own checkpointer saved of ``model``; made here if None.

    Returns:
        The record of the transfer.
    """
    slim = saved(case.slim, path / "slim")
    if file is None:
        file = path / "model_final.pth"
        torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "iteration": 7}, file)
    record = transfer(
        slim=slim, target=case.name, checkpoint=file, output=path / "out", weights=weights
    )
    keys = model.state_dict().keys()
    assert record["replaced"].keys() | record["kept"].keys() == keys
    assert not record["replaced"].keys() & record["kept"].keys()
    assert all([*record["replaced"].values(), *record["kept"].values()])
    gone = {name for name in record["dropped"] if not name.startswith("slim: ")}
    assert "iteration" in gone and not gone & keys
    assert load_into(fresh, path / "out") == []
    with case.target.attach(model, case.slim, weights=weights):
        wanted, state = model.state_dict(), fresh.state_dict()
        assert list(wanted) == list(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
        missing, unexpected = model.load_state_dict(state, strict=True)  # a slim file loads
        assert not missing and not unexpected
        with torch.no_grad():
            found, expected = case.run(fresh), case.run(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        # what detectron2's loader leaves of a dense file: norms, and nothing slim
        dense = torch.load(file, weights_only=True)["model"]
        fitting = {k: v for k, v in dense.items() if v.shape == wanted[k].shape}
        assert len(fitting) < len(dense)
        for part in (dense, fitting):
            with pytest.raises(TargetError, match="not of the slim model"):
                model.load_state_dict(part, strict=False)
    return dict(record)
