"""``ovsprune prune``."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from ovsprune.cli.config_options import config_options, given_options
from ovsprune.cli.options import ACTIVATION, compute_options, default_option, output
from ovsprune.cli.screen import Screen, output_options
from ovsprune.core.errors import OptionError
from ovsprune.core.options import options_of
from ovsprune.pruning.config import PruneConfig


@click.command("prune", short_help="Prune an image tower to a budget, and repair it.")
@click.option(
    # Not required, because a recipe may name the model.
    "--model",
    help="tiny, a name of open_clip (ViT-B/16), timm:NAME, hf:NAME, hf-hub:ORG/REPOSITORY, a "
    "folder of weights, or a slim directory.",
)
@click.option(
    "--config",
    "recipe",
    metavar="FILE",
    help="Recipe: a TOML file of options, as `ovsprune inspect DIR --recipe FILE` writes it. "
    "Options on the command line take precedence.",
)
@click.option("--pretrained", help="Weights: a tag of the name, a file, hf-hub:..., or 'none'.")
@ACTIVATION
@config_options(PruneConfig)
@default_option("--text/--no-text", default=True, help="Save the text tower too.")
@output("Output directory; by default slim/MODEL-rRATIO (imp: unstructured/...).")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Show the result without writing it.")
@compute_options()
@output_options
def command(screen: Screen, recipe: str | None, **options: Any) -> None:
    """Remove heads and MLP units from an image tower, and repair the remaining weights.

    No labels are needed, and no gradient steps except for `--recovery distill`. `ovsprune criteria`
    lists the criteria, allocations and recoveries; the defaults are the best combination without
    gradient steps.

    `--method imp` sets the fraction `--ratio` of single weights to zero instead, which saves
    storage but no time. `--imp-structured` removes whole units in the same rounds.
    """
    declared = {option.name for option in options_of(PruneConfig)}
    others = {name: value for name, value in options.items() if name not in declared}
    given = given_options(PruneConfig)
    if recipe is None:
        config = PruneConfig.from_options(given)
    else:
        config = PruneConfig.from_file(recipe, **given)
        others |= _base_of(recipe)
    if others["model"] is None:
        raise OptionError("--model is missing: give a name, such as --model ViT-B/16")
    # Removal of single weights has a function, a result and a card of its own.
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


def _base_of(recipe: str) -> dict[str, Any]:
    """Return the values of the recipe's table ``[base]`` that the command line does not set."""
    from ovsprune.pruning.recipes import read_base

    context = click.get_current_context()
    return {
        name: value
        for name, value in read_base(recipe).items()
        if context.get_parameter_source(name) is ParameterSource.DEFAULT
    }
