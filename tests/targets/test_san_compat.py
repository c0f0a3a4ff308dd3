"""Hooks of SAN: open_clip's old interface, and cross attention with the kept heads."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import UnknownNameError
from ovsprune.slim import SlimAttention
from ovsprune.targets import apply_compat
from ovsprune.targets.san_compat import cross_attention_with_self, restore_old_interface

VISUAL = """
class FeatureExtractor:
    def __init__(self, visual, last_layer_idx=-1):
        self.input_patchnorm = visual.input_patchnorm
        self.patchnorm_pre_ln = visual.patchnorm_pre_ln
        self.blocks = visual.transformer.resblocks

class RecWithAttnbiasHead:
    def __init__(self, visual, first_layer_idx=0):
        self.global_average_pool = visual.global_average_pool
"""
TEXT = """
class PredefinedOvClassifier:
    def __init__(self, clip, cache_feature=True):
        self.transformer = clip.transformer

class LearnableBgOvClassifier(PredefinedOvClassifier):
    pass
"""
HELPER = "def cross_attn_with_self_bias(self, q, k, v, attn_mask=None): return 'own', None\n"


@pytest.fixture
def san(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Create a package with the modules of SAN that the hooks change."""
    for directory in ("san", "san/model", "san/model/clip_utils"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "__init__.py").write_text("")
    (tmp_path / "san/model/clip_utils/visual.py").write_text(VISUAL)
    (tmp_path / "san/model/clip_utils/classifier.py").write_text(TEXT)
    (tmp_path / "san/model/attn_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _sans(name)}
    yield
    for name in [name for name in sys.modules if _sans(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def _sans(name: str) -> bool:
    return name == "san" or name.startswith("san.")


def clip() -> Any:
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
    return open_clip.CLIP(16, vision, text, quick_gelu=True).eval()


@torch.no_grad()
def test_blocks_take_the_old_order_after_the_fix(san: None) -> None:
    model = clip()
    x = torch.randn(3, 17, 32)
    wanted = x
    for block in model.visual.transformer.resblocks:
        wanted = block(wanted)
    image, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 50, (2, 8))
    apply_compat("san")
    visual = importlib.import_module("san.model.clip_utils.visual")
    text = importlib.import_module("san.model.clip_utils.classifier")
    with pytest.raises(AttributeError, match="input_patchnorm"):
        unwrapped = visual.FeatureExtractor.__init__.__wrapped__
        unwrapped(object.__new__(visual.FeatureExtractor), model.visual)
    assert torch.isfinite(model.encode_image(image)).all()
    embedded = model.token_embedding(tokens) + model.positional_embedding
    words = model.transformer(embedded, attn_mask=model.attn_mask)
    front = visual.FeatureExtractor(model.visual, last_layer_idx=1)
    assert front.input_patchnorm is False and isinstance(front.patchnorm_pre_ln, nn.Identity)
    assert visual.RecWithAttnbiasHead(model.visual).global_average_pool is False
    found = x.transpose(0, 1)
    for block in front.blocks:
        found = block(found)
    assert torch.allclose(found.transpose(0, 1), wanted, atol=1e-5)
    classifier = text.LearnableBgOvClassifier(model)
    made = classifier.transformer(embedded.transpose(0, 1), attn_mask=model.attn_mask)
    assert torch.allclose(made.transpose(0, 1), words, atol=1e-5)


def test_old_interface_is_unchanged() -> None:
    model = clip()
    restore_old_interface(model.visual)
    mark = model.visual.patchnorm_pre_ln
    model.visual.input_patchnorm = True
    restore_old_interface(model.visual)
    assert model.visual.input_patchnorm is True and model.visual.patchnorm_pre_ln is mark


def dense_cross(
    attention: nn.MultiheadAttention, q: Tensor, memory: Tensor, bias: Tensor
) -> Tensor:
    """Compute the dense cross attention, one query at a time; its keys are memory and query."""
    rows = []
    for i in range(len(q)):
        keys = torch.cat([memory, q[i : i + 1]])
        own = torch.nn.functional.pad(bias[:, i : i + 1], (0, 1))
        rows.append(attention(q[i : i + 1], keys, keys, attn_mask=own, need_weights=False)[0])
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1, 3), (2,), ()])
def test_cross_attention_at_kept_heads(san: None, kept: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(32, 4).eval()
    nn.init.normal_(dense.in_proj_bias)
    nn.init.normal_(dense.out_proj.bias)
    q, memory, bias = torch.randn(5, 2, 32), torch.randn(7, 2, 32), torch.randn(8, 5, 7) * 2
    slim = SlimAttention.from_dense(dense, kept).eval()
    gone = torch.ones(4, dtype=torch.bool)
    gone[list(kept)] = False
    dense.out_proj.weight[:, gone.repeat_interleave(8)] = 0
    wanted = dense_cross(dense, q, memory, bias)
    assert torch.allclose(cross_attention_with_self(slim, q, memory, bias), wanted, atol=1e-5)
    if 0 < len(kept) < 4:
        rolled = bias.unflatten(0, (2, 4)).roll(1, dims=1).flatten(0, 1)
        assert (cross_attention_with_self(slim, q, memory, rolled) - wanted).abs().max() > 0.01
    apply_compat("san")
    helper = importlib.import_module("san.model.attn_helper")
    found, weights = helper.cross_attn_with_self_bias(slim, q, memory, memory, attn_mask=bias)
    assert torch.allclose(found, wanted, atol=1e-5) and weights is None
    assert helper.cross_attn_with_self_bias(dense, q, memory, memory) == ("own", None)


def test_unknown_target() -> None:
    with pytest.raises(UnknownNameError, match="unknown target 'sann'"):
        apply_compat("sann")
