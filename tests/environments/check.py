"""Attach the checkpoints in one environment, and compare the outputs with references.

    python check.py CHECKPOINTS RESULT.json

An error is the largest difference of an output, in standard deviations of the reference.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ovsprune

BOUND = 1e-4  # largest error of an equal output
WRONG = 1e-2  # smallest error of a wrong output
STANDALONE = ("open_clip-vit",)  # families that ovsprune.load builds without a library


class LoadedCase:
    """Case to check: checkpoint, references, and the dense CLIP of the installed open_clip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = load_file(folder / "reference.safetensors")
        self.images = self.reference["images"]
        self.checkpoint = ovsprune.read(folder / "slim")

    @cached_property
    def clip(self) -> Any:
        from towers import build

        return build(self.folder / "dense")

    def expected(self, weights: str) -> tuple[Tensor, Tensor]:
        return self.reference[f"{weights}.pooled"], self.reference[f"{weights}.dense"]


def error(found: Any, expected: Any) -> float:
    """Return the error of a tensor or a pair of tensors."""
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    if any(f.shape != e.shape for f, e in zip(found, expected, strict=True)):
        return float("inf")
    pairs = zip(found, expected, strict=True)
    return max(float((f - e).abs().max() / e.std()) for f, e in pairs)


@contextmanager
def without(name: str) -> Iterator[None]:
    """Let imports of ``name`` fail."""
    present = {k: sys.modules.pop(k) for k in list(sys.modules) if k.partition(".")[0] == name}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(present)


def load(case: LoadedCase) -> float:
    """Check ``ovsprune.load``, without open_clip if the family does not need it."""
    standalone = case.checkpoint.spec.family in STANDALONE
    with without("open_clip") if standalone else nullcontext():
        slim = ovsprune.load(case.folder / "slim")
        found = slim(case.images), slim.dense(case.images)
    return error(found, case.expected("slim"))


def load_open_clip(case: LoadedCase) -> float:
    """Check image and text outputs of the slim CLIP in the classes of the installed open_clip."""
    model, _, preprocess = ovsprune.load_open_clip(case.folder / "slim")
    from PIL import Image

    size = case.images.shape[-1]
    assert preprocess(Image.new("RGB", (2 * size, size))).shape == (3, size, size)
    found = model.encode_image(case.images), model.encode_text(case.reference["words"])
    return error(found, (case.expected("slim")[0], case.reference["text"]))


def attach(case: LoadedCase, tower: Any) -> float:
    """Check ``ovsprune.apply`` with the weights of the checkpoint."""
    from towers import outputs

    with ovsprune.apply(tower, case.checkpoint):
        return error(outputs(tower, case.images), case.expected("slim"))


def target(case: LoadedCase, tower: Any) -> float:
    """Check ``ovsprune.apply`` with the tower's weights, cut by the mask."""
    from towers import outputs

    with ovsprune.apply(tower, case.checkpoint, weights="target"):
        return error(outputs(tower, case.images), case.expected("target"))


def detach(case: LoadedCase, tower: Any) -> float:
    """Check that detaching restores the same objects with the same values."""
    before = dict(tower.named_modules()), dict(tower.named_parameters())
    values = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    ovsprune.apply(tower, case.checkpoint).detach()
    after = dict(tower.named_modules()), dict(tower.named_parameters())
    same = all(
        old.keys() == new.keys() and all(old[name] is new[name] for name in old)
        for old, new in zip(before, after, strict=True)
    )
    now = tower.state_dict()
    same = same and all(torch.equal(now[name], value) for name, value in values.items())
    return 0.0 if same else float("inf")


def wrong_unit(case: LoadedCase, tower: Any) -> float:
    """Return the error if another unit is kept than in the mask (negative control)."""
    from towers import outputs

    checkpoint = ovsprune.read(case.folder / "slim")
    layer = next(layer for layer in checkpoint.spec.layers if layer.kept < layer.units)
    kept = checkpoint.mask[layer.name]
    removed = next(unit for unit in range(layer.units) if unit not in kept.tolist())
    kept[0] = removed
    kept.copy_(kept.sort().values)
    with ovsprune.apply(tower, checkpoint, weights="target"):
        return error(outputs(tower, case.images), case.expected("target"))


def masks(case: LoadedCase, tower: Any) -> float:
    """Check attention masks of a block: [N, N] or [B * heads, N, N], float or bool."""
    from towers import masked

    name = case.checkpoint.spec.layers[0].block
    block = tower.get_submodule(name)
    reference = masked(tower, case.checkpoint).get_submodule(name)
    generator = torch.Generator().manual_seed(5)
    length, heads = (
        6,
        block.attn.num_heads,
    )  # as many tokens as images, so that either order of the axes works
    x = torch.randn(length, length, block.ln_1.weight.numel(), generator=generator)
    small = torch.randn(length, length, generator=generator)
    large = 3 * torch.randn(length * heads, length, length, generator=generator)
    some = (small > 0.4).logical_and(torch.eye(length) == 0)
    worst = 0.0
    for mask in (small, large, some):
        expected = reference(x, attn_mask=mask)
        with ovsprune.apply(tower, case.checkpoint, weights="target"):
            slim = tower.get_submodule(name)
            worst = max(worst, error(slim(x, attn_mask=mask), expected))
    return worst


