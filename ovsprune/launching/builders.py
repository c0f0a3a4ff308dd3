"""Functions of frameworks that build models, and functions that load checkpoints into them.

Each entry is one function, given by its import path. To support another one, add an entry.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BUILDERS", "LOADERS", "Entry"]


class Entry(NamedTuple):
    """Function of a framework."""

    module: str  # pattern (fnmatch) of the full name of its module
    name: str  # dotted name in the module
    requires: tuple[str, ...] = ()  # other names in the module, if the pattern is ambiguous


# Builders call each other; only the result of the outermost call is made slim.
BUILDERS = (
    Entry("detectron2.modeling.meta_arch.build", "build_model"),
    Entry("mmengine.registry.build_functions", "build_model_from_cfg"),
    # create_model_and_transforms and create_model_from_pretrained call it; also vendored copies
    Entry("open_clip.factory", "create_model"),
    Entry("*.open_clip.factory", "create_model"),
    # OpenAI's package, and copies of it
    Entry("clip", "load", ("available_models",)),
    Entry("*.clip", "load", ("available_models",)),
    # every model of transformers: CLIPVisionModel, CLIPModel, CLIPSegForImageSegmentation ...
    Entry("transformers.modeling_utils", "PreTrainedModel.from_pretrained"),
)
"""Functions that return a model, or a tuple that contains one."""

# nn.Module.load_state_dict and mmengine's loader run the hooks of a module. These loaders compare
# shapes before that and drop tensors that differ.
LOADERS = (
    Entry("fvcore.common.checkpoint", "Checkpointer._load_model"),
    Entry("detectron2.checkpoint.detection_checkpoint", "DetectionCheckpointer._load_model"),
)
"""Methods ``(self, checkpoint)`` that load ``checkpoint["model"]`` into ``self.model``."""
