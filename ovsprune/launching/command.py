"""Launch: run a framework's own script, and replace the towers that it builds.

``python -m ovsprune.launching.command --slim DIR -- python train_net.py ...`` does the same if
ovsprune is installed without its dependencies.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ovsprune.core.errors import OptionError, OvspruneError, ScheduleError, TargetError
from ovsprune.core.progress import Progress, Silent
from ovsprune.jobs.schedule import checked
from ovsprune.jobs.transfer import read_slim
from ovsprune.launching import training_loops
from ovsprune.schedules import POLICIES
from ovsprune.targets import TARGETS

__all__ = ["launch", "main"]

VARIABLE = "OVSPRUNE_LAUNCHED"


def launch(
    command: Sequence[str],
    slim: str | os.PathLike[str] | None = None,
    target: str = "auto",
    *,
    weights: str = "auto",
    policy: str | None = None,
    fraction: float = 0.5,
    count: int | None = None,
    every: int | None = None,
    pool: Sequence[str] = (),
    rest: str = "follow",
    seed: int = 0,
    force: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a framework's own command with slim towers in the models that it builds.

    Args:
        command: The program and its arguments.
        slim: Directory of the slim checkpoint; by default the newest under ``slim/``.
        target: Name of a target; ``"auto"`` uses the one that recognises the model.
        weights: ``"slim"``, ``"target"`` or ``"auto"``, as for a transfer; decided again
            whenever the framework loads a dense checkpoint into its model.
        policy: Policy of :func:`ovsprune.schedule`, hooked into the training
            loop of detectron2, mmengine, Lightning or transformers; by default none.
            ``fraction``, ``count``, ``every``, ``pool``, ``rest`` and ``seed`` are its options.
        fraction: Fraction of the layers that train.
        count: Number of layers that train, instead of a fraction.
        every: Number of steps between two choices of the policy.
        pool: Patterns of parameters instead of the image tower.
        rest: Treatment of norms, biases and positions.
        seed: Seed of random policies.
        force: Accept a checkpoint whose base model is untrained.
        environment: Environment variables of the command; by default those of this process.
        progress: Progress reporter.

    Returns:
        A record with ``command, slim, target, returncode``; ``replaced``:
        :meth:`ovsprune.targets.Attached.record` of each model that was made slim; ``events``:
        messages about towers that the framework loaded or initialised later; ``schedules``:
        ``policy, total_steps, trainable[], frozen[]`` at the start of each training.

    Raises:
        OptionError: There is no such program, or ``weights`` is unknown.
        UnknownNameError: There is no such target.
        CheckpointError: The slim checkpoint is missing or damaged.
        TargetError: The command ended without a replaced tower.
        ScheduleError: The command succeeded, but no known training loop used the policy.
    """
    progress = progress or Silent()
    if target != "auto":
        TARGETS.get(target)  # raises for an unknown name, before the command starts
    if weights not in ("slim", "target", "auto"):
        raise OptionError(f"weights is {weights!r}, expected 'slim', 'target' or 'auto'")
    settings = None  # of the schedule
    if policy is not None:
        POLICIES.get(policy)
        # The number of steps is not known yet; 1 is a valid one in its place.
        checked(1, fraction, count, every, rest)
        settings = {
            "policy": policy,
            "target": target,
            "pool": list(pool) or None,
            "fraction": fraction,
            "count": count,
            "every": every,
            "rest": rest,
            "seed": seed,
        }
    variables = dict(os.environ if environment is None else environment)
    _check_program(command, variables)
    # errors in it are reported before the framework starts
    directory = str(read_slim(slim, progress).path.resolve())
    session = {"slim": directory, "target": target, "weights": weights, "force": force}
    status, records = _run_hooked(list(command), variables, settings, session)
    replaced = [record for record in records if "replaced" in record]
    schedules = [record["schedule"] for record in records if "schedule" in record]
    if not replaced:  # an unpruned run must not look like a success
        raise TargetError(_no_replacement(command, status, records))
    if settings is not None and not schedules and not status:
        raise ScheduleError(
            f"no training loop used the policy {policy}: expected one of detectron2, mmengine, "
            "Lightning or transformers. In another loop call ovsprune.schedule(model, ...) and "
            "plan.step(i) before every step"
        )
    return {
        "command": list(command),
        "slim": directory,
        "target": target,
        "returncode": status,
        "replaced": replaced,
        "events": list(dict.fromkeys(r["event"] for r in records if "event" in r)),
        "schedules": schedules,
    }


