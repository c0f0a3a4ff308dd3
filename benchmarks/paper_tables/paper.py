"""The paper's own figures (OpenTrans, CVPR 2024, arXiv 2404.07448), to stand beside ours."""

from __future__ import annotations

SETS = ("COCO", "Cityscapes", "ADE-150", "ADE-847", "PAS-20", "PC-59", "PC-459")

TRANSFER = {
    "Han et al.": {
        "dense": ((46.0, 33.9, 16.6, 2.5, 71.2, 39.0, 7.1), "44.1M", "268.2G"),
        "random": ((37.4, 28.7, 13.2, 2.2, 60.1, 33.2, 5.8), "22.9M", "173.3G"),
        "imp": ((42.5, 31.7, 15.8, 2.6, 64.6, 35.1, 6.4), "22.9M", "173.3G"),
    },
    "DeepLabV3": {
        "dense": ((26.3, 20.3, 8.8, None, 44.1, 23.9, 4.1), "40.3M", "241.3G"),
        "random": ((17.9, 16.3, 6.4, None, 30.2, 16.5, 2.7), "19.1M", "146.8G"),
        "imp": ((34.8, 24.3, 10.8, None, 55.2, 28.9, 5.2), "19.1M", "146.8G"),
    },
    "FC-CLIP": {
        "dense": ((58.7, 53.2, 23.3, 7.1, 89.5, 50.5, 12.9), "39.0M", "200.1G"),
        "random": ((52.8, 50.0, 17.2, 3.2, 85.5, 44.8, 8.7), "17.8M", "105.6G"),
        "imp": ((56.8, 52.1, 19.1, 4.2, 87.6, 47.4, 9.9), "17.8M", "105.6G"),
    },
}
"""Framework to mask to mIoU by `SETS`, parameters and FLOPs; both count non-zeros."""

SCHEDULES = {
    "all": ("181.4P", 46.0),
    "random": ("164.5P", 44.5),
    "alpha* (a variant)": ("172.3P", 45.3),
    "alpha": ("159.6P", 47.2),
}
"""Policy to training FLOPs and COCO's mIoU, of Han et al."""
