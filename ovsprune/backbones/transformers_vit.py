"""Vision transformers of transformers: CLIP, SigLIP, SigLIP 2 and DINOv2, by ``hf:NAME``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.layers import has_one_activation, heads_layer, mlp_layer
from ovsprune.backbones.registry import FAMILIES
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
from ovsprune.slim.transformers_build import (
    build_tower,
    describe_architecture,
    transformers_library,
)
from ovsprune.slim.transformers_tower import TransformersTower

__all__ = ["TransformersVit"]


@FAMILIES.register("transformers-vit")
class TransformersVit:
    """transformers' CLIP, SigLIP, SigLIP 2 and DINOv2: heads and MLP units, the pool's MLP."""

    library = "transformers"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Return False: open_clip builds none of these."""
        return False

    def names(self) -> Sequence[str]:
        """Return nothing: any name with the prefix ``hf:`` belongs to this family."""
        return ()

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Load ``hf:FOLDER``, ``hf:ORG/REPOSITORY``, or a folder in the format of transformers.

        ``activation`` can only confirm the activation of the network.

        Raises:
            WeightsError: The model or its weights are not available, or do not fit.
            OptionError: ``activation`` is not that of the network.
        """
        source = open_source(name)
        model: nn.Module | None = None
        try:
            with quiet():
                architecture = describe_architecture(source.model_class, source.config)
                if pretrained == "none":
                    tower = build_tower(architecture)
                else:
                    path, state = _weights(source, pretrained)
                    model = filled(source.name, path, architecture, state)
                    tower = tower_in(model, architecture)
        except CheckpointError as error:
            raise WeightsError(f"{source.folder / 'config.json'}: {error}") from error
        label = "local" if source.repository is None else "hub"
        dense = DenseModel(
            name=source.name,
            architecture=architecture,
            preprocess=source.preprocess(tower.native_size),
            pretrained=None if model is None else Path(pretrained or label).name,
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
        """Build the dense tower and the text tower; encoding texts needs a cached tokenizer."""
        name, architecture = dense.name, dense.architecture
        with quiet():
            model = with_text(name, architecture, dense.text) if dense.text else None
            tower = build_tower(architecture) if model is None else tower_in(model, architecture)
        backbone = self._assembled(dense, tower)
        if model is not None:
            backbone.text, backbone.encoder = dense.text, encoder_of(model, cached_folder(name))
        return backbone

    def _assembled(self, dense: DenseModel, tower: TransformersTower) -> Backbone:
        """Make the backbone of a built tower, without a text tower."""
        modules = [m for block in tower.blocks.values() for m in block.modules()]
        if not has_one_activation(modules):
            raise WeightsError(
                f"{dense.name} has the activation "
                f"{tower.model.config.to_dict().get('hidden_act')!r}; "
                f"known are {', '.join(ACTIVATIONS)}"
            )
        (activation,) = find_activations(modules)
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
        """Do nothing: queries, keys and values are separate layers already."""

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Do nothing: modules of transformers work with fewer heads and units."""

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return heads and MLP units of blocks and pool; the last block's heads are protected."""
        model: Any = tower
        layout = model.layout
        last = list(model.blocks)[-1]
        layers = []
        for name, block in model.blocks.items():
            # With a layer scale (DINOv2), the stream is no target for a refit before it.
            scaled = hasattr(block, "layer_scale1")
            middle = None if scaled else StreamPoint(f"{name}.{layout.mlp_norm}", "input")
            after = None if scaled else StreamPoint(name, "output")
            path, width = f"{name}.{layout.attention}", getattr(block, layout.attention).head_dim
            layers.append(heads_layer(name, path, width, middle, last=name == last))
            layers.append(mlp_layer(name, block.mlp, after))
        if layout.pool is not None:
            pool = model.trunk_path(layout.pool)
            mlp = model.get_submodule(pool).mlp
            layers.append(mlp_layer(pool, mlp, StreamPoint(pool, "output")))
        return layers

    def stages(self, tower: nn.Module) -> Stages:
        """Return patches and positions; blocks and attention pool; norm and projection."""
        model: Any = tower
        return Stages(model.stem, model.steps(), model.read_out)


def _weights(source: Source, pretrained: str | None) -> tuple[Path, dict[str, Tensor]]:
    """Return the source of the weights, for messages, and the weights."""
    if pretrained is None:
        return source.folder, source.state()
    path = Path(pretrained)
    if not path.is_file():
        raise WeightsError(
            f"--pretrained {pretrained!r} is no file; {source.name} takes a file, 'none' for "
            "random weights, or without --pretrained its own"
        )
    return path, read_state(path)
