"""``ovsprune prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ovsprune.cli.config_options import config_options, given_options
from ovsprune.cli.screen import Screen, compute_options, output_options
from ovsprune.core.errors import OptionError
from ovsprune.core.options import options_of
from ovsprune.pruning.config import PruneConfig


@click.command("prune", short_help="Cut an image tower to a budget, and repair it.")
@click.option(
    "--model",
    help="tiny, a name of open_clip (ViT-B/16), timm:NAME, hf:NAME, hf-hub:ORG/REPOSITORY, a "
    "folder of weights, or a slim directory.",
)
@click.option(
    "--config",
    "recipe",
    metavar="FILE",
    help="Recipe: a TOML file of options, as `ovsprune inspect DIR --recipe FILE` writes it. "
    "Options on the command line win.",
)
@click.option("--pretrained", help="Weights: a tag of the name, a file, hf-hub:..., or 'none'.")
@click.option("--activation", help="gelu or quick_gelu, for a weights file that does not say.")
@config_options(PruneConfig)
@click.option("--text/--no-text", default=True, show_default=True, help="Save the text tower too.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the slim checkpoint goes; by default slim/MODEL-rRATIO (imp: unstructured/...).",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--dry-run", is_flag=True, help="Show what would be cut, and write nothing.")
@compute_options(batch_size=None)
@output_options
def command(screen: Screen, recipe: str | None, **options: Any) -> None:
    """Cut heads and MLP units out of an image tower, and repair what is left.

    Needs no labels, and no gradient steps unless `--recovery distill` is asked for. `ovsprune
    criteria` lists the criteria, allocations and recoveries; the defaults are the best of them that
    take no gradient step.

    With `--method imp` single weights become zero instead, `--ratio` of them: that saves storage
    and not time. `--imp-structured` removes whole units in the same rounds.
    """
    declared = {option.name for option in options_of(PruneConfig)}
    others = {name: value for name, value in options.items() if name not in declared}
    config = _config(recipe)
    others = _with_base(recipe, others)
    if others["model"] is None:
        raise OptionError("--model is missing: give a name, such as --model ViT-B/16")
    if config.method == "imp" and not config.imp.structured:
        from ovsprune.baselines.imp_weights import imp
        from ovsprune.report.unstructured import unstructured_summary

        record = imp(**others, config=config, progress=screen.progress).record()
        screen.finish(record, *unstructured_summary(record))
        return
    from ovsprune.jobs.prune import prune
    from ovsprune.report.tables import prune_summary

    record = prune(**others, config=config, progress=screen.progress).record()
    screen.finish(record, *prune_summary(record))


def _config(recipe: str | None) -> PruneConfig:
    """Return the configuration: the recipe, if there is one, and the given options over it."""
    given = given_options(PruneConfig)
    if recipe is None:
        return PruneConfig.from_options(given)
    return PruneConfig.from_file(recipe, **given)


def _with_base(recipe: str | None, others: dict[str, Any]) -> dict[str, Any]:
    """Return the other options, with the recipe's table ``[base]`` where none was given."""
    if recipe is None:
        return others
    from ovsprune.pruning.recipes import read_base

    context = click.get_current_context()
    base = {
        name: value
        for name, value in read_base(recipe).items()
        if context.get_parameter_source(name) is ParameterSource.DEFAULT
    }
    return {**others, **base}
