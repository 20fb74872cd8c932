"""Writes LIF files as Leica's LAS X lays them out (after what liffile and Bio-Formats read), for tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

AXES = {"X": 1, "Y": 2, "Z": 3, "T": 4, "\N{GREEK SMALL LETTER LAMDA}": 5, "M": 10}  # DimID


@dataclass(frozen=True)
class Image:
    """Values of axes named by letters, as they lie in the file: "CZYX", or "YXS" for colours."""

    name: str
    axes: str
    values: np.ndarray
    lengths: Mapping[str, float] | None = None  # metres (seconds for T) from the first to the last
    tints: Sequence[str] = ()
    is_reversed: bool = False  # the last channel is described first


def write_lif(path: Path, images: Sequence[Image]) -> Path:
    root = ElementTree.Element("LMSDataContainerHeader", Version="2")
    children = ElementTree.SubElement(ElementTree.SubElement(root, "Element", Name=path.stem), "Children")
    for number, image in enumerate(images):
        element = ElementTree.SubElement(children, "Element", Name=image.name)
        data = ElementTree.SubElement(ElementTree.SubElement(element, "Data"), "Image")
        _describe(ElementTree.SubElement(data, "ImageDescription"), image)
        ElementTree.SubElement(
            element, "Memory", Size=str(image.values.nbytes), MemoryBlockID=f"MemBlock_{number}"
        )
    text = ElementTree.tostring(root, encoding="unicode").encode("utf-16-le")
    with path.open("wb") as file:
        file.write(struct.pack("<IIBI", 0x70, len(text) + 5, 0x2A, len(text) // 2) + text)
        for number, image in enumerate(images):
            block = f"MemBlock_{number}"
            head = struct.pack("<BQBI", 0x2A, image.values.nbytes, 0x2A, len(block))
            name = block.encode("utf-16-le")
            file.write(struct.pack("<II", 0x70, len(head) + len(name)) + head + name)
            file.write(np.ascontiguousarray(image.values).tobytes())
    return path


def _describe(parent: ElementTree.Element, image: Image) -> None:
    steps = {
        axis: image.values.itemsize * int(np.prod(image.values.shape[index + 1 :]))
        for index, axis in enumerate(image.axes)
    }
    sizes = dict(zip(image.axes, image.values.shape, strict=True))
    channels = ElementTree.SubElement(parent, "Channels")
    along = "S" if "S" in sizes else "C"
    numbers = range(sizes.get(along, 1))
    for number in reversed(numbers) if image.is_reversed else numbers:
        tint = image.tints[number] if number < len(image.tints) else ""
        ElementTree.SubElement(
            channels,
            "ChannelDescription",
            DataType="0",
            ChannelTag=str(number + 1 if along == "S" else 0),
            Resolution=str(8 * image.values.itemsize),
            NameOfMeasuredQuantity="",
            Min="0",
            Max="1",
            Unit="",
            LUTName=tint,
            IsLUTInverted="0",
            BytesInc=str(number * steps.get(along, 0)),
            BitInc="0",
        )
    dimensions = ElementTree.SubElement(parent, "Dimensions")
    for axis, step in reversed(steps.items()):
        if axis in "CS":
            continue
        ElementTree.SubElement(
            dimensions,
            "DimensionDescription",
            DimID=str(AXES[axis]),
            NumberOfElements=str(sizes[axis]),
            Origin="0",
            Length=str((image.lengths or {}).get(axis, 0.0)),
            Unit="s" if axis == "T" else "m",
            BitInc="0",
            BytesInc=str(step),
        )
