"""Command line that repeats a prune."""

from __future__ import annotations

import shlex

from ovsprune.backbones.open_clip_source import OWN_WEIGHTS
from ovsprune.core.options import options_of
from ovsprune.core.protocols import Backbone
from ovsprune.importance import criterion_name
from ovsprune.pruning.config import PruneConfig

__all__ = ["command_of"]


def command_of(model: Backbone, config: PruneConfig, dtype: str, text: bool) -> str:
    """Return the command line that repeats a prune, without options that have their default.

    Args:
        model: Model that was pruned.
        config: Configuration, resolved for the model.
        dtype: Type of the saved tower.
        text: True if the text tower was saved too.
    """
    # The directory's name without its path: a provenance holds no local paths.
    name = model.name if model.slim is None else model.slim.path.resolve().name
    words = ["ovsprune", "prune", "--model", name, "--ratio", f"{config.ratio:g}"]
    # A slim model contains its weights, and OWN_WEIGHTS are named by the model itself.
    if model.slim is None and model.pretrained not in OWN_WEIGHTS:
        words += ["--pretrained", model.pretrained or "none"]
    # "auto" is resolved by now, so the default of the calibration depends on the model.
    defaults = PruneConfig(ratio=config.ratio).for_model(model)
    for option in options_of(type(config)):
        value = config.value(option)
        if not option.command or not option.decides or option.required:
            continue
        default = defaults.calibration if option.name == "calibration" else option.default_value()
        if value == default or (option.objects and not isinstance(value, str)):
            continue  # a command line cannot give an object; the comment below names it
        for element in value if option.repeated else (value,):
            # A flag has no value on the command line.
            words += [option.label] if element is True else [option.label, str(element)]
    if dtype != "float32":
        words += ["--dtype", dtype]
    line = shlex.join([*words, *([] if text else ["--no-text"])])
    if not isinstance(config.criterion, str):
        line += f"  # criterion: {criterion_name(config.criterion)}, an object given from Python"
    return line
