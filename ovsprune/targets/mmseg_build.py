"""SAN of mmsegmentation without downloaded weights, for the demo and the tests."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import MissingLibraryError, OptionError
from ovsprune.targets.layout import count_blocks
from ovsprune.targets.registry import TARGETS

__all__ = [
    "SanShape",
    "build_san",
    "load_tower",
    "mmcv_operators",
    "run_san",
    "scale_bias",
    "set_class_embeddings",
]


@dataclass(frozen=True)
class SanShape:
    """Sizes of a SAN; the defaults are those of ``san_vit-b16.py``."""

    # CLIP's image tower; patch and native input size in pixels
    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    size: int = 224
    mlp: int = 3072
    outputs: int = 512  # width of the embedding
    activation: str = "quick_gelu"  # or "gelu"
    # side adapter; queries are mask proposals
    adapter: int = 240
    adapter_depth: int = 8
    adapter_heads: int = 6
    queries: int = 100
    # CLIP's text tower
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8

    @classmethod
    def small(
        cls, tower: Mapping[str, Tensor], *, heads: int, size: int, activation: str
    ) -> SanShape:
        """Return the sizes of a SAN with a light side adapter for a small CLIP tower.

        Args:
            tower: Dense state of the tower, canonical name to tensor.
            heads: Number of heads of its attention.
            size: Native input size in pixels.
            activation: ``"quick_gelu"`` or ``"gelu"``.
        """
        return cls(
            width=tower["conv1.weight"].shape[0],
            depth=count_blocks(tower),
            heads=heads,
            patch=tower["conv1.weight"].shape[-1],
            size=size,
            mlp=tower["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            outputs=tower["proj"].shape[1],
            activation=activation,
            adapter=96,
            adapter_depth=4,
            adapter_heads=4,
            queries=24,
            text_width=32,
            text_depth=1,
            text_heads=2,
        )


@contextlib.contextmanager
def mmcv_operators() -> Iterator[None]:
    """Make mmsegmentation importable if mmcv was built without its compiled operators.

    mmsegmentation imports mmcv's operators, and these import the extension ``mmcv._ext``. SAN runs
    none of them, so a stub replaces a missing extension; its operators raise an error when called.

    Raises:
        MissingLibraryError: mmsegmentation, mmengine or mmcv is not installed.
    """
    missing = [name for name in ("mmseg", "mmengine", "mmcv") if not _installed(name)]
    if missing:
        raise MissingLibraryError(
            f"{', '.join(missing)} is not installed; a SAN of mmsegmentation needs "
            "onedl-mmsegmentation, onedl-mmengine and onedl-mmcv: run `make setup`, or "
            "see docs/targets/mmseg-san.md"
        )
    if "mmcv._ext" in sys.modules or _installed("mmcv._ext"):
        yield
        return
    sys.modules["mmcv._ext"] = _ExtensionStub("mmcv._ext")
    try:
        yield
    finally:
        del sys.modules["mmcv._ext"]


class _ExtensionStub(ModuleType):
    """Module with every operator name; a call of an operator raises an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: object, **kwargs: object) -> None:
            raise MissingLibraryError(
                f"mmcv's compiled operator {name} is needed, but onedl-mmcv was built without its "
                "extension; build it with MMCV_WITH_OPS=1"
            )

        return refuse


def _installed(name: str) -> bool:
    """Return True if the module ``name`` can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def build_san(
    vocabulary: Sequence[str], shape: SanShape | None = None, *, seed: int = 0
) -> nn.Module:
    """Build mmsegmentation's SAN from its configuration file, with random weights.

    Every parameter is initialised; the framework itself leaves two of the text encoder
    uninitialised if it gets no weights.

    Args:
        vocabulary: Names of the classes.
        shape: Sizes of the model; by default those of ``san_vit-b16.py``.
        seed: Seed of the weights.

    Raises:
        MissingLibraryError: mmsegmentation is not installed.
        OptionError: The framework cannot build a model of these sizes.
    """
    shape = shape or SanShape()
    if shape.mlp % shape.width:
        raise OptionError(
            f"mlp is {shape.mlp}, expected a multiple of the tower's width, {shape.width}"
        )
    silence = contextlib.redirect_stdout(io.StringIO())
    with mmcv_operators(), silence, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        importlib.import_module("mmseg.models")
        registry = importlib.import_module("mmseg.registry")
        engine = importlib.import_module("mmengine")
        engine.registry.init_default_scope("mmseg")
        model: nn.Module = registry.MODELS.build(_config(vocabulary, shape))
        _initialise(model)
    model.eval()
    return model


def _config(vocabulary: Sequence[str], shape: SanShape) -> Any:
    """Return the framework's configuration with these sizes."""
    mmseg = importlib.import_module("mmseg")
    engine = importlib.import_module("mmengine")
    file = Path(str(mmseg.__file__)).parent / ".mim/configs/_base_/models/san_vit-b16.py"
    config = engine.Config.fromfile(str(file)).model
    front = shape.depth * 3 // 4  # blocks in the image encoder; the decode head has the others
    activation = {"type": "QuickGELU" if shape.activation == "quick_gelu" else "GELU"}
    tower = {
        "embed_dims": shape.width,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp // shape.width,
        "act_cfg": activation,
    }
    config.pretrained = None  # no download
    config.data_preprocessor = None
    config.image_encoder.update(
        tower,
        img_size=(shape.size, shape.size),
        patch_size=shape.patch,
        num_layers=front,
        out_indices=tuple(front * i // 3 - 1 for i in (1, 2, 3)),
    )
    config.text_encoder.update(
        dataset_name=None,
        vocabulary=list(vocabulary),
        templates=["a photo of a {}."],
        embed_dims=shape.text_width,
        num_layers=shape.text_depth,
        num_heads=shape.text_heads,
        output_dims=shape.outputs,
    )
    head = config.decode_head
    head.num_classes = len(vocabulary)
    head.loss_decode[0].class_weight = [1.0] * len(vocabulary) + [0.1]
    head.deep_supervision_idxs = [shape.adapter_depth - 1]
    head.san_cfg.update(
        clip_channels=shape.width, embed_dims=shape.adapter, num_queries=shape.queries
    )
    head.san_cfg.cfg_encoder.update(
        num_encode_layer=shape.adapter_depth, num_heads=shape.adapter_heads
    )
    head.san_cfg.cfg_decoder.num_heads = shape.heads
    head.maskgen_cfg.update(
        tower,
        sos_token_num=shape.queries,
        num_layers=shape.depth - front,
        out_dims=shape.outputs,
    )
    return config


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """Initialise every parameter; the framework initialises some only from a file of weights."""
    for module in (model.image_encoder, model.decode_head.side_adapter_network):  # type: ignore[union-attr]
        module.init_weights()  # type: ignore[operator, union-attr]
    for name, parameter in model.named_parameters():
        if name.startswith("text_encoder.") and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if "transformer" in name else 0.1)
        elif name.endswith("logit_scale"):
            parameter.fill_(4.6)  # as in CLIP, ln(100)


