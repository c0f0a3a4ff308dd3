"""Runs at the start of every Python that a launched command starts, before its script.

No large library is imported before a watched module is: most processes never build a model.
"""

import importlib
import json
import os
import sys


def _others() -> None:
    """Run the sitecustomize that this one shadows, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    mine = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        if mine is not None:
            sys.modules["sitecustomize"] = mine


def _watch(document: str) -> None:
    try:
        from ovsprune.core.import_hooks import watch
    except ImportError as error:
        from importlib.util import find_spec

        if find_spec("torch") is not None:  # it could run a framework: do not let it, dense
            sys.exit(
                f"ovsprune: {sys.executable} cannot import ovsprune ({error}); install it there "
                "(pip install --no-deps ovsprune)"
            )
        return

    settings = json.loads(document)

    def told(module: object) -> None:
        # the parent names its own module, so that nothing here imports a room above
        importlib.import_module(settings["handler"]).told(module, document)

    watch(settings["watched"], told)


if os.environ.get("OVSPRUNE_LAUNCHED"):
    _watch(os.environ["OVSPRUNE_LAUNCHED"])
_others()  # afterwards: it may import a framework
