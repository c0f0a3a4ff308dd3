"""Target for any model that contains a CLIP image tower, which is found by its structure.

The tower may be at any path and has the names of open_clip and OpenAI, or those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.attach import Applied
from ovsprune.targets.attached import Attached
from ovsprune.targets.check import Weights
from ovsprune.targets.convert import Converted
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.hooks import Hook
from ovsprune.targets.key_map import KINDS, KeyMap, kind_of
from ovsprune.targets.layout import (
    BLOCK_PARTS,
    POSITIONS,
    VIT_STEM,
    BlockStack,
    Layout,
    hf_block,
)
from ovsprune.targets.registry import TARGETS

__all__ = ["Generic", "find_towers"]

_DESCRIPTION = "a model with a CLIP tower in it"

_UNVERIFIED = (
    "not verified: other code that reads inside the tower (hooks on blocks, masks for a fixed "
    "number of heads, slices of in_proj_weight); compare an output before and after"
)

_SCRIPT = """\
# where the model is built, before the optimiser is created
import ovsprune.targets  # pip install --no-deps ovsprune

ovsprune.targets.load_into(model, {output!r})  # replaces modules, loads every tensor

# Do not load a dense checkpoint afterwards. Checkpoints that this training saves are slim.
"""


@dataclass(frozen=True)
class _NamingScheme:
    """Naming scheme of a tower's parts, below the tower's path."""

    naming: str  # description in messages
    kind: str
    stem: Mapping[str, str]
    required: str  # canonical tensor that such a tower has, in addition to the mark of its kind
    stack: BlockStack | None  # None for residual networks
    activation: str  # path of the first activation


_RESNET = (*(f"{n}{i}" for n in ("conv", "bn") for i in (1, 2, 3)), "attnpool")
_HF = {
    "class_embedding": "embeddings.class_embedding",
    "conv1": "embeddings.patch_embedding",
    POSITIONS: "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}

_SCHEMES = (
    _NamingScheme(
        naming="open_clip's names",
        kind="vit",
        stem={name: name for name in VIT_STEM},
        required="conv1.weight",
        stack=BlockStack("transformer.resblocks", BLOCK_PARTS),
        activation="transformer.resblocks.0.mlp.gelu",
    ),
    _NamingScheme(
        naming="transformers' names",
        kind="vit",
        stem={canonical: f"vision_model.{path}" for canonical, path in _HF.items()}
        | {"proj": "visual_projection.weight"},
        required="conv1.weight",
        stack=BlockStack("vision_model.encoder.layers", hf_block()),
        activation="vision_model.encoder.layers.0.mlp.activation_fn",
    ),
    _NamingScheme(
        naming="open_clip's names",
        kind="resnet",
        stem={name: name for name in (*_RESNET, *(f"layer{i}" for i in range(1, 5)))},
        required="attnpool.c_proj.weight",
        stack=None,
        activation="layer1.0.act1",
    ),
)


@dataclass(frozen=True)
class _FoundTower:
    """Tower in a model: its path, kind (of ``KINDS``), naming scheme and the paths of its parts."""

    path: str  # "" for the model itself
    kind: str
    naming: str
    key_map: KeyMap


def find_towers(names: Iterable[str]) -> list[_FoundTower]:
    """Find the CLIP image towers in a model, given the names of its tensors."""
    names = list(names)
    known, towers = set(names), []
    for scheme in _SCHEMES:
        mark = _layout(scheme, "").paths(KINDS[scheme.kind].mark)[0]
        # the mark is in the first block, so each match is one tower (text towers lack `required`)
        matches = [n for n in names if n == mark or n.endswith(f".{mark}")]
        for prefix in (name.removesuffix(mark).rstrip(".") for name in matches):
            if _layout(scheme, prefix).paths(scheme.required)[0] in known:
                towers.append(_tower(scheme, prefix, known))
    return towers


def _under(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def _layout(scheme: _NamingScheme, prefix: str) -> Layout:
    """Return the layout of a complete tower under ``prefix``."""
    stack = scheme.stack
    return Layout(
        stem={name: _under(prefix, path) for name, path in scheme.stem.items()},
        stacks=() if stack is None else (replace(stack, path=_under(prefix, stack.path)),),
    )


def _tower(scheme: _NamingScheme, prefix: str, known: set[str]) -> _FoundTower:
    """Describe the tower under ``prefix``; parts that no name in ``known`` has are absent."""
    layout = _layout(scheme, prefix)
    present = {
        name: path
        for name, path in layout.stem.items()
        if any(k == path or k.startswith(f"{path}.") for k in known)
    }
    key_map = KeyMap(
        framework=_DESCRIPTION,
        stem=present,
        stacks=layout.stacks,
        absent=dict.fromkeys(layout.stem.keys() - present.keys(), "the model has no such part"),
        transposed=("proj",) if scheme.naming.startswith("transformers") else (),
        activations=(_under(prefix, scheme.activation),),
    )
    return _FoundTower(prefix, scheme.kind, scheme.naming, key_map)


@TARGETS.register("generic")
class Generic:
    """Target for any model with a CLIP tower; the report lists what could not be verified."""

    framework = "any model with a tower that has the names of open_clip, OpenAI or transformers"
    takes = ("vit", "resnet")
    protects: Mapping[str, str] = {
        "residual width": "other code may read the residual stream",
        "projection": "other code may read the embedding",
        "depth": "other code may count blocks",
    }
    trainable = ("*",)
    files: tuple[str, ...] = ()
    hooks: tuple[Hook, ...] = ()
    fallback = True

    def detect(self, model: nn.Module) -> bool:
        """Return True if ``model`` contains a tower."""
        return bool(find_towers(model.state_dict()))

    def _towers(self, model: nn.Module) -> list[_FoundTower]:
        """Return the towers of ``model``; raise TargetError without one."""
        towers = find_towers(model.state_dict())
        if not towers:
            raise _no_tower(type(model).__name__)
        return towers

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Return the path of each tower."""
        towers = enumerate(self._towers(model))
        return {f"{tower.kind}, {tower.naming} ({i})": tower.path for i, tower in towers}

    def tower_names(self, model: nn.Module) -> frozenset[str]:
        """Return the names of the tensors of all towers."""
        names = model.state_dict()
        key_maps = [tower.key_map for tower in self._towers(model)]
        layouts = [key_map.layout(names, sum(key_map.depths(names))) for key_map in key_maps]
        return frozenset(
            name for name in names if any(layout.canonical(name) is not None for layout in layouts)
        )

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Return the names in both directions; without ``names``, open_clip's under ``visual``."""
        kind = "vit" if depth else "resnet"  # a residual network has no transformer blocks
        if names is None:
            scheme = next(scheme for scheme in _SCHEMES if scheme.kind == kind)
            all_parts = {f"visual.{path}" for path in scheme.stem.values()}
            return _tower(scheme, "visual", all_parts).key_map.layout(None, depth)
        return _only_tower(names, kind, "the checkpoint").key_map.layout(names, depth)

    def example(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Return None: the input of the model is not known."""
        return None

    def prepare(self, model: nn.Module) -> None:
        """Do nothing: the computations of the model are not known."""

    def apply_compat(self, model: nn.Module) -> Applied:
        """Change nothing: the requirements of the model are not known."""
        return Applied()

    def enable_tower_grad(self, model: nn.Module) -> Applied:
        """Change nothing: it is not known how the model runs its tower."""
        return Applied()

    def check(
        self, model: nn.Module, checkpoint: SlimCheckpoint, **options: Any
    ) -> tuple[Weights, str]:
        """Check that the slim tower fits; return the weights that it would get, and why."""
        table, _ = self._table(model.state_dict(), checkpoint, model)
        return table.check(model, checkpoint, **options)

    def attach(self, model: nn.Module, checkpoint: SlimCheckpoint, **options: Any) -> Attached:
        """Replace the tower of ``model`` by the slim one, in place."""
        table, notes = self._table(model.state_dict(), checkpoint, model)
        attached = table.attach(model, checkpoint, **options)
        attached.notes += notes
        return attached

    def convert(
        self, state: Mapping[str, Tensor] | None, checkpoint: SlimCheckpoint, **options: Any
    ) -> Converted:
        """Return the model's state dict with the slim tower in it; requires ``state``."""
        if state is None:
            raise TargetError(
                "the target generic needs the model's checkpoint to locate the tower; give one "
                "(--checkpoint FILE)"
            )
        table, notes = self._table(state, checkpoint)
        converted = table.convert(state, checkpoint, **options)
        return replace(converted, notes=(*converted.notes, *notes))

    def lines(self, output: str) -> str:
        """Return the lines to add to the training script."""
        return _SCRIPT.format(output=output)

    def _table(
        self,
        names: Mapping[str, object],
        checkpoint: SlimCheckpoint,
        model: nn.Module | None = None,
    ) -> tuple[TableTarget, tuple[str, ...]]:
        """Return a table for the tower that was found, and the notes of the report."""
        subject = "the checkpoint" if model is None else type(model).__name__
        tower = _only_tower(names, kind_of(checkpoint, self.takes, _DESCRIPTION), subject)
        key_map = tower.key_map
        path = tower.path or "the model itself"
        notes = [f"found: a tower ({tower.kind}) with {tower.naming}: {path}"]
        if key_map.absent:
            notes.append(f"not found: {', '.join(sorted(key_map.absent))}")
        modules = {name for name, _ in model.named_modules()} if model is not None else set()
        # the model may call its activation as a function; a state dict shows no modules at all
        if not set(key_map.activations) <= modules:
            key_map = replace(key_map, activations=())
            notes.append(f"not verified: that its activation is {checkpoint.spec.activation}")
        table = TableTarget(
            name="generic",
            framework=self.framework,
            key_map=key_map,
            takes=self.takes,
            protects=self.protects,
            trainable=(f"{tower.path}.*" if tower.path else "*",),
            script=_SCRIPT,
        )
        return table, (*notes, _UNVERIFIED)


def _only_tower(names: Iterable[str], kind: str, subject: str) -> _FoundTower:
    """Return the only tower of ``kind``; raise TargetError for none or several."""
    towers = [tower for tower in find_towers(names) if tower.kind == kind]
    if not towers:
        raise _no_tower(subject)
    if len(towers) > 1:
        paths = ", ".join(tower.path or "the model itself" for tower in towers)
        raise TargetError(
            f"{subject} has {len(towers)} towers of the kind {kind} ({paths}); pass the module "
            "that contains the intended one"
        )
    return towers[0]


def _no_tower(subject: str) -> TargetError:
    return TargetError(
        f"{subject} is not {_DESCRIPTION}: expected blocks with the names of open_clip, OpenAI or "
        "transformers and a patch embedding, or a residual network with an attention pool. Name "
        "the target if there is one for this framework, or call ovsprune.apply on the tower with "
        "a prefix_map"
    )
