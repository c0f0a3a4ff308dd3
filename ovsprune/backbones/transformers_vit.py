"""Vision transformers of transformers: CLIP, SigLIP, SigLIP 2 and DINOv2, by ``hf:NAME``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones import FAMILIES
from ovsprune.backbones.state_file import read_state
from ovsprune.backbones.transformers_model import (
    encoder_of,
    filled,
    quiet,
    text_of,
    tower_in,
    with_text,
)
from ovsprune.backbones.transformers_source import Source, cached_folder, open_source
from ovsprune.core.errors import CheckpointError, OptionError, WeightsError
from ovsprune.core.protocols import Backbone, PrunableLayer, Stages
from ovsprune.core.records import DenseModel, Group, Plan, StreamPoint
from ovsprune.slim.activation import find_activations
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.transformers_build import architecture_of, build_tower, transformers_library
from ovsprune.slim.transformers_tower import TransformersTower

__all__ = ["TransformersVit"]


@FAMILIES.register("transformers-vit")
class TransformersVit:
    """transformers' CLIP, SigLIP, SigLIP 2 and DINOv2: heads and MLP units, the pool's MLP."""

    library = "transformers"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Never: open_clip builds none of these."""
        return False

    def names(self) -> Sequence[str]:
        """None: every name with the prefix ``hf:`` is for this family."""
        return ()

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Load ``hf:FOLDER``, ``hf:ORG/REPOSITORY``, or a folder of transformers' form.

        Args:
            name: Which model; a folder needs a ``config.json``.
            pretrained: A file, ``"none"``, or None for its own weights, which must be safetensors.
            activation: What the network has anyway, or None.

        Raises:
            WeightsError: The model or its weights cannot be had, or do not fit.
            OptionError: ``activation`` is not the network's own.
        """
        source = open_source(name)
        model: nn.Module | None = None
        try:
            with quiet():
                architecture = architecture_of(source.model_class, source.config)
                if pretrained == "none":
                    tower = build_tower(architecture)
                else:
                    at, state = _weights(source, pretrained)
                    model = filled(source.name, at, architecture, state)
                    tower = tower_in(model, architecture)
        except CheckpointError as error:
            raise WeightsError(f"{source.folder / 'config.json'}: {error}") from error
        dense = DenseModel(
            name=source.name,
            architecture=architecture,
            preprocess=source.preprocess(tower.native_size),
            pretrained=None if pretrained == "none" else Path(pretrained or source.label).name,
            trained=model is not None,
        )
        backbone = self._assembled(dense, tower)
        if activation not in (None, backbone.activation):
            raise OptionError(
                f"--activation {activation!r}: {name} has {backbone.activation}; leave it out"
            )
        if model is not None:
            backbone.text = text_of(model, architecture)
        if backbone.text:
            source.fetch_tokenizer()
            backbone.encoder = encoder_of(model, source.folder)
        return backbone

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense tower with random weights, and the text tower; see the protocol.

        Texts can be encoded if the tokenizer is in the local cache.
        """
        name, form = dense.name, dense.architecture
        with quiet():
            model = with_text(name, form, dense.text) if dense.text else None
            tower = build_tower(form) if model is None else tower_in(model, form)
        backbone = self._assembled(dense, tower)
        if model is not None:
            backbone.text, backbone.encoder = dense.text, encoder_of(model, cached_folder(name))
        return backbone

    def _assembled(self, dense: DenseModel, tower: TransformersTower) -> Backbone:
        """Make the backbone of a built tower, without a text tower."""
        found = find_activations(m for block in tower.blocks.values() for m in block.modules())
        if len(found) != 1 or not found <= set(ACTIVATIONS):
            raise WeightsError(
                f"{dense.name} has the activation "
                f"{tower.model.config.to_dict().get('hidden_act')!r}; "
                f"known are {', '.join(ACTIVATIONS)}"
            )
        (activation,) = found
        return Backbone(
            name=dense.name,
            pretrained=dense.pretrained,
            trained=dense.trained,
            family="transformers-vit",
            tower=tower,
            stages=self.stages,
            preprocess=dense.preprocess,
            activation=activation,
            architecture=dict(dense.architecture),
            library_version=transformers_library().__version__,
            text={},
        )

    def rewrite(self, tower: nn.Module) -> None:
        """Nothing: queries, keys and values are apart already, and heads are counted by them."""

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Nothing: what was cut are transformers' own modules."""

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Heads and MLP units of every block; the last block's heads are protected."""
        model: Any = tower
        last = list(model.blocks)[-1]
        seeds = []
        for name, block in model.blocks.items():
            form = model.form
            scaled = hasattr(block, "layer_scale1")
            middle = None if scaled else StreamPoint(f"{name}.{form.middle}", "input")
            after = None if scaled else StreamPoint(name, "output")
            reason = "frameworks read the last block's attention directly" if name == last else None
            heads = f"{name}.{form.attention}"
            width = getattr(block, form.attention).head_dim
            seeds.append(
                PrunableLayer(heads, "heads", f"{heads}.q_proj", width, name, middle, reason)
            )
            seeds.append(_mlp_seed(name, block.mlp, after))
        if model.form.pool is not None:
            pool = model.path(model.form.pool)
            mlp = model.get_submodule(pool).mlp
            seeds.append(_mlp_seed(pool, mlp, StreamPoint(pool, "output")))
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """Patches and positions; the blocks, an attention pool as the last; norm, projection."""
        model: Any = tower
        return Stages(model.stem, model.steps(), model.read_out)


def _mlp_seed(block: str, mlp: nn.Module, stream: StreamPoint | None) -> PrunableLayer:
    """Units of an MLP; those of a gate go along with those that it multiplies."""
    first = "fc1" if hasattr(mlp, "fc1") else "gate_proj"
    return PrunableLayer(f"{block}.mlp", "mlp", f"{block}.mlp.{first}", 1, block, stream)


def _weights(source: Source, pretrained: str | None) -> tuple[Path, dict[str, Tensor]]:
    """Where the weights come from, and what they are."""
    if pretrained is None:
        return source.folder, source.state()
    path = Path(pretrained)
    if not path.is_file():
        raise WeightsError(
            f"--pretrained {pretrained!r} is no file; {source.name} takes a file, 'none' for "
            "random weights, or without --pretrained its own"
        )
    return path, read_state(path)
