"""Measurements of objects, held against scikit-image and against arithmetic."""

import numpy as np
import pytest
from skimage.draw import ellipse
from skimage.measure import regionprops

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Region
from darcnn.runtime.instances import Instances
from darcnn.runtime.measure import measure, measure_on_slide, name_columns, object_schema
from darcnn.runtime.readers.array import ArrayReader

SHAPE = (120, 160)


def box_ring(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], float)


def from_labels(labels, scores=None):
    """One object per label; its outline is the box of its mask, enough for what is tested here."""
    found = regionprops(labels)
    boxes = np.array([[p.bbox[1], p.bbox[0], p.bbox[3], p.bbox[2]] for p in found], np.float32).reshape(-1, 4)
    return Instances(
        shape=labels.shape,
        boxes=boxes,
        scores=np.linspace(0.5, 0.9, len(found)).astype(np.float32),
        origins=boxes[:, :2].astype(np.int64),
        masks=tuple(p.image for p in found),
        outlines=tuple(box_ring(*box) for box in boxes.astype(float)),
        truncated=np.zeros(len(found), bool),
    )


@pytest.fixture
def labels():
    image = np.zeros(SHAPE, np.int32)
    for label, (row, column, long, short, turn) in enumerate(
        [(30, 30, 20, 8, 0.3), (40, 100, 12, 12, 0.0), (90, 40, 6, 25, 1.1), (95, 120, 3, 2, 0.0)], start=1
    ):
        rows, columns = ellipse(row, column, long, short, shape=SHAPE, rotation=turn)
        image[rows, columns] = label
    image[60, 140] = 5  # a single pixel still has axes
    return image


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 60000, (*SHAPE, 2)).astype(np.uint16)


def test_shape_and_brightness_agree_with_scikit_image(labels, pixels):
    table = measure(from_labels(labels), pixels, Region(0, 0, 160, 120), (1.0, 1.0), ["a", "b"], (1.0, 1.0))
    for row, truth in zip(table.to_pylist(), regionprops(labels, pixels), strict=True):
        assert row["y"] - 0.5 == pytest.approx(truth.centroid[0])
        assert row["x"] - 0.5 == pytest.approx(truth.centroid[1])
        assert (row["bbox_y0"], row["bbox_x0"], row["bbox_y1"], row["bbox_x1"]) == truth.bbox
        assert row["area_px"] == truth.area
        # scikit-image takes pixels for points; ours have an extent, 1/12 in each second moment
        long, short = (v**2 + 16 / 12 for v in (truth.axis_major_length, truth.axis_minor_length))
        assert row["major_axis_um"] ** 2 == pytest.approx(long, rel=1e-5)
        assert row["minor_axis_um"] ** 2 == pytest.approx(short, rel=1e-5)
        assert row["eccentricity"] == pytest.approx(np.sqrt(1 - short / long), rel=1e-5, abs=1e-3)
        assert row["mean_intensity_a"] == pytest.approx(truth.intensity_mean[0], rel=1e-5)
        assert row["std_intensity_b"] == pytest.approx(truth.intensity_std[1], rel=1e-5, abs=1e-3)


def test_columns_come_in_the_order_of_the_schema(labels, pixels):
    table = measure(from_labels(labels), pixels, Region(0, 0, 160, 120), (1.0, 1.0), ["a", "b"], None)
    assert table.schema == object_schema(["a", "b"])
    assert " ".join(table.column_names) == (
        "id geometry score x y bbox_x0 bbox_y0 bbox_x1 bbox_y1 area_px perimeter_px major_axis_px "
        "minor_axis_px area_um2 perimeter_um major_axis_um "
        "minor_axis_um eccentricity solidity mean_intensity_a std_intensity_a mean_intensity_b "
        "std_intensity_b truncated"
    )


def test_lengths_follow_the_pixel_size_of_each_axis():
    square = from_labels(np.pad(np.ones((10, 10), np.int32), 5))
    pixels = np.zeros((20, 20, 1), np.uint8)
    row = measure(square, pixels, Region(0, 0, 20, 20), (1.0, 1.0), ["a"], (0.5, 0.25)).to_pylist()[0]
    assert row["area_um2"] == pytest.approx(100 * 0.125)
    assert row["perimeter_um"] == pytest.approx(2 * (5.0 + 2.5))
    assert row["major_axis_um"] == pytest.approx(2 * row["minor_axis_um"])
    assert row["perimeter_px"] == pytest.approx(40)
    assert row["major_axis_px"] == row["minor_axis_px"] == pytest.approx(row["major_axis_um"] / 0.5)


