"""Random state dicts of a complete CLIP with OpenAI's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.targets.by_hand import lively_tower


def half_exact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round weights to float16, the type of OpenAI's files, which loaders keep."""
    return {name: tensor.half().float() for name, tensor in state.items()}


def whole_clip(
    tower: Mapping[str, Tensor], *, width: int, depth: int, seed: int = 5
) -> dict[str, Tensor]:
    """Add a text tower of ``width`` to ``tower``, with CLIP's vocabulary and length."""
    outputs = tower["proj"].shape[1]
    text = lively_tower(
        width=width, depth=depth, heads=width // 64, patch=1, size=1, outputs=outputs,
        mlp=4 * width, seed=seed,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    state = {k: v for k, v in text.items() if k.startswith("transformer.")}
    state |= {f"visual.{k}": v for k, v in tower.items()}
    state |= {
        "token_embedding.weight": torch.randn(49408, width, generator=draw) * 0.5,
        "positional_embedding": torch.randn(77, width, generator=draw) * 0.1,
        "ln_final.weight": text["ln_post.weight"],
        "ln_final.bias": text["ln_post.bias"],
        "text_projection": text["proj"],
        "logit_scale": torch.tensor(4.6),
    }
    return half_exact(state)


class Archive(nn.Module):
    """Replacement for a TorchScript archive of OpenAI, with the members that loaders read."""

    def __init__(self, state: Mapping[str, Tensor], size: int) -> None:
        super().__init__()
        self.state, self.size = state, size

    @property
    def input_resolution(self) -> Tensor:
        return torch.tensor(self.size)

    def state_dict(self, *args: object, **options: object) -> dict[str, Tensor]:  # type: ignore[override]
        told = {"input_resolution": self.size, "context_length": 77, "vocab_size": 49408}
        return {**self.state, **{name: torch.tensor(value) for name, value in told.items()}}


@torch.no_grad()
def fill(model: nn.Module, inside: str, seed: int = 0) -> None:
    """Draw values for the parameters outside the modules named ``inside``."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if inside in name:
            continue
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim <= 1 or not bool(parameter.std() > 0):  # started alike
            parameter.add_(0.1 * noise)
