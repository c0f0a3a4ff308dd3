"""Any model that holds a CLIP image tower, found by its structure.

Names are read as open_clip and OpenAI write them, or as transformers does, under any path. What
cannot be seen from the outside (who else reads inside the tower) is said in the report's notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.attach import Applied
from ovsprune.targets import TARGETS
from ovsprune.targets.attached import Attached
from ovsprune.targets.check import Weights
from ovsprune.targets.convert import Converted
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.hooks import Hook
from ovsprune.targets.key_map import KINDS, KeyMap, kind_of
from ovsprune.targets.layout import BLOCK_PARTS, POSITIONS, BlockStack, Layout, hf_block

__all__ = ["FoundTower", "Generic", "find_towers"]

_WHAT = "a model with a CLIP tower in it"

_UNPROVEN = (
    "not proven: who else reads inside the tower (hooks on blocks, masks made for a number of "
    "heads, slices of in_proj_weight); compare an output before and after"
)

_SCRIPT = """\
# where the model is built, before its optimiser is
import ovsprune.targets  # pip install --no-deps ovsprune

ovsprune.targets.load_into(model, {output!r})  # slim modules, then every tensor

# Do not load a dense checkpoint afterwards; those that this training saves are slim.
"""


@dataclass(frozen=True)
class _Dialect:
    """How a tower's parts are called, below its own path.

    Attributes:
        says: Whose names they are.
        kind: Kind of tower.
        stem: Canonical name to path.
        needs: Canonical tensor by which such a tower is told, beside the kind's own mark.
        stack: Path of the blocks, and their parts; None for residual networks.
        activation: Path of the first activation.
    """

    says: str
    kind: str
    stem: Mapping[str, str]
    needs: str
    stack: BlockStack | None
    activation: str


_VIT = ("class_embedding", POSITIONS, "conv1", "ln_pre", "ln_post", "proj")
_RESNET = (*(f"{n}{i}" for n in ("conv", "bn") for i in (1, 2, 3)), "attnpool")
_HF = {
    "class_embedding": "embeddings.class_embedding",
    "conv1": "embeddings.patch_embedding",
    POSITIONS: "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}

_DIALECTS = (
    _Dialect(
        "open_clip's names",
        "vit",
        {name: name for name in _VIT},
        "conv1.weight",
        BlockStack("transformer.resblocks", BLOCK_PARTS),
        "transformer.resblocks.0.mlp.gelu",
    ),
    _Dialect(
        "transformers' names",
        "vit",
        {k: f"vision_model.{v}" for k, v in _HF.items()} | {"proj": "visual_projection.weight"},
        "conv1.weight",
        BlockStack("vision_model.encoder.layers", hf_block()),
        "vision_model.encoder.layers.0.mlp.activation_fn",
    ),
    _Dialect(
        "open_clip's names",
        "resnet",
        {name: name for name in (*_RESNET, *(f"layer{i}" for i in range(1, 5)))},
        "attnpool.c_proj.weight",
        None,
        "layer1.0.act1",
    ),
)


@dataclass(frozen=True)
class FoundTower:
    """A tower in a model.

    Attributes:
        path: Its path; ``""`` for the model itself.
        kind: Of :data:`~ovsprune.targets.key_map.KINDS`.
        says: Whose names it has.
        places: Where its parts are.
    """

    path: str
    kind: str
    says: str
    places: KeyMap


def find_towers(names: Iterable[str]) -> list[FoundTower]:
    """Every CLIP image tower that names of tensors tell of, in their order."""
    names = list(names)
    known, found = set(names), []
    for dialect in _DIALECTS:
        mark = _layout(dialect, "").paths(KINDS[dialect.kind].mark)[0]
        ends = [n for n in names if n == mark or n.endswith(f".{mark}")]
        for prefix in (name.removesuffix(mark).rstrip(".") for name in ends):
            if _layout(dialect, prefix).paths(dialect.needs)[0] in known:
                found.append(_found(dialect, prefix, known))
    return found


def _layout(dialect: _Dialect, prefix: str) -> Layout:
    stem = {name: _under(prefix, path) for name, path in dialect.stem.items()}
    if dialect.stack is None:
        return Layout(stem=stem)
    return Layout(
        stem=stem, stacks=(replace(dialect.stack, path=_under(prefix, dialect.stack.path)),)
    )


def _found(dialect: _Dialect, prefix: str, known: set[str]) -> FoundTower:
    layout = _layout(dialect, prefix)
    here = {
        name: path
        for name, path in layout.stem.items()
        if any(k == path or k.startswith(f"{path}.") for k in known)
    }
    gone = dict.fromkeys(layout.stem.keys() - here.keys(), "the model has no such part")
    places = KeyMap(
        framework=_WHAT,
        stem=here,
        stacks=layout.stacks,
        absent=gone,
        transposed=("proj",) if dialect.says.startswith("transformers") else (),
        activations=(_under(prefix, dialect.activation),),
    )
    return FoundTower(prefix, dialect.kind, dialect.says, places)


def _under(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


@TARGETS.register("generic")
class Generic:
    """Any model that holds a CLIP tower by structure; says what it found and could not prove."""

    framework = "any model with a tower of open_clip's, OpenAI's or transformers' names"
    takes = ("vit", "resnet")
    protects: Mapping[str, str] = {
        "residual width": "what reads the stream is not known",
        "projection": "what reads the embedding is not known",
        "depth": "who counts blocks is not known",
    }
    trainable = ("*",)
    files: tuple[str, ...] = ()
    hooks: tuple[Hook, ...] = ()
    fallback = True

    def detect(self, model: nn.Module) -> bool:
        """Whether there is a tower in ``model``."""
        return bool(find_towers(model.state_dict()))

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Whose names and which kind, to the path; raises TargetError without a tower."""
        found = find_towers(model.state_dict())
        if not found:
            raise _none(type(model).__name__)
        return {f"{tower.kind}, {tower.says} ({i})": tower.path for i, tower in enumerate(found)}

    def tower_names(self, model: nn.Module) -> frozenset[str]:
        """Names of the tensors of all towers; raises TargetError without one."""
        names = model.state_dict()
        found = find_towers(names)
        if not found:
            raise _none(type(model).__name__)
        places = [tower.key_map for tower in found]
        layouts = [p.layout(names, sum(p.depths(names))) for p in places]
        return frozenset(n for n in names if any(x.canonical(n) is not None for x in layouts))

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Names in both directions; without ``names`` as open_clip has them under ``visual``."""
        kind = "vit" if depth else "resnet"
        if names is None:
            dialect = next(d for d in _DIALECTS if d.kind == kind)
            everything = {_under("visual", path) for path in dialect.stem.values()}
            return _found(dialect, "visual", everything).key_map.layout(None, depth)
        return _one(names, kind, "the checkpoint").key_map.layout(names, depth)

    def example(self, model: nn.Module) -> Mapping[str, Any] | None:
        """None: what the model takes is not known."""
        return None

    def prepare(self, model: nn.Module) -> None:
        """Nothing: what the model does is not known."""

    def apply_compat(self, model: nn.Module) -> Applied:
        """Nothing: what the model needs is not known."""
        return Applied()

    def enable_tower_grad(self, model: nn.Module) -> Applied:
        """Nothing: how the model runs its tower is not known."""
        return Applied()

    def check(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> tuple[Weights, str]:
        """Whether the tower in ``model`` can take the slim one; TargetError says why not."""
        self.towers(model)
        tabled, _ = self._tabled(model.state_dict(), checkpoint, type(model).__name__, model)
        return tabled.check(model, checkpoint, weights=weights, force=force)

    def attach(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Attached:
        """Put the slim tower into ``model``, in place."""
        self.towers(model)
        tabled, notes = self._tabled(model.state_dict(), checkpoint, type(model).__name__, model)
        attached = tabled.attach(model, checkpoint, weights=weights, force=force)
        attached.notes += notes
        return attached

    def convert(
        self,
        state: Mapping[str, Tensor] | None,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Converted:
        """A saved state with the slim tower in it."""
        if state is None:
            raise TargetError(
                "where the tower is, the model's own checkpoint tells; give one (--checkpoint FILE)"
            )
        tabled, notes = self._tabled(state, checkpoint, "the checkpoint", None)
        converted = tabled.convert(state, checkpoint, weights=weights, force=force)
        return replace(converted, notes=(*converted.notes, *notes))

    def lines(self, output: str) -> str:
        """Lines for the training script."""
        return _SCRIPT.format(output=output)

    def _tabled(
        self,
        names: Mapping[str, object],
        checkpoint: SlimCheckpoint,
        given: str,
        model: nn.Module | None,
    ) -> tuple[TableTarget, tuple[str, ...]]:
        """The target for the tower that is there, and what can and cannot be said of it."""
        found = _one(names, kind_of(checkpoint, self.takes, _WHAT), given)
        places = found.key_map
        where = found.path or "the model itself"
        notes = [f"found: a tower ({found.kind}) with {found.says}: {where}"]
        if places.absent:
            notes.append(f"not found: {', '.join(sorted(places.absent))}")
        modules = {name for name, _ in model.named_modules()} if model is not None else set()
        if not set(places.activations) <= modules:
            places = replace(places, activations=())
            notes.append(f"not proven: that its activation is {checkpoint.spec.activation}")
        tabled = TableTarget(
            name="generic",
            framework=self.framework,
            key_map=places,
            takes=self.takes,
            protects=self.protects,
            trainable=(f"{found.path}.*" if found.path else "*",),
            script=_SCRIPT,
        )
        return tabled, (*notes, _UNPROVEN)


def _one(names: Iterable[str], kind: str, given: str) -> FoundTower:
    """The one tower of ``kind``.

    Raises:
        TargetError: There is none, or there are several.
    """
    found = [tower for tower in find_towers(names) if tower.kind == kind]
    if not found:
        raise _none(given)
    if len(found) > 1:
        paths = ", ".join(tower.path or "the model itself" for tower in found)
        raise TargetError(
            f"{given} holds {len(found)} such towers ({paths}); give the module that holds the one "
            "that is meant"
        )
    return found[0]


def _none(given: str) -> TargetError:
    return TargetError(
        f"{given} is not {_WHAT} that can be found: no blocks with the names of open_clip, OpenAI "
        "or transformers beside a patch embedding, and no residual network with an attention "
        "pool. Name the target if there is one for this framework, or give ovsprune.apply the "
        "tower with a prefix_map"
    )
