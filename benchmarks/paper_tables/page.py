"""Renders the page from ``results.json``: our tables, the paper's beside them, and what is missing.

A pure function of the record: what was not run is said, and nothing is filled in.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import paper
from frameworks import FRAMEWORKS
from masks import IMP
from plan import HOURS, LIMIT, MASKS, POLICIES, SCHEDULED, SPARSITIES, STEPS, TRAINED_AT, Run, runs
from towers import LOT

TITLES = {
    "dense": "dense",
    "random": "random mask",
    "imp": "IMP mask (the paper's, unstructured)",
    "structured": "structured (ours)",
}
SETS = ("msrc_test", "camvid_val")


def render(record: Mapping[str, Any]) -> str:
    """The page.

    Args:
        record: ``rows``, ``costs``, ``towers``, ``masks``, and ``backbone`` (or None).
    """
    rows = record["rows"]
    parts = [
        _head(rows),
        _claims(record),
        _table1(rows, record["costs"]),
        _paper1(),
        _table2(rows, record.get("steps", [])),
        _spectra(rows),
        _towers(record),
        _missing(record),
        _how(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def mean(values: Iterable[float], factor: float = 100.0, digits: int = 1) -> str:
    """Mean and, of several, standard deviation.

    >>> mean([0.5, 0.7])
    '60.0 ± 14.1'
    >>> mean([0.5])
    '50.0'
    """
    found = [factor * v for v in values]
    if not found:
        return "not run"
    text = f"{statistics.mean(found):.{digits}f}"
    return text if len(found) == 1 else f"{text} ± {statistics.stdev(found):.{digits}f}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _of(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def _mious(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row["scores"][name]["miou"] for row in rows]


def _head(rows: Sequence[Any]) -> str:
    return f"""# The paper's tables, in small, on photographs

<!-- written by benchmarks/paper_tables/run.py -->
    python benchmarks/paper_tables/run.py --data DATA

Frameworks are trained for {STEPS} steps of 8 crops from MSRC's train list (320 pictures) and scored
on MSRC test (121 pictures) and CamVid val (101). CamVid's classes are scored without having been
trained by a framework, though names overlap (sky, road, car ...), and both towers saw CamVid's
train list when they were made. Classes are CLIP ViT-B/16's text embeddings. These are small towers
and short trainings: figures are to be compared with each other, not with the paper's, which stand
beside them for the direction alone. ± is the standard deviation over seeds; where there is none,
there was one seed.