def framework(case: LoadedCase, tower: Any) -> float:
    """Check the call of SAN: fewer queries than keys, and a mask [B * heads, queries, keys]."""
    from towers import masked

    name = case.checkpoint.spec.layers[0].name
    reference = masked(tower, case.checkpoint).get_submodule(name)
    generator = torch.Generator().manual_seed(6)
    batch, queries, tokens, width = 2, 3, 7, reference.embed_dim
    q = torch.randn(batch, queries, width, generator=generator)
    k = torch.randn(batch, tokens, width, generator=generator)
    bias = torch.randn(batch * reference.num_heads, queries, tokens, generator=generator)
    if not reference.batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    with ovsprune.apply(tower, case.checkpoint, weights="target"):
        slim = tower.get_submodule(name)
        assert slim.num_heads == reference.num_heads and slim is not reference
        found = slim(q, k, k, need_weights=False, attn_mask=bias)[0]
    return error(found, reference(q, k, k, need_weights=False, attn_mask=bias)[0])


def refused(case: LoadedCase) -> float:
    """Check that an attention is refused if it has parameters that a cut would make wrong."""
    from open_clip.transformer import Attention

    layer = next(layer for layer in case.checkpoint.spec.layers if layer.kind == "heads")
    tower = deepcopy(case.clip.visual)
    block = tower.get_submodule(layer.block)
    width = block.ln_1.weight.numel()
    block.attn = Attention(width, layer.units, scaled_cosine=True)
    try:
        ovsprune.apply(tower, case.checkpoint)
    except ovsprune.OvspruneError as found:
        return 0.0 if "logit_scale" in str(found) and "protect" in str(found) else float("inf")
    return float("inf")


def unbuildable(case: LoadedCase) -> float:
    """Check that an unknown architecture is refused, with the version of open_clip."""
    with tempfile.TemporaryDirectory() as scratch:
        slim = shutil.copytree(case.folder / "slim", Path(scratch) / "slim")
        config = json.loads((slim / "config.json").read_text("utf-8"))
        config["architecture"]["vision_cfg"]["unheard_of"] = 1
        (slim / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            ovsprune.load_open_clip(slim)
        except ovsprune.OvspruneError as found:
            named = f"open_clip {version('open_clip')} cannot build"
            return 0.0 if named in str(found) and "unheard_of" in str(found) else float("inf")
    return float("inf")


@dataclass(frozen=True)
class Check:
    """Check of a case.

    Attributes:
        run: Returns the error.
        every_form: If true, the check runs for each form of the tower, else once per case.
        applies: Returns True for the cases and forms to check.
        equal: If true, the error must be small, else large.
    """

    run: Callable[..., float]
    every_form: bool = True
    applies: Callable[..., bool] = lambda case, *tower: True
    equal: bool = True


def _is_vit(case: LoadedCase, *tower: Any) -> bool:
    return hasattr(case.clip.visual, "transformer")


def _is_torch_attention(case: LoadedCase, tower: Any) -> bool:
    attention = _is_vit(case) and tower.transformer.resblocks[0].attn
    return isinstance(attention, nn.MultiheadAttention)


CHECKS = {
    "load": Check(load, every_form=False),
    "load_open_clip": Check(load_open_clip, every_form=False),
    "refused": Check(refused, every_form=False, applies=_is_vit),
    "unbuildable": Check(unbuildable, every_form=False),
    "attach": Check(attach),
    "target": Check(target),
    "detach": Check(detach),
    "wrong unit": Check(wrong_unit, equal=False),
    "masks": Check(masks, applies=_is_vit),
    "framework": Check(framework, applies=_is_torch_attention),
}


def row(name: str, check: Check, *arguments: Any) -> dict[str, Any]:
    """Run a check and return its result."""
    message = ""
    try:
        with torch.no_grad():
            value = check.run(*arguments)
    except Exception as found:
        traceback.print_exc()
        value, message = float("nan"), f"{type(found).__name__}: {found}"
    ok = value <= BOUND if check.equal else value >= WRONG
    return {"check": name, "error": value, "ok": ok, "message": message}


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of all checks of one case."""
    case = LoadedCase(folder)
    for name, check in CHECKS.items():
        if not check.every_form and check.applies(case):
            yield {"case": folder.name, "form": "loaded", **row(name, check, case)}
    from towers import forms

    for form, tower in forms(case.clip.visual):
        for name, check in CHECKS.items():
            if check.every_form and check.applies(case, tower):
                yield {"case": folder.name, "form": form, **row(name, check, case, tower)}


def version(name: str) -> str:
    """Return the version of an imported module; early open_clip has it in a submodule only."""
    module = importlib.import_module(f"{name}.version" if name == "open_clip" else name)
    return str(module.__version__)


def main(checkpoints: Path, result: Path) -> None:
    """Run all checks and write the results."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    assert Path(ovsprune.__file__).is_relative_to(sys.prefix), "not this environment's ovsprune"
    results = [row for folder in sorted(checkpoints.iterdir()) for row in rows(folder)]
    names = ("torch", "open_clip", "timm", "safetensors", "ovsprune")
    versions = {name: version(name) for name in names}
    record = {
        "versions": {"python": platform.python_version(), **versions},
        "rows": results,
        "seconds": round(time.perf_counter() - start, 1),
    }
    result.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