@torch.no_grad()
def scale_bias(model: nn.Module, images: Tensor, *, std: float) -> None:
    """Scale the attention bias of an untrained SAN so that it is strong and differs between heads.

    The framework's initial bias is almost constant, so a wrong order of heads would go unnoticed.

    Args:
        model: Result of :func:`build_san`.
        images: Preprocessed images [B, 3, H, W] on which the bias is measured.
        std: Standard deviation of every head's bias on these images after scaling.
    """
    decoder: Any = model.get_submodule("decode_head.side_adapter_network.mask_decoder")
    last = decoder.attn_mlp.layers[-1]  # 1 x 1 convolution; its outputs are the heads' embeddings
    nn.init.orthogonal_(last.weight.view(last.weight.shape[0], -1))
    last.bias.zero_()
    decoder.bias_scaling.bias.zero_()
    bias = run_san(model, images)["bias"]  # [B, heads, queries, h, w]
    per_head = bias.transpose(0, 1).flatten(1).std(dim=1)  # [heads]
    rows = per_head.repeat_interleave(last.weight.shape[0] // len(per_head))
    last.weight.mul_(std / rows[:, None, None, None])


@torch.no_grad()
def load_tower(model: nn.Module, tower: Mapping[str, Tensor]) -> None:
    """Load a dense CLIP tower into a SAN of the same sizes.

    Args:
        model: Result of :func:`build_san`.
        tower: Canonical name to tensor.

    Raises:
        OptionError: The tower has other tensors than the model.
    """
    layout = TARGETS.get("mmseg-san").layout(model.state_dict(), count_blocks(tower))
    values = {
        name: value
        for canonical, tensor in tower.items()
        for name, value in layout.to_framework(canonical, tensor).items()
    }
    expected = {name for name in model.state_dict() if layout.canonical(name) is not None}
    if expected != set(values):
        raise OptionError(
            "the tower and this SAN do not have the same tensors: "
            f"{sorted(expected ^ set(values))[:4]} are in one of them only"
        )
    model.load_state_dict(values, strict=False)


def set_class_embeddings(model: nn.Module, embeddings: Mapping[str, Tensor], scale: float) -> None:
    """Set the text embeddings of the classes, so that SAN does not run its text tower.

    Args:
        model: Result of :func:`build_san`, with the names in ``embeddings`` as its vocabulary.
        embeddings: Class name to embedding [outputs], L2-normalised.
        scale: Logit scale of CLIP (100 for OpenAI's weights).
    """
    encoder: Any = model.get_submodule("text_encoder")
    encoder.cache = dict(embeddings)
    with torch.no_grad():
        encoder.logit_scale.fill_(torch.tensor(float(scale)).log())


@torch.no_grad()
def run_san(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Run SAN on preprocessed images and return the outputs of its decode head.

    Args:
        model: SAN in evaluation mode.
        images: [B, 3, H, W]; CLIP reads them at half that size.

    Returns:
        ``masks`` [B, queries, h, w] (before the sigmoid), ``logits`` [B, queries, classes + 1],
        ``bias`` [B, heads, queries, h, w] (before resizing), and ``segmentation``
        [B, classes, h, w], the sum over queries of class probability times mask probability.
    """
    san: Any = model
    # the side adapter reads the full image, CLIP a smaller one
    small = nn.functional.interpolate(images, scale_factor=san.encoder_resolution, mode="bilinear")
    features = san.image_encoder(small)
    head = san.decode_head
    masks, biases = head.side_adapter_network(images, features, [])
    embeddings = head.rec_with_attnbias(biases[-1], features[-1])
    logits = torch.einsum("bqc,nc->bqn", embeddings, san.text_encoder())
    classes = logits.softmax(dim=-1)[..., :-1]
    segmentation = torch.einsum("bqc,bqhw->bchw", classes, masks[-1].sigmoid())
    return {
        "masks": masks[-1],
        "logits": logits,
        "bias": biases[-1][-1],
        "segmentation": segmentation,
    }
