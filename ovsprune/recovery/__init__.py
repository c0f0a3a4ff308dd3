"""Recoveries: repair a cut tower in place. One file per recovery.

See :class:`ovsprune.core.protocols.Recovery`.
"""

from ovsprune.core.protocols import Recovery
from ovsprune.core.registry import Registry

RECOVERIES: Registry[Recovery] = Registry("recovery", "ovsprune.recovery")


def recovery_chain(name: str) -> list[Recovery]:
    """Return the recovery called ``name``, preceded by the recoveries that it builds on.

    Raises:
        UnknownNameError: A name is unknown.
        ValueError: Recoveries depend on each other in a circle.
    """
    chain: list[Recovery] = []
    names: list[str] = []
    following: str | None = name
    while following is not None:
        if following in names:
            raise ValueError(f"recoveries depend on each other: {' after '.join(names)}")
        names.append(following)
        chain.insert(0, RECOVERIES.get(following))
        following = chain[0].after
    return chain
