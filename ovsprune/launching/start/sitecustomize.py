"""Startup code of every Python process of a launched command; runs before its script.

No large library is imported until a watched module is imported, because most processes never build
a model.
"""

import importlib
import json
import os
import sys


def _run_shadowed() -> None:
    """Run the sitecustomize that this one shadows, if there is one."""
    directory = os.path.dirname(os.path.abspath(__file__))
    # Without this directory, the import below finds the next sitecustomize of the path.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != directory]
    # An entry in sys.modules would make the import return this module again.
    this_module = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ImportError as error:
        # An import that fails inside the shadowed file is an error of that file.
        if error.name != "sitecustomize":
            raise
        if this_module is not None:
            sys.modules["sitecustomize"] = this_module


def _watch(document: str) -> None:
    """Call the handler of the parent process when a watched module is imported."""
    try:
        from ovsprune.core.import_hooks import watch
    except ImportError as error:
        from importlib.util import find_spec

        if find_spec("torch") is not None:  # it could train a dense model unnoticed
            sys.exit(
                f"ovsprune: {sys.executable} cannot import ovsprune ({error}); install it there "
                "(pip install --no-deps ovsprune)"
            )
        return

    settings = json.loads(document)

    def on_import(module: object) -> None:
        # the parent process names the handler, so that this file imports nothing but the core
        importlib.import_module(settings["handler"]).on_import(module, document)

    watch(settings["watched"], on_import)


if os.environ.get("OVSPRUNE_LAUNCHED"):
    _watch(os.environ["OVSPRUNE_LAUNCHED"])
_run_shadowed()  # after _watch, because it may import a framework
