"""Where things are, and the neighbours' scripts made importable.

The photographs, their augmentation and the teacher are those of ``photo_clip``; they are scripts
and no package, so their folder goes behind this one on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent
PHOTO = BENCHMARKS / "photo_clip" / "photo"
"""The ViT: open_clip's folder form."""
RESNET = HERE / "resnet"
"""The ModifiedResNet that ``backbone.py`` trains: the same form."""
CARD = RESNET / "measured.json"
"""What it scored: the last thing that its making writes."""
KEPT = HERE / "masks"
"""The masks that frameworks are trained with."""
RESULTS = HERE / "results.json"
PAGE = HERE / "README.md"
SPECTRA = HERE / "spectra.png"

for _folder in (BENCHMARKS / "photo_clip", BENCHMARKS):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))
