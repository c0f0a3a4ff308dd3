"""Tests of the search for activation functions."""

from timm.models.vision_transformer_relpos import RelPosBlock
from torch import nn

from ovsprune.slim.activation import find_activations


def test_activations_of_position_networks_are_ignored() -> None:
    block = RelPosBlock(24, 4, rel_pos_cls=_rel_pos)
    assert any(isinstance(module, nn.ReLU) for module in block.attn.rel_pos.modules())
    assert find_activations(block.modules()) == {"gelu"}
    block.mlp.act = nn.ReLU()
    assert find_activations(block.modules()) == {"relu"}


def _rel_pos(**options: int) -> nn.Module:
    from timm.layers.pos_embed_rel import RelPosMlp

    return RelPosMlp(window_size=(4, 4), **options)
