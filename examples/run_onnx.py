"""Export a slim tower to ONNX, and run the file on a picture without torch.

python examples/prune.py                                 # writes slim/example
python examples/run_onnx.py --slim slim/example          # exports, and runs a random picture
python examples/run_onnx.py --slim slim/example --image photo.jpg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import ovsprune


def preprocess(image: Image.Image, said: dict) -> np.ndarray:
    """A picture as float32 [1, 3, H, W], as the file's metadata says.

    This is the resize mode "shortest": the shorter side is resized, and the middle cut out.
    """
    assert said["resize_mode"] == "shortest"
    height, width = said["size"]
    scale = max(height / image.height, width / image.width)
    wide, high = max(int(scale * image.width), width), max(int(scale * image.height), height)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    image = image.convert("RGB").resize((wide, high), filters[said["interpolation"]])
    left, top = round((wide - width) / 2), round((high - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = (pixels - np.float32(said["mean"])) / np.float32(said["std"])
    return pixels.transpose(2, 0, 1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slim", type=Path, default=Path("slim/example"))
    parser.add_argument("--image", type=Path)
    parser.add_argument("--output", type=Path, default=Path("export/example.onnx"))
    given = parser.parse_args()

    # Height and width stay free; the file is compared with the checkpoint before it is there.
    record = ovsprune.export(given.slim, dynamic=True, output=given.output, overwrite=True)
    print(f"largest error {record['relative_error']:.1g} standard deviations of the output")

    # From here on nothing of ovsprune or torch is needed.
    session = onnxruntime.InferenceSession(str(given.output), providers=["CPUExecutionProvider"])
    said = json.loads(session.get_modelmeta().custom_metadata_map["preprocess"])
    if given.image is not None:
        image = Image.open(given.image)
    else:
        noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
    pooled, dense = session.run(["pooled", "dense"], {"images": preprocess(image, said)})
    print(f"pooled {pooled.shape}, dense {dense.shape}")


if __name__ == "__main__":
    main()
