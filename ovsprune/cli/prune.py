"""``ovsprune prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.options import budget_options, calibration_options
from ovsprune.cli.screen import Screen, compute_options, output_options


@click.command("prune", short_help="Cut an image tower to a budget, and repair it.")
@click.option(
    "--model",
    required=True,
    help="tiny, a name of open_clip (ViT-B/16), timm:NAME, hf:NAME, hf-hub:ORG/REPOSITORY, a "
    "folder of weights, or a slim directory.",
)
@click.option("--ratio", required=True, type=float, help="Part of the cost to remove, in (0, 1).")
@click.option("--pretrained", help="Weights: a tag of the name, a file, hf-hub:..., or 'none'.")
@click.option("--activation", help="gelu or quick_gelu, for a weights file that does not say.")
@budget_options(latency=True)
@calibration_options
@click.option(
    "--method",
    default="default",
    show_default=True,
    help="default, or imp: iterative magnitude pruning with feature distillation, as OpenTrans.",
)
@click.option(
    "--imp-structured", is_flag=True, help="imp: remove whole units, and not single weights."
)
@click.option(
    "--imp-steps", type=int, default=100, show_default=True, help="imp: training steps a round."
)
@click.option(
    "--imp-rewind", is_flag=True, help="imp: every round trains from the dense weights again."
)
@click.option(
    "--imp-lr", type=float, default=1e-4, show_default=True, help="imp: AdamW's learning rate."
)
@click.option(
    "--imp-rounds",
    metavar="FILE",
    help="imp: keep the last round there and go on from it, single weights to a larger ratio too.",
)
@click.option(
    "--criterion", default="reconstruction", show_default=True, help="Which units go first."
)
@click.option("--allocation", default="sensitivity", show_default=True, help="How much goes where.")
@click.option(
    "--recovery", default="gauss-newton", show_default=True, help="How the rest is repaired."
)
@click.option(
    "--rounds",
    type=int,
    default=1,
    show_default=True,
    help="Prune in this many rounds, with recovery after each.",
)
@click.option(
    "--distill-steps",
    type=int,
    help="Gradient steps of the recovery distill, all rounds together; 1000 by default.",
)
@click.option("--distill-seconds", type=float, help="Stop distilling after this time.")
@click.option(
    "--distill-optimizer",
    metavar="NAME",
    help="Any optimiser of torch.optim; by default Muon for matrices and AdamW for the rest, and "
    "AdamW alone before torch 2.9.",
)
@click.option(
    "--distill-lr",
    type=float,
    default=1e-4,
    show_default=True,
    help="Peak learning rate; of Muon's matrices ten times as much.",
)
@click.option(
    "--floor",
    multiple=True,
    metavar="PATTERN=N",
    help="Fewest units (or share of them, below 1) that stay in matching layers; may be repeated.",
)
@click.option(
    "--uniform-heads", is_flag=True, help="As many heads in every layer, the last block's too."
)
@click.option(
    "--prune-depth",
    is_flag=True,
    help="Also drop whole attentions and MLPs; every block keeps its place and its name.",
)
@click.option(
    "--latency-table",
    metavar="FILE",
    help="Layer times for --budget latency; by default this machine's, in your cache directory.",
)
@click.option(
    "--statistics",
    metavar="FILE",
    help="Keep what calibration measures, or take it from there: another ratio is then cheap.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is drawn.")
@click.option("--text/--no-text", default=True, show_default=True, help="Save the text tower too.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the slim checkpoint goes; by default slim/MODEL-rRATIO (imp: unstructured/...).",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--dry-run", is_flag=True, help="Say what would be cut, and write nothing.")
@compute_options()
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Cut heads and MLP units out of an image tower, and repair what is left.

    Needs no labels, and no gradient steps unless `--recovery distill` is asked for. `ovsprune
    criteria` lists the criteria, allocations and recoveries; the defaults are the best of them that
    take no gradient step.

    With `--method imp` single weights become zero instead, `--ratio` of them: that saves storage
    and not time. `--imp-structured` removes whole units in the same rounds.
    """
    from ovsprune.core.protocols import Distillation

    training = {
        name: options.pop(f"distill_{name}") for name in ("steps", "seconds", "optimizer", "lr")
    }
    given = {name: value for name, value in training.items() if value is not None}
    options["distill"] = Distillation(**given)
    if options["method"] == "imp" and not options["imp_structured"]:
        from ovsprune.jobs.imp import imp
        from ovsprune.report.unstructured import unstructured_summary

        del options["method"]
        record = imp(**options, progress=screen.progress).record()
        screen.finish(record, *unstructured_summary(record))
        return
    from ovsprune.jobs.prune import prune
    from ovsprune.report.tables import prune_summary

    record = prune(**options, progress=screen.progress).record()
    screen.finish(record, *prune_summary(record))