def test_um_columns_are_null_without_a_pixel_size(labels, pixels):
    table = measure(from_labels(labels), pixels, Region(0, 0, 160, 120), (1.0, 1.0), ["a", "b"], None)
    for name in table.column_names:
        expected = len(table) if "_um" in name or name == "id" else 0
        assert table[name].null_count == expected, name


def test_solidity_is_the_outline_over_its_hull():
    ring = np.array([[0, 0], [4, 0], [4, 2], [2, 2], [2, 4], [0, 4], [0, 0]], float)
    mask = np.ones((4, 4), bool)
    mask[2:, 2:] = False
    bent = Instances(
        (8, 8),
        np.array([[0, 0, 4, 4]], "f4"),
        np.ones(1, "f4"),
        np.zeros((1, 2), np.int64),
        (mask,),
        (ring,),
        np.ones(1, bool),
    )
    row = measure(bent, np.zeros((8, 8, 1)), Region(0, 0, 8, 8), (1.0, 1.0), ["a"], None).to_pylist()[0]
    assert row["solidity"] == pytest.approx(12 / 14)
    assert row["truncated"] is True


def test_brightness_is_read_from_a_coarser_level_and_an_inner_region():
    labels = np.zeros((64, 64), np.int32)
    labels[32:40, 16:24] = 1
    level = np.zeros((16, 16, 1), np.uint16)  # downsample 4
    level[8:10, 4:6] = 100
    level[8, 4] = 200
    part = Region(3, 7, 12, 13)
    table = measure(
        from_labels(labels), level[part.y0 : part.y1, part.x0 : part.x1], part, (4.0, 4.0), ["a"], None
    )
    assert table["mean_intensity_a"][0].as_py() == pytest.approx(125.0)
    assert table["std_intensity_a"][0].as_py() == pytest.approx(np.std([200, 100, 100, 100]))


def test_an_object_outside_the_pixels_has_no_brightness(labels, pixels):
    part = Region(0, 0, 60, 60)
    table = measure(from_labels(labels), pixels[:60, :60], part, (1.0, 1.0), ["a", "b"], None)
    assert table["mean_intensity_a"].to_pylist()[0] is not None
    assert table["mean_intensity_a"].to_pylist()[3] is None


def test_no_objects_make_an_empty_table(pixels):
    table = measure(Instances.empty(SHAPE), pixels, Region(0, 0, 160, 120), (1.0, 1.0), ["a", "b"], (1, 1))
    assert table.num_rows == 0
    assert table.schema == object_schema(["a", "b"])


def test_pixels_that_do_not_fit_are_refused(labels, pixels):
    with pytest.raises(ShapeError, match="1 channels"):
        measure(from_labels(labels), pixels, Region(0, 0, 160, 120), (1.0, 1.0), ["a"], None)


def on_slide(objects, values, mpp=None):
    with ArrayReader(values.astype(np.float32)) as reader:
        return measure_on_slide(objects, reader, reader.info.levels[0], mpp)


def test_pixels_of_two_sizes_measure_as_square_ones_that_show_the_same():
    bar = np.zeros((20, 25), np.int32)
    for row in range(20):
        bar[row, row // 2 : row // 2 + 4] = 1  # slanted: x and y vary together
    found = [
        on_slide(from_labels(labels), labels, mpp).to_pylist()[0]
        for labels, mpp in ((bar, (1.0, 2.0)), (np.repeat(bar, 2, axis=0), (1.0, 1.0)))
    ]
    for name in ("area_um2", "perimeter_um", "major_axis_um", "minor_axis_um"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_objects_keep_their_order_in_blocks_and_pixels_without_value_tell_nothing(monkeypatch):
    labels = np.zeros((40, 40), np.int32)
    for number, (y, x) in enumerate(((0, 0), (0, 30), (30, 0), (30, 30)), start=1):
        labels[y : y + 3, x : x + 4] = number
    order = np.array([3, 0, 1, 2])
    values = 10.0 * labels
    values[1, 1:3] = np.nan, np.inf
    monkeypatch.setattr("darcnn.runtime.measure._BLOCK_PX", 16)
    table = on_slide(from_labels(labels).select(order), values)
    assert table["mean_intensity_grey"].to_pylist() == [40.0, 10.0, 20.0, 30.0]
    assert table["bbox_x0"].to_pylist() == [30, 0, 30, 0]


def test_channel_names_become_distinct_plain_columns():
    assert name_columns(["red", "Red", "C\u00f3l/our 1", "\u03b1"]) == ("red", "Red_2", "Col_our_1", "3")