def _check_program(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Raise OptionError unless the program of ``command`` is in the search path."""
    program = command[0] if command else ""
    if not program or shutil.which(program, path=variables.get("PATH")) is None:
        raise OptionError(
            f"there is no program {program!r} to launch; write the command "
            "after --: ovsprune launch --slim DIR -- python train_net.py ..."
        )


def _run_hooked(
    command: list[str],
    variables: dict[str, str],
    schedule: Mapping[str, Any] | None,
    session: Mapping[str, Any],
) -> tuple[int, list[dict[str, Any]]]:
    """Run the command with hooks in its Python processes; return exit status and records."""
    with tempfile.TemporaryDirectory(prefix="ovsprune-launch-") as scratch:
        document = {
            "handler": training_loops.__name__,  # has ``on_import``, called in the child process
            "watched": training_loops.watched(schedule),
            "schedule": schedule,
            "session": {**session, "record": scratch},
        }
        # sitecustomize of every Python process below reads the variable
        variables[VARIABLE] = json.dumps(document)
        # First in the path, so that Python finds this sitecustomize before any other.
        paths = (str(Path(__file__).parent / "start"), variables.get("PYTHONPATH", ""))
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        status = _run(command, variables)
        # one file for each record of a child process, oldest first
        files = sorted(Path(scratch).glob("[!.]*.json"), key=lambda file: file.stat().st_mtime_ns)
        return status, [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _run(command: list[str], variables: Mapping[str, str]) -> int:
    """Run a command, forward signals to it, and return its exit status."""
    try:
        # a stdout that was replaced in Python, for example by a test
        out: Any = sys.stdout if sys.stdout.fileno() != 1 else None
    except (AttributeError, OSError, ValueError):
        out = None
    try:
        child = subprocess.Popen(command, env=dict(variables), stdout=out)
    except OSError as error:
        raise OptionError(f"{command[0]} cannot be started: {error.strerror or error}") from None
    with _forward_signals(child):
        status = child.wait()
    return status if status >= 0 else 128 - status  # as a shell reports a signal


@contextmanager
def _forward_signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward SIGTERM to the command, so that its end can still be reported.

    A terminal sends an interrupt to both processes, so this one ignores it and waits.
    """
    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.SIG_IGN,
        signal.SIGTERM: lambda number, frame: child.send_signal(number),
    }
    previous = {}
    with suppress(ValueError):  # handlers can be set in the main thread only
        for number, handler in handlers.items():
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _no_replacement(command: Sequence[str], status: int, records: list[dict[str, Any]]) -> str:
    """Explain why nothing was replaced."""
    skipped = [str(record["skipped"]) for record in records if "skipped" in record]
    reason = "; ".join(dict.fromkeys(skipped))
    if status and not reason:
        return (
            f"{command[0]} ended with status {status} before it built a model with a tower to "
            "replace; see its own messages for the cause"
        )
    return (
        "nothing was replaced: "
        + (reason or "no known builder returned a model with a CLIP image tower")
        + ". Known builders are those of detectron2, mmengine, open_clip, OpenAI's clip and "
        "transformers' from_pretrained; if a script builds its model in another way, add the "
        "lines that `ovsprune transfer` prints"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line without click; return the command's exit status, 2 after an error."""
    parser = argparse.ArgumentParser(prog="ovsprune launch", description=__doc__)
    defaults = inspect.signature(launch).parameters
    parser.add_argument("--slim", metavar="DIR")
    for name in ("target", "weights", "policy", "rest"):
        parser.add_argument(f"--{name}", default=defaults[name].default)
    for name, kind in (("fraction", float), ("count", int), ("every", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, default=defaults[name].default)
    parser.add_argument("--pool", action="append", default=[])
    parser.add_argument("--force", action="store_true")
    parser.add_argument("command", nargs="+")
    options = vars(parser.parse_args(arguments))
    try:
        return int(launch(**options)["returncode"])
    except OvspruneError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
