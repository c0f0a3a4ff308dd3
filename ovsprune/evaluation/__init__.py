"""Dense zero-shot evaluation: data sets, text embeddings, the zero-shot head, and scores."""

from ovsprune.evaluation.datasets import VOID, FolderData, Sample, ScenesData, SegmentationData
from ovsprune.evaluation.last_block import VARIANTS, dense_with
from ovsprune.evaluation.metrics import ConfusionMatrix, SegmentationScores
from ovsprune.evaluation.text import DEFAULT_TEMPLATES, encode_names, read_embeddings
from ovsprune.evaluation.zero_shot import DenseZeroShot, Evaluation, evaluate, prepare_image

__all__ = [
    "DEFAULT_TEMPLATES",
    "VARIANTS",
    "VOID",
    "ConfusionMatrix",
    "DenseZeroShot",
    "Evaluation",
    "FolderData",
    "Sample",
    "ScenesData",
    "SegmentationData",
    "SegmentationScores",
    "dense_with",
    "encode_names",
    "evaluate",
    "prepare_image",
    "read_embeddings",
]
