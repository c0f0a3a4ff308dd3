"""Launch: run a framework's own script, and replace the towers that it builds.

``python -m ovsprune.launching.command --slim DIR -- python train_net.py ...`` does the same where
ovsprune is installed without its dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ovsprune.core.errors import OptionError, OvspruneError, ScheduleError, TargetError
from ovsprune.core.progress import Progress, Silent
from ovsprune.jobs.schedule import checked
from ovsprune.launching import start_directory
from ovsprune.launching import training_loops as launched
from ovsprune.schedules import POLICIES
from ovsprune.slim import read
from ovsprune.slim.read import newest_slim
from ovsprune.targets import TARGETS

__all__ = ["launch"]

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
        command: The program and its arguments, as on a command line.
        slim: Directory of the slim checkpoint; by default the newest under ``slim/``.
        target: Name of a target; ``"auto"`` uses the one that recognises the model.
        weights: ``"slim"``, ``"target"`` or ``"auto"``, as for a transfer; decided again
            whenever the framework loads a dense checkpoint into its model.
        policy: Policy of :func:`ovsprune.schedule`, hooked into the training
            loop of detectron2, mmengine, Lightning or transformers; by default none.
            ``fraction``, ``count``, ``every``, ``pool``, ``rest`` and ``seed`` are its options.
        fraction: Fraction of the layers that train.
        count: Number of layers that train, instead of a fraction.
        every: Steps between two choices of the policy.
        pool: Patterns of parameters instead of the image tower.
        rest: Treatment of norms, biases and positions.
        seed: Seed of random policies.
        force: Accept a checkpoint whose base model is untrained.
        environment: Variables of the command; by default those of this process.
        progress: Progress reporter.

    Returns:
        A record with ``command, slim, target, returncode``; ``replaced``: for each model that was
        made slim, its :meth:`ovsprune.targets.Attached.record`; ``events``: messages on its tower
        when the framework loaded or initialised it later; and ``schedules``: of each
        training, ``policy, total_steps, trainable[], frozen[]`` as it began.

    Raises:
        OptionError: There is no such program, or ``weights`` is unknown.
        UnknownNameError: There is no such target.
        CheckpointError: The slim checkpoint is missing or damaged.
        TargetError: The command ended, and nothing was replaced.
        ScheduleError: The command succeeded, and no known training loop used the policy.
    """
    progress = progress or Silent()
    if target != "auto":
        TARGETS.get(target)
    if weights not in ("slim", "target", "auto"):
        raise OptionError(f"weights is {weights!r}, expected 'slim', 'target' or 'auto'")
    settings = None
    if policy is not None:
        POLICIES.get(policy)
        checked(1, fraction, count, every, rest)
        given = {"fraction": fraction, "count": count, "every": every, "rest": rest, "seed": seed}
        settings = {"policy": policy, "target": target, "pool": list(pool) or None, **given}
    variables = dict(os.environ if environment is None else environment)
    if not command or shutil.which(command[0], path=variables.get("PATH")) is None:
        raise OptionError(
            f"there is no program {command[0] if command else ''!r} to launch; write the command "
            "after --, as it would be typed: ovsprune launch --slim DIR -- python train_net.py ..."
        )
    if slim is None:
        slim = newest_slim()
        progress.note(f"no slim checkpoint was named; taking the newest, {slim}")
    read(slim)  # errors in it are reported before the framework starts
    directory = str(Path(slim).resolve())
    session = {"slim": directory, "target": target, "weights": weights, "force": force}
    status, records = _launched(list(command), variables, settings, session)
    replaced = [record for record in records if "replaced" in record]
    schedules = [record["schedule"] for record in records if "schedule" in record]
    if not replaced:
        raise TargetError(_nothing(command, status, records))
    if settings is not None and not schedules and not status:
        raise ScheduleError(
            f"no training loop used the policy {policy}: known are those of detectron2, mmengine, "
            "Lightning and transformers. In another one call ovsprune.schedule(model, "
            "...) and plan.step(i) before every step"
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


def _launched(
    command: list[str],
    variables: dict[str, str],
    schedule: Mapping[str, Any] | None,
    session: Mapping[str, Any],
) -> tuple[int, list[dict[str, Any]]]:
    """Run the command with hooks in its Pythons; return its exit status and their records."""
    with tempfile.TemporaryDirectory(prefix="ovsprune-launch-") as scratch:
        document = {
            "handler": launched.__name__,  # its function ``told`` runs in the command's Pythons
            "watched": launched.watched(schedule),
            "schedule": schedule,
            "session": {**session, "record": scratch},
        }
        variables[VARIABLE] = json.dumps(document)
        paths = (str(start_directory()), variables.get("PYTHONPATH", ""))
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return _run(command, variables), _records(Path(scratch))


def _run(command: list[str], variables: Mapping[str, str]) -> int:
    """Run a command, pass signals on to it, and return its exit status."""
    try:
        out: Any = sys.stdout if sys.stdout.fileno() != 1 else None
    except (AttributeError, OSError, ValueError):
        out = None
    try:
        child = subprocess.Popen(command, env=dict(variables), stdout=out)
    except OSError as error:
        raise OptionError(f"{command[0]} cannot be started: {error.strerror or error}") from None
    with _passed_on(child):
        status = child.wait()
    return status if status >= 0 else 128 - status  # as a shell says it of a signal


@contextmanager
def _passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that would end this process end the command first, so that its end can be told.

    A terminal sends its interrupt to both; then it is enough to wait.
    """
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            handler = signal.SIG_IGN if number == signal.SIGINT else _pass(child)
            before[number] = signal.signal(number, handler)
        except ValueError:  # not in the main thread
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass(child: subprocess.Popen[bytes]) -> Any:
    return lambda number, frame: child.send_signal(number)


def _records(directory: Path) -> list[dict[str, Any]]:
    files = sorted(directory.glob("[!.]*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _nothing(command: Sequence[str], status: int, records: list[dict[str, Any]]) -> str:
    """Explain why nothing was replaced."""
    passed = [str(record["passed"]) for record in records if "passed" in record]
    why = "; ".join(dict.fromkeys(passed))
    if status and not why:
        return (
            f"{command[0]} ended with status {status}, and until then it had built no model with a "
            "tower to replace; its own messages say why it ended"
        )
    return (
        "nothing was replaced: "
        + (why or "no builder that is known gave a model with a CLIP image tower in it")
        + ". Builders are those of detectron2, mmengine, open_clip, OpenAI's clip and "
        "transformers' from_pretrained; where a script builds its model in another way, add the "
        "lines that `ovsprune transfer` prints"
    )


def _alone(arguments: Sequence[str] | None = None) -> int:
    """The command line without click; the status of the command, or 2."""
    parser = argparse.ArgumentParser(prog="ovsprune launch", description=__doc__)
    parser.add_argument("--slim", metavar="DIR")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--policy")
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--count", type=int)
    parser.add_argument("--every", type=int)
    parser.add_argument("--pool", action="append", default=[])
    parser.add_argument("--rest", default="follow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("command", nargs="+")
    given = vars(parser.parse_args(arguments))
    try:
        return int(launch(**given)["returncode"])
    except OvspruneError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(_alone())
