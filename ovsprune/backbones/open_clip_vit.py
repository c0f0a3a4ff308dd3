"""open_clip's VisionTransformer, and the CLIP around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_folder import Folder, embedded, is_folder, open_folder
from ovsprune.backbones.open_clip_model import build_clip, encoder_of, fit_text, preprocess_of
from ovsprune.backbones.pretrained import default_tag, fit, read_state, resolve
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone, Seed, Stages
from ovsprune.core.records import Group, Plan, Preprocess, StreamPoint
from ovsprune.graph.attention import SeparateAttention
from ovsprune.slim import SlimAttention

__all__ = ["OpenClipVit", "assemble", "build_clip"]

TINY = "tiny"
_GELUS = ("gelu", "quick_gelu")


@FAMILIES.register("open_clip-vit")
class OpenClipVit:
    """open_clip VisionTransformer: heads and MLP units of every block."""

    library = "open_clip_torch"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether open_clip builds a plain VisionTransformer from ``config``."""
        return _is_plain_vit(config)

    def names(self) -> Sequence[str]:
        """``tiny`` and open_clip's ViTs that have class-token or average pooling."""
        return _names()

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the CLIP called ``name`` and load its weights.

        The activation is the pretrained tag's own (OpenAI's tags are QuickGELU, also under the
        plain name, for which open_clip builds GELU and only warns); for a bare file the name's
        (``-quickgelu``), or what ``activation`` says.

        Raises:
            WeightsError: The weights cannot be had or do not fit.
            OptionError: ``activation`` is unknown, or contradicts the tag's own.
        """
        if activation is not None and activation not in _GELUS:
            raise OptionError(f"--activation {activation!r} is unknown; known: {', '.join(_GELUS)}")
        if name == TINY and pretrained is None:
            with embedded(TINY) as folder:
                return _load_folder(TINY, "embedded", folder, activation)
        if is_folder(Path(name)) and pretrained is None:
            path = Path(name)
            return _load_folder(path.resolve().name, "local", open_folder(path), activation)
        config = _config(name)
        preprocess: dict[str, Any] = {}
        state: dict[str, Tensor] | None = None
        path = Path()
        quick = bool(config.get("quick_gelu", False))
        if pretrained != "none":
            if pretrained is not None and Path(pretrained).is_file():
                path = Path(pretrained)
            else:
                pretrained = pretrained or default_tag(name)
                path, preprocess = resolve(name, pretrained)
                quick = bool(preprocess.get("quick_gelu", False))
                _check_activation(name, pretrained, quick, activation)
            state = read_state(path)
        if activation is not None:
            quick = activation == "quick_gelu"
        config["quick_gelu"] = quick
        model = build_clip(config)
        if state is not None:
            fit(name, path, state, model)
        return assemble(
            name,
            None if pretrained == "none" else Path(pretrained or "").name,
            model,
            config,
            preprocess_of(model.visual, preprocess),
            trained=state is not None,
        )

    def build(
        self,
        name: str,
        pretrained: str | None,
        architecture: Mapping[str, Any],
        preprocess: Preprocess,
        *,
        trained: bool,
        text: Mapping[str, Tensor],
    ) -> Backbone:
        """The dense CLIP, its image tower with random weights; see the protocol."""
        model = build_clip(architecture)
        if text:
            fit_text(name, text, model)
        backbone = assemble(name, pretrained, model, architecture, preprocess, trained=trained)
        if not text:
            backbone.encoder, backbone.text = None, {}
        return backbone

    def rewrite(self, tower: nn.Module) -> None:
        """Attention of every block, slim or not, to separate linear maps, in place."""
        for block in _blocks(tower).values():
            if isinstance(block.attn, (nn.MultiheadAttention, SlimAttention)):
                block.attn = SeparateAttention(block.attn)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Rewritten attention to slim attention, or to torch's own where all heads stay whole."""
        for name, block in _blocks(tower).items():
            if isinstance(block.attn, SeparateAttention):
                block.attn = block.attn.finished(plan.kept.get(f"{name}.attn"))

    def seeds(self, tower: nn.Module) -> list[Seed]:
        """Heads and MLP units of every block; the last block's heads are protected."""
        blocks = _blocks(tower)
        last = list(blocks)[-1]
        seeds = []
        for name, block in blocks.items():
            scaled = not isinstance(block.ls_1, nn.Identity)
            middle = None if scaled else StreamPoint(f"{name}.ln_2", "input")
            after = None if scaled else StreamPoint(name, "output")
            reason = "frameworks read the last block's attention directly" if name == last else None
            width = block.attn.head_dim
            query = f"{name}.attn.q_proj"
            seeds.append(Seed(f"{name}.attn", "heads", query, width, name, middle, reason))
            seeds.append(Seed(f"{name}.mlp", "mlp", f"{name}.mlp.c_fc", 1, name, after))
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """Patches and positions; the residual blocks; pooling and projection."""
        vit: Any = tower

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            pooled, tokens = vit._pool(stream)
            if vit.final_ln_after_pool:
                tokens = vit.ln_post(tokens)
            height, width = vit.grid_size
            dense = (tokens @ vit.proj).transpose(1, 2).unflatten(2, (height, width))
            return pooled @ vit.proj, dense

        return Stages(vit._embeds, _blocks(tower), head)