The plan: {len(runs())} trainings of frameworks and one of a backbone, at most {LIMIT} and
{HOURS:g} hours on 2 CPU cores; {len(rows)} of the {len(runs())} are in this page. [What was not
run](#not-run) is named."""


def _missing(record: Mapping[str, Any]) -> str:
    done = {Run(r["framework"], r["mask"], r["policy"], r["seed"]) for r in record["rows"]}
    missing = [run for run in runs() if run not in done]
    lines = ["## Not run", ""]
    for name, framework in FRAMEWORKS.items():
        own = [
            f"{run.mask if run.policy == 'all' else f'{run.policy} schedule'} {run.seed}"
            for run in missing
            if run.framework == name
        ]
        if own:
            lines.append(
                f"- {framework.title}: {len(own)} trainings of the plan ({', '.join(own)})."
            )
    lines.append(
        "- Frameworks at 0.7 and 0.9: by plan, for want of trainings; the towers are below."
    )
    lines.append("- Dense with more than one seed, inverse and alpha-refresh likewise: by plan.")
    if record.get("backbone") is None:
        lines.append("- The ResNet: its training is not done, so nothing on it is measured.")
    for sparsity in SPARSITIES:
        for backbone in ("vit", "resnet"):
            found = record["masks"].get(f"{backbone}-{sparsity:g}")
            if found is None:
                lines.append(f"- Masks of the {backbone} tower at {sparsity:g}: not looked for.")
            elif not found["reached"]:
                most = max((t.get("sparsity", 0.0) for t in found["tries"]), default=0.0)
                lines.append(
                    f"- The {backbone} tower at {sparsity:g}: structured pruning does not reach it "
                    f"(its largest try removed {most:.2f})."
                )
    return "\n".join(lines)


def _claims(record: Mapping[str, Any]) -> str:
    """What was to be reproduced, told by the rows alone."""
    rows = record["rows"]
    lines = []
    for name, framework in FRAMEWORKS.items():
        found = {
            mask: {
                row["seed"]: row["scores"]["msrc_test"]["miou"]
                for row in _of(rows, framework=name, mask=mask, policy="all")
            }
            for mask in MASKS
        }
        for better, worse in (("imp", "random"), ("structured", "random"), ("structured", "imp")):
            lines.append(_compared(framework.title, better, worse, found))
    for costs in record["costs"]:
        share = {mask: item["of_dense"] for mask, item in costs["masks"].items()}
        lines.append(
            f"- {FRAMEWORKS[costs['framework']].title}: structured takes "
            f"{share['structured']:.2f} of the dense time, IMP's zeros {share['imp']:.2f}."
        )
    policies = {
        policy: {
            row["seed"]: row["scores"]["msrc_test"]["miou"]
            for row in _of(rows, framework=SCHEDULED, mask="structured", policy=policy)
        }
        for policy in ("alpha", "random", "all")
    }
    lines += [_compared("Schedules", "alpha", other, policies) for other in ("random", "all")]
    gaps = _gaps(policies["alpha"], policies["random"])
    if gaps and statistics.mean(gaps) <= 0:
        lines.append("- So alpha does not beat a random half of the layers here.")
    towers = _by_tower(record)
    for (backbone, sparsity, mask), found in towers.items():
        if mask == "structured":
            lot = _told(towers.get((backbone, sparsity, LOT), []))
            told = f"{_told(found)}, and {lot} by lot, repaired, too"
            lines.append(f"- The {backbone} tower by itself at {sparsity:g}: structured {told}.")
    return "\n".join(["## What came out (MSRC test)", "", *lines])


def _by_tower(record: Mapping[str, Any]) -> dict[tuple[str, float, str], list[Any]]:
    """Rows of towers by themselves: of (tower, sparsity, mask), a row a seed."""
    groups: dict[tuple[str, float, str], list[Any]] = {}
    for row in record["towers"]:
        groups.setdefault((row["backbone"], row["sparsity"], row["mask"]), []).append(row)
    return groups


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mIoU on MSRC test, and in brackets the relative error."""
    scored = [row for row in rows if "scores" in row]
    if not scored:
        return "not reached"
    miou = mean(row["scores"]["msrc_test"]["miou"] for row in scored)
    return f"{miou} ({mean((row['relative_error'] for row in scored), 1.0, 3)})"


def _compared(title: str, better: str, worse: str, found: Mapping[str, Mapping[int, float]]) -> str:
    """By pairs: a seed has the same first weights and the same crops under every mask."""
    gaps = _gaps(found[better], found[worse])
    if not gaps:
        return f"- {title}: {better} against {worse}: not run."
    spread = f" ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else ""
    each = f", {', '.join(f'{gap:+.1f}' for gap in gaps)}" if len(gaps) > 1 else ""
    seeds = f"{len(gaps)} seed{'s' * (len(gaps) > 1)}, paired{each}"
    return (
        f"- {title}: {better} minus {worse}: {statistics.mean(gaps):+.1f}{spread} points ({seeds})."
    )


def _gaps(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """Points by which one is ahead, seed by seed."""
    return [100 * (one[seed] - other[seed]) for seed in sorted(one.keys() & other.keys())]


def _table1(rows: Sequence[Any], costs: Sequence[Mapping[str, Any]]) -> str:
    measured = {item["framework"]: item["masks"] for item in costs}
    lines = []
    for name, framework in FRAMEWORKS.items():
        for mask in MASKS:
            found = _of(rows, framework=name, mask=mask, policy="all")
            item = measured.get(name, {}).get(mask)
            lines.append(
                [
                    framework.title if mask == "dense" else "",
                    TITLES[mask],
                    *(mean(_mious(found, s)) for s in SETS),
                    *(_costs(item) if item else ["not run"] * 5),
                    str(len(found)),
                ]
            )
    header = (
        "framework", "mask", "MSRC test", "CamVid val", "tower's non-zeros", "all non-zeros",
        "MACs without zeros", "MACs done", "time, of dense", "seeds",
    )  # fmt: skip
    return (
        f"## Table 1: the mask is found once and transferred, {TRAINED_AT:g} of the ranked weights "
        "gone\n\n" + table(header, lines) + "\n\nNon-zeros are equal by construction, without an "
        "attention pool that is not run. MACs and time are of the whole framework on one "
        "192 x 192 picture, one thread, all masks in turn in one process, and the ratio is the "
        "median of the turns' ratios; zeros are multiplied like any other number, and left out "
        "where the paper leaves them out. The structured tower comes with its closed-form repair "
        "(the table of towers has it without), the masks are on the dense weights. IMP trained "
        f"{IMP['steps']} steps of {IMP['batch']} pictures a round; the paper's 5,000."
    )


def _costs(item: Mapping[str, Any]) -> list[str]:
    """Cells of what a framework costs under a mask."""
    return [
        f"{item['tower_nonzero'] / 1e6:.2f} of {item['tower_params'] / 1e6:.2f} M",
        f"{item['nonzero'] / 1e6:.2f} M",
        f"{item['nonzero_macs'] / 1e6:.0f} M",
        f"{item['macs'] / 1e6:.0f} M",
        f"{item['milliseconds']:.1f} ms, {item['of_dense']:.2f}",
    ]


def _paper1() -> str:
    lines = []
    for name, masks in paper.TRANSFER.items():
        for mask, (mious, params, flops) in masks.items():
            shown = ["-" if value is None else f"{value:.1f}" for value in mious]
            lines.append([name if mask == "dense" else "", TITLES[mask], *shown, params, flops])
    header = ("framework", "mask", *paper.SETS, "parameters", "FLOPs")
    return (
        "### The paper's own figures\n\n" + table(header, lines) + "\n\nmIoU; parameters and FLOPs "
        "count non-zeros. It has no structured row and no SAN; about 90% of the convolutions' "
        "weights are zero there."
    )


def _table2(rows: Sequence[Any], steps: Sequence[Mapping[str, Any]]) -> str:
    times, share = (steps[0]["milliseconds"], steps[0]["of_all"]) if steps else (None, {})
    lines = []
    for policy in POLICIES:
        found = _of(rows, framework=SCHEDULED, mask="structured", policy=policy)
        own = paper.SCHEDULES.get(policy)
        counted = [r["training_flops"]["total"] / 1e12 for r in found if r["training_flops"]]
        lines.append(
            [
                {"all": "all layers", "random": "random half"}.get(policy, policy),
                *(mean(_mious(found, s)) for s in SETS),
                mean(counted, 1.0, 1),
                f"{times[policy]:.0f} ms, {share[policy]:.2f}" if times else "not run",
                mean((r["seconds"]["cpu"] for r in found), 1.0, 0),
                str(len(found)),
                f"{own[1]:.1f} at {own[0]}" if own else "-",
            ]
        )
    header = (
        "policy", "MSRC test", "CamVid val", "training TFLOPs", "a step, of all layers'",
        "seconds of training", "seeds", "the paper's COCO mIoU",
    )  # fmt: skip
    flops, miou = paper.SCHEDULES["alpha* (a variant)"]
    look = f"{steps[0]['refresh']:.0f} ms" if steps else "some time (not run)"
    return (
        f"## Table 2: which layers train ({FRAMEWORKS[SCHEDULED].title}, structured tower)\n\n"
        + table(header, lines)
        + f"\n\nThe paper also has alpha*, a variant: {miou:.1f} at {flops}. Its rows are of the "
        "dense tower. A step is timed with all policies in turn in one process; a look at the "
        f"spectra, ten in a training with alpha-refresh, takes {look} more. Seconds of training "
        "are a processor's, of runs on a machine that did other work too. FLOPs are of what "
        "trained at each step."
    )


def _spectra(rows: Sequence[Any]) -> str:
    found = [r for r in _of(rows, framework=SCHEDULED, policy="alpha") if r["alphas"]]
    if not found:
        return "### Spectra\n\nNot run: they come with the rows of alpha."
    row = found[0]
    lines = [
        [
            name,
            "too narrow for a fit" if alpha is None else f"{alpha:.2f}",
            "trains" if name in row["chosen"] else "frozen",
        ]
        for name, alpha in sorted(row["alphas"].items(), key=lambda item: -(item[1] or 9e9))
    ]
    return (
        "### Spectra of the structured tower, at the start\n\nThe power-law exponent of each "
        "layer; layers below the median are frozen.\n\n![spectra](spectra.png)\n\n"
        + table(("layer", "alpha", "step 0"), lines)
    )


def _towers(record: Mapping[str, Any]) -> str:
    lines = []
    for (backbone, sparsity, mask), rows in _by_tower(record).items():
        zeros = record["masks"].get(f"{backbone}-{sparsity:g}", {}).get("zeros", 0)
        scored = [row for row in rows if "scores" in row]
        gone = 0 if mask == "dense" else rows[0].get("gone", zeros)
        macs = f"{rows[0]['macs'] / 1e6:.0f} M" if "macs" in rows[0] else "all"
        line = [backbone, f"{sparsity:g}", mask, f"{gone:,}", macs if scored else "not reached"]
        if scored:
            line += [mean(row["scores"][s]["miou"] for row in scored) for s in SETS]
            line.append(mean((row["relative_error"] for row in scored), 1.0, 3))
        else:
            line += ["not reached"] * (len(SETS) + 1)
        lines.append([*line, str(len(rows))])
    if not lines:
        return "## The towers by themselves\n\nNot run."
    header = ("tower", "asked", "mask", "weights gone", "MACs done", "MSRC test")
    return (
        "## The towers by themselves, before any framework\n\nNothing is trained after the mask; "
        "dense tokens against texts. *IMP, its own weights* has what the rounds of IMP trained; "
        "Table 1 has IMP's mask on the dense weights, as the paper transfers it, and so has the "
        "random mask. The structured tower's weights are repaired by its default recovery, which "
        "is part of the method; *structured, not repaired* has the same units of the dense "
        "weights. *Random units* are whole units by lot, of every layer the same share, and as "
        "many parameters (to a ten-thousandth), not as many MACs; Table 1 has no room for them "
        "among its trainings. Masked and unrepaired batch norms have the statistics of what they "
        "read then. The relative error is of the dense features on MSRC test: 0 is equal, 1 as bad "
        "as the mean feature everywhere.\n\n"
        + table((*header, "CamVid val", "relative error", "seeds"), lines)
    )


def _how(record: Mapping[str, Any]) -> str:
    lines = ["## How", ""]
    for name, found in record["masks"].items():
        if found["reached"]:
            lines.append(
                f"- `{name}`: structured at a MACs ratio of {found['macs_ratio']:g} lost "
                f"{found['zeros']:,} parameters, {found['sparsity']:.3f} of the "
                f"{found['ranked']:,} ranked weights; IMP has as many zeros after "
                f"{found['imp_rounds']} rounds."
            )
        elif "imp_rounds" in found:
            lines.append(
                f"- `{name}`: not reached by structured pruning; IMP has {found['zeros']:,} zeros "
                f"after {found['imp_rounds']} rounds."
            )
    if record.get("backbone"):
        back = record["backbone"]
        lines.append(
            f"- The ResNet: {back['steps']} steps, {back['minutes']:.0f} minutes, one thread; by "
            f"itself {100 * back['msrc_test']:.1f} on MSRC test, {100 * back['camvid_val']:.1f} on "
            "CamVid val."
        )
    seconds = [r["seconds"]["wall"] for r in record["rows"]]
    if seconds:
        others = [m.get("structured_seconds", 0.0) + m.get("imp_seconds", 0.0)
                  for m in record["masks"].values()]  # fmt: skip
        others.append(60.0 * (record["backbone"] or {"minutes": 0.0})["minutes"])
        lines.append(
            f"- Trainings took {sum(seconds) / 3600:.1f} hours of one thread in all, "
            f"{mean(seconds, 1 / 60)} minutes each; masks and the ResNet "
            f"{sum(others) / 3600:.1f}. Two threads at a time were planned to take at most "
            f"{HOURS:g} hours."
        )
    lines.append(
        "- A mask's class is, in Mask2Former, the tower's own embedding of it (last stage, value "
        "and output projections, mean over the mask) and what the query adds to it: a class "
        "learnt by the queries alone takes more steps than these. FC-CLIP mixes what the queries "
        "learn with the frozen tower's embedding, as its paper does.\n"
        "- ResNets train with batch statistics, in FC-CLIP's way nothing of the tower trains. The "
        "tower's learning rate is a fifth of the rest's. Zeros are held by masked gradients and "
        "checked after the last step. `plan.py` says why the trainings are shared out so."
    )
    return "\n".join(lines)
