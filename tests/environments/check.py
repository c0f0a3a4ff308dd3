"""Runs inside one environment: attaches the checkpoints there and compares with their references.

    python check.py CHECKPOINTS RESULT.json

Errors are the largest difference of any output, in standard deviations of the reference.
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

BOUND = 1e-4  # of an equal output
WRONG = 1e-2  # what a wrong one exceeds
ALONE = ("open_clip-vit",)  # families that ovsprune.load builds without any library


class Item:
    """One case: the checkpoint, the references, and the dense CLIP as this open_clip builds it."""

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
    """Of tensors, or of pairs of them."""
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    if any(f.shape != e.shape for f, e in zip(found, expected, strict=True)):
        return float("inf")
    pairs = zip(found, expected, strict=True)
    return max(float((f - e).abs().max() / e.std()) for f, e in pairs)


@contextmanager
def without(name: str) -> Iterator[None]:
    """Importing ``name`` fails."""
    present = {k: sys.modules.pop(k) for k in list(sys.modules) if k.partition(".")[0] == name}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(present)


def load(item: Item) -> float:
    """``ovsprune.load``, without the library where none is needed."""
    alone = item.checkpoint.spec.family in ALONE
    with without("open_clip") if alone else nullcontext():
        slim = ovsprune.load(item.folder / "slim")
        found = slim(item.images), slim.dense(item.images)
    return error(found, item.expected("slim"))


def load_open_clip(item: Item) -> float:
    """The whole CLIP in this open_clip's classes, pictures and texts."""
    model, _, preprocess = ovsprune.load_open_clip(item.folder / "slim")
    from PIL import Image

    size = item.images.shape[-1]
    assert preprocess(Image.new("RGB", (2 * size, size))).shape == (3, size, size)
    found = model.encode_image(item.images), model.encode_text(item.reference["words"])
    return error(found, (item.expected("slim")[0], item.reference["text"]))


def attach(item: Item, tower: Any) -> float:
    """``ovsprune.apply`` with the checkpoint's weights."""
    from towers import outputs

    with ovsprune.apply(tower, item.checkpoint):
        return error(outputs(tower, item.images), item.expected("slim"))


def target(item: Item, tower: Any) -> float:
    """``ovsprune.apply`` with the tower's own weights, cut by the mask."""
    from towers import outputs

    with ovsprune.apply(tower, item.checkpoint, weights="target"):
        return error(outputs(tower, item.images), item.expected("target"))


def detach(item: Item, tower: Any) -> float:
    """Detaching gives the same objects back, with the same values."""
    before = dict(tower.named_modules()), dict(tower.named_parameters())
    values = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    ovsprune.apply(tower, item.checkpoint).detach()
    after = dict(tower.named_modules()), dict(tower.named_parameters())
    same = all(
        old.keys() == new.keys() and all(old[name] is new[name] for name in old)
        for old, new in zip(before, after, strict=True)
    )
    now = tower.state_dict()
    same = same and all(torch.equal(now[name], value) for name, value in values.items())
    return 0.0 if same else float("inf")


def wrong_unit(item: Item, tower: Any) -> float:
    """Negative control: another head or unit than the mask's own."""
    from towers import outputs

    checkpoint = ovsprune.read(item.folder / "slim")
    layer = next(layer for layer in checkpoint.spec.layers if layer.kept < layer.units)
    kept = checkpoint.mask[layer.name]
    gone = next(unit for unit in range(layer.units) if unit not in kept.tolist())
    kept[0] = gone
    kept.copy_(kept.sort().values)
    with ovsprune.apply(tower, checkpoint, weights="target"):
        return error(outputs(tower, item.images), item.expected("target"))


def masks(item: Item, tower: Any) -> float:
    """Every mask that a block passes on: two axes or a row a head, float or bool."""
    from towers import masked

    name = item.checkpoint.spec.layers[0].block
    block = tower.get_submodule(name)
    reference = masked(tower, item.checkpoint).get_submodule(name)
    generator = torch.Generator().manual_seed(5)
    length, heads = 6, block.attn.num_heads  # as many tokens as pictures: in either order
    x = torch.randn(length, length, block.ln_1.weight.numel(), generator=generator)
    small = torch.randn(length, length, generator=generator)
    large = 3 * torch.randn(length * heads, length, length, generator=generator)
    some = (small > 0.4).logical_and(torch.eye(length) == 0)
    worst = 0.0
    for mask in (small, large, some):
        expected = reference(x, attn_mask=mask)
        with ovsprune.apply(tower, item.checkpoint, weights="target"):
            slim = tower.get_submodule(name)
            worst = max(worst, error(slim(x, attn_mask=mask), expected))
    return worst


