"""Session in a process of a launched command: makes the models slim that builders return."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ovsprune.core.errors import OvspruneError
from ovsprune.core.files import write_text
from ovsprune.launching.builders import BUILDERS, LOADERS
from ovsprune.launching.checkpoint_guard import CheckpointGuard, decide_weights
from ovsprune.slim import SlimCheckpoint, read
from ovsprune.targets import TARGETS
from ovsprune.targets.check import Weights
from ovsprune.targets.hooks import Hook
from ovsprune.targets.key_map import depth_of
from ovsprune.targets.recognise import recognise

__all__ = ["Session", "say", "watched"]


def watched() -> list[str]:
    """Return the patterns of the modules in which functions are wrapped."""
    patterns = [entry.module for entry in (*BUILDERS, *LOADERS)]
    patterns += [hook.module for name in TARGETS for hook in TARGETS.get(name).hooks]
    return list(dict.fromkeys(patterns))


class Session:
    """Settings of one process, and the models that were made slim in it.

    Args:
        slim: Directory of the slim checkpoint.
        record: Directory for the records, one file each, which the parent process reads.
        target: Name of the target, or ``"auto"``.
        weights: ``"slim"``, ``"target"`` or ``"auto"``.
        force: Accept a checkpoint whose base model had random weights.
    """

    def __init__(self, slim: str, record: str, target: str, weights: str, force: bool) -> None:
        self.slim, self.record = slim, Path(record)
        self.target, self.weights, self.force = target, weights, force
        # receives every model that was made slim
        self.on_attached: Callable[[nn.Module], None] = lambda model: None
        self.local = threading.local()  # depth of nested builders, for each thread
        self.guards: WeakKeyDictionary[nn.Module, CheckpointGuard] = WeakKeyDictionary()
        self.hooks = (
            *(Hook(e.module, e.name, self._wrap_builder, e.requires) for e in BUILDERS),
            *(Hook(e.module, e.name, self._wrap_loader, e.requires) for e in LOADERS),
            *(hook for name in TARGETS for hook in TARGETS.get(name).hooks),
        )

    @functools.cached_property
    def checkpoint(self) -> SlimCheckpoint:
        """Slim checkpoint, read when the first model is built."""
        return read(self.slim)

    def _wrap_builder(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a builder so that the model of its outermost call is made slim."""

        @functools.wraps(build)
        def build_slim(*args: Any, **kwargs: Any) -> Any:
            depth = getattr(self.local, "depth", 0)
            self.local.depth = depth + 1
            try:
                result = build(*args, **kwargs)
            finally:
                self.local.depth = depth
            if not depth:  # builders call each other: only the outermost result is complete
                for part in result if isinstance(result, tuple) else (result,):
                    # a tuple also has transforms (clip.load, create_model_and_transforms)
                    if isinstance(part, nn.Module):
                        self.attach(part)
            return result

        return build_slim

    def _wrap_loader(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a loader so that it loads a dense checkpoint into the dense model."""

        @functools.wraps(load)
        def load_guarded(loader: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
            guard = self.guards.get(loader.model)
            state = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
            state = state if isinstance(state, Mapping) else {}
            # DistributedDataParallel adds the prefix
            state = {name.removeprefix("module."): value for name, value in state.items()}
            if guard is None or not guard.is_dense(state):
                return load(loader, checkpoint, *args, **kwargs)
            with guard.dense("a dense checkpoint was loaded"):
                return load(loader, checkpoint, *args, **kwargs)

        return load_guarded

    def attach(self, model: nn.Module) -> None:
        """Attach the slim tower to a model that a builder returned, if a target recognises it.

        Raises:
            TargetError: A target other than a fallback recognises the model, or was named, but the
                model cannot take the slim tower.
        """
        if model in self.guards:
            return
        name = recognise(model, self.target)
        if name is None:
            return
        target = TARGETS.get(name)

        def decide(dense: nn.Module) -> tuple[Weights, str]:
            return decide_weights(target, dense, self.checkpoint, self.weights, self.force)

        try:
            choice = decide(model)
        except OvspruneError as error:
            # a fallback target also recognises other models, for example a teacher
            if target.fallback and self.target == "auto":
                self.write({"skipped": f"{type(model).__name__}: {error}"})
                return
            raise
        layout = target.layout(model.state_dict(), depth_of(self.checkpoint))
        attached = target.attach(model, self.checkpoint, weights=choice[0], force=self.force)
        attached.reason = choice[1]
        kind = type(model).__name__

        def report(message: str) -> None:
            say(f"{name} ({kind}): {message}")
            self.write({"event": f"{name} ({kind}): {message}"})

        self.guards[model] = CheckpointGuard(
            model, attached, layout, self.checkpoint, decide=decide, report=report
        )
        before, after = attached.params_before, attached.params_after
        say(
            f"{name} ({kind}): {len(attached.replaced)} replaced, weights {choice[0]} "
            f"({choice[1]}); parameters {before:,} -> {after:,} ({after / before - 1:+.1%})"
        )
        for path, replacement in attached.replaced.items():
            say(f"  {path}: {replacement}")
        self.write({"model": kind, **attached.record()})
        self.on_attached(model)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record for the parent process."""
        name = f"{os.getpid()}-{uuid.uuid4().hex}.json"
        write_text(self.record / name, json.dumps({"pid": os.getpid(), **record}))


def say(message: str) -> None:
    """Print a message to stderr."""
    sys.stderr.write(f"ovsprune: {message}\n")
    sys.stderr.flush()