def assemble(
    name: str,
    pretrained: str | None,
    model: nn.Module,
    config: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    trained: bool,
) -> Backbone:
    """The backbone record of a built CLIP."""
    import open_clip

    tower = model.visual
    assert isinstance(tower, nn.Module)
    return Backbone(
        name=name,
        pretrained=pretrained,
        trained=trained,
        family="open_clip-vit",
        tower=tower,
        stages=FAMILIES.get("open_clip-vit").stages,
        preprocess=preprocess,
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        architecture=dict(config),
        library_version=open_clip.__version__,
        text={k: v for k, v in model.state_dict().items() if not k.startswith("visual.")},
        encoder=encoder_of(model, config),
    )


@cache
def _names() -> tuple[str, ...]:
    import open_clip

    return (TINY, *(name for name in open_clip.list_models() if _is_plain_vit(_config(name))))


def _config(name: str) -> dict[str, Any]:
    import open_clip

    if name == TINY:
        with embedded(TINY) as folder:
            return deepcopy(dict(folder.model))
    if is_folder(Path(name)):
        return deepcopy(dict(open_folder(Path(name)).model))
    config = open_clip.get_model_config(name)
    assert config is not None
    return deepcopy(config)


def _is_plain_vit(config: Mapping[str, Any]) -> bool:
    vision = config["vision_cfg"]
    return (
        isinstance(vision.get("layers", 12), int)
        and "timm_model_name" not in vision
        and not vision.get("attentional_pool")
        and not vision.get("block_type")
        and not any(key.startswith("scale_") or key == "qk_norm" for key in vision)
        and "hf_model_name" not in config["text_cfg"]
        and "multimodal_cfg" not in config
        and not config.get("custom_text", False)
    )


def _blocks(tower: nn.Module) -> dict[str, Any]:
    blocks = tower.get_submodule("transformer.resblocks")
    return {f"transformer.resblocks.{i}": block for i, block in blocks.named_children()}


def _check_activation(name: str, tag: str, quick: bool, activation: str | None) -> None:
    own = "quick_gelu" if quick else "gelu"
    if activation is not None and activation != own:
        raise OptionError(
            f"the weights {tag!r} of {name} were trained with {own}, not {activation}; leave "
            "--activation out"
        )


def _load_folder(name: str, tag: str, folder: Folder, activation: str | None) -> Backbone:
    """A folder's model; one with weights of the image tower alone has no text tower."""
    config = folder.model
    _check_activation(name, tag, bool(config.get("quick_gelu", False)), activation)
    model = build_clip(config)
    state = folder.state()
    towers_only = all(key.startswith("visual.") for key in state)
    if towers_only:
        bare = {key.removeprefix("visual."): value for key, value in state.items()}
        fit(name, folder.weights, bare, model.visual)  # type: ignore[arg-type]
    else:
        fit(name, folder.weights, state, model)
    preprocess = preprocess_of(model.visual, folder.preprocess)
    backbone = assemble(name, tag, model, config, preprocess, trained=True)
    if towers_only:
        backbone.encoder, backbone.text = None, {}
    return backbone