def framework(item: Item, tower: Any) -> float:
    """As SAN calls it: (q, k, v, need_weights=False, attn_mask=a row a head), q shorter than k."""
    from towers import masked

    name = item.checkpoint.spec.layers[0].name
    reference = masked(tower, item.checkpoint).get_submodule(name)
    generator = torch.Generator().manual_seed(6)
    pictures, queries, tokens, width = 2, 3, 7, reference.embed_dim
    q = torch.randn(pictures, queries, width, generator=generator)
    k = torch.randn(pictures, tokens, width, generator=generator)
    bias = torch.randn(pictures * reference.num_heads, queries, tokens, generator=generator)
    if not reference.batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    with ovsprune.apply(tower, item.checkpoint, weights="target"):
        slim = tower.get_submodule(name)
        assert slim.num_heads == reference.num_heads and slim is not reference
        found = slim(q, k, k, need_weights=False, attn_mask=bias)[0]
    return error(found, reference(q, k, k, need_weights=False, attn_mask=bias)[0])


def refused(item: Item) -> float:
    """An attention with what a cut by heads would change is refused, and nothing is changed."""
    from open_clip.transformer import Attention

    layer = next(layer for layer in item.checkpoint.spec.layers if layer.kind == "heads")
    tower = deepcopy(item.clip.visual)
    block = tower.get_submodule(layer.block)
    width = block.ln_1.weight.numel()
    block.attn = Attention(width, layer.units, scaled_cosine=True)
    try:
        ovsprune.apply(tower, item.checkpoint)
    except ovsprune.OvspruneError as found:
        return 0.0 if "logit_scale" in str(found) and "protect" in str(found) else float("inf")
    return float("inf")


def unbuildable(item: Item) -> float:
    """An architecture that this open_clip does not know is refused with its version."""
    with tempfile.TemporaryDirectory() as scratch:
        slim = shutil.copytree(item.folder / "slim", Path(scratch) / "slim")
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
    """What is asked.

    Attributes:
        run: Gives the error.
        every_form: Of a tower in every form, or once a case.
        wanted: Which cases, and forms of towers, have an answer.
        equal: Whether the error must be small, not large.
    """

    run: Callable[..., float]
    every_form: bool = True
    wanted: Callable[..., bool] = lambda item, *tower: True
    equal: bool = True


def _is_vit(item: Item, *tower: Any) -> bool:
    return hasattr(item.clip.visual, "transformer")


def _is_torchs(item: Item, tower: Any) -> bool:
    own = _is_vit(item) and tower.transformer.resblocks[0].attn
    return isinstance(own, nn.MultiheadAttention)


CHECKS = {
    "load": Check(load, every_form=False),
    "load_open_clip": Check(load_open_clip, every_form=False),
    "refused": Check(refused, every_form=False, wanted=_is_vit),
    "unbuildable": Check(unbuildable, every_form=False),
    "attach": Check(attach),
    "target": Check(target),
    "detach": Check(detach),
    "wrong unit": Check(wrong_unit, equal=False),
    "masks": Check(masks, wanted=_is_vit),
    "framework": Check(framework, wanted=_is_torchs),
}


def row(name: str, check: Check, *given: Any) -> dict[str, Any]:
    """One answer."""
    message = ""
    try:
        with torch.no_grad():
            value = check.run(*given)
    except Exception as found:
        traceback.print_exc()
        value, message = float("nan"), f"{type(found).__name__}: {found}"
    ok = value <= BOUND if check.equal else value >= WRONG
    return {"check": name, "error": value, "ok": ok, "message": message}


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every answer for one case."""
    item = Item(folder)
    for name, check in CHECKS.items():
        if not check.every_form and check.wanted(item):
            yield {"case": folder.name, "form": "loaded", **row(name, check, item)}
    from towers import forms

    for form, tower in forms(item.clip.visual):
        for name, check in CHECKS.items():
            if check.every_form and check.wanted(item, tower):
                yield {"case": folder.name, "form": form, **row(name, check, item, tower)}


def version(name: str) -> str:
    """Of what is imported, whatever else is installed; open_clip's package did not say at first."""
    module = importlib.import_module(f"{name}.version" if name == "open_clip" else name)
    return str(module.__version__)


def main(checkpoints: Path, result: Path) -> None:
    """Run everything and write it down."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    assert Path(ovsprune.__file__).is_relative_to(sys.prefix), "not this environment's ovsprune"
    found = [row for folder in sorted(checkpoints.iterdir()) for row in rows(folder)]
    names = ("torch", "open_clip", "timm", "safetensors", "ovsprune")
    versions = {name: version(name) for name in names}
    record = {
        "versions": {"python": platform.python_version(), **versions},
        "rows": found,
        "seconds": round(time.perf_counter() - start, 1),
    }
    result.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
