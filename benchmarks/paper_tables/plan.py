"""Which trainings there are: at most 48, the ResNet's own among them, in ten hours on two cores.

47 trainings of frameworks are left. Table 1 at 0.5 has four frameworks, each with the three masks
over three seeds (36) and dense with one (4); the dense row is a mark to measure by, not a party
to a comparison. Table 2 is on Mask2Former, the framework of the paper's own, from the structured
tower. "All layers" is Table 1's structured row; the others share the 7 that are left: random half
3 seeds (it draws other layers each time), alpha 2 (it always picks the same), inverse and
alpha-refresh 1 each. Nothing is left for trainings at 0.7 and 0.9: there the page reports the
towers as they come out of pruning, untrained, scored by themselves.

400 steps of 8 crops are 7 to 15 minutes of one thread, by the framework: the 47 are about eight
hours of one core, and finding the masks and the ResNet's training about three more, which is five
to six hours of two.
"""

from __future__ import annotations

from dataclasses import dataclass

from frameworks import FRAMEWORKS

LIMIT, HOURS = 48, 10.0
"""Trainings in all, and hours."""
BACKBONES = 1
"""Trainings of a backbone among them: ``photo`` was there already."""
STEPS = 400
MASKS = ("dense", "random", "imp", "structured")
POLICIES = ("all", "random", "inverse", "alpha", "alpha-refresh")
SPARSITIES = (0.5, 0.7, 0.9)
TRAINED_AT = 0.5
SCHEDULED = "mask2former"
SEEDS_OF_MASK = {"dense": 1, "random": 3, "imp": 3, "structured": 3}
SEEDS_OF_POLICY = {"random": 3, "inverse": 1, "alpha": 2, "alpha-refresh": 1}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        framework: Of ``frameworks.FRAMEWORKS``.
        mask: Of `MASKS`.
        policy: Of `POLICIES`: which layers of the tower train when.
        seed: Of the framework's weights, the pictures, the random mask and the random half.
    """

    framework: str
    mask: str
    policy: str = "all"
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its row's file."""
        return f"{self.framework}-{self.mask}-{self.policy}-{self.seed}"

    @property
    def tables(self) -> tuple[str, ...]:
        """Where its row stands."""
        shared = self.framework == SCHEDULED and self.mask == "structured"
        if self.policy != "all":
            return ("table2",)
        return ("table1", "table2") if shared else ("table1",)


def runs(table: str | None = None) -> list[Run]:
    """All trainings, or a table's, first seeds first, so that a part of them is of use."""
    found = [
        Run(framework, mask, "all", seed)
        for seed in range(3)
        for mask in MASKS
        for framework in FRAMEWORKS
        if seed < SEEDS_OF_MASK[mask]
    ]
    found += [
        Run(SCHEDULED, "structured", policy, seed)
        for policy in POLICIES[1:]
        for seed in range(SEEDS_OF_POLICY[policy])
    ]
    found.sort(key=lambda run: run.seed)
    return [run for run in found if table is None or table in run.tables]
