"""Functions that build models, and functions that load checkpoints into them.

Each line is one function, by its import path; add a line for another one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUILDERS", "LOADERS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One function.

    Attributes:
        module: Pattern (``fnmatch``) of the full name of its module.
        name: Its dotted name there.
        beside: Names that the module must have, too, where the pattern says little.
    """

    module: str
    name: str
    beside: tuple[str, ...] = ()


# A framework's builder calls others; the outermost call is the one whose result is looked at.
BUILDERS = (
    Entry("detectron2.modeling.meta_arch.build", "build_model"),
    Entry("mmengine.registry.build_functions", "build_model_from_cfg"),
    # create_model_and_transforms and create_model_from_pretrained call this one; vendored, too
    Entry("open_clip.factory", "create_model"),
    Entry("*.open_clip.factory", "create_model"),
    # OpenAI's package, and its many copies
    Entry("clip", "load", ("available_models",)),
    Entry("*.clip", "load", ("available_models",)),
    # every model of transformers: CLIPVisionModel, CLIPModel, CLIPSegForImageSegmentation ...
    Entry("transformers.modeling_utils", "PreTrainedModel.from_pretrained"),
)
"""Functions that return a model, or a tuple with one in it."""

# nn.Module.load_state_dict and mmengine's loader run a module's own hooks; these compare shapes
# first, and drop what differs.
LOADERS = (
    Entry("fvcore.common.checkpoint", "Checkpointer._load_model"),
    Entry("detectron2.checkpoint.detection_checkpoint", "DetectionCheckpointer._load_model"),
)
"""Methods ``(self, checkpoint)`` that load ``checkpoint["model"]`` into ``self.model``."""
