"""A plate stands for its fields, a converted file for its images, and what is damaged for itself."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from darcnn.runtime.cli import main
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.readers.ome_zarr_images import list_zarr_images


def write_image(folder: Path, value: int = 0) -> None:
    group = zarr.create_group(folder, zarr_format=2)
    array = group.create_array("0", shape=(40, 50), dtype="uint8")
    array[:] = value
    group.attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": [{"name": axis, "type": "space"} for axis in "yx"],
            "datasets": [
                {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0]}]}
            ],
        }
    ]


def write_plate(folder: Path, wells: list[str], *, version: str) -> Path:
    def note(group: zarr.Group, **attributes: object) -> None:
        if version == "0.4":
            group.attrs.update(attributes)
        else:
            group.attrs["ome"] = {"version": version, **attributes}

    form = 2 if version == "0.4" else 3
    note(
        zarr.create_group(folder, zarr_format=form),
        plate={"wells": [{"path": well} for well in [*wells, "Z/9"]]},
    )
    for number, well in enumerate(wells):
        note(
            zarr.create_group(folder / well, zarr_format=form),
            well={"images": [{"path": "0"}, {"path": "1"}]},
        )
        for field in "01":
            write_image(folder / well / field, value=number)
    return folder


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plate_stands_for_the_fields_of_its_wells(tmp_path: Path, version: str) -> None:
    plate = write_plate(tmp_path / "p.ome.zarr", ["A/1", "B/12"], version=version)
    fields = [plate / well / field for well in ("A/1", "B/12") for field in "01"]
    assert list_zarr_images(plate) == [*fields, plate / "Z/9"]
    assert list_zarr_images(plate / "A/1") == fields[:2]
    assert list_zarr_images(plate / "A/1/0") == fields[:1]
    assert [make_slide_name(field) for field in fields[::3]] == ["p-A-1-0", "p-B-12-1"]


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_converted_file_stands_for_its_images(tmp_path: Path, is_listed: bool) -> None:
    group = zarr.create_group(tmp_path / "c.zarr", zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    names = ["scan", "0"] if is_listed else ["0", "1"]
    for name in names:
        write_image(tmp_path / "c.zarr" / name)
    if is_listed:
        zarr.create_group(tmp_path / "c.zarr" / "OME", zarr_format=2).attrs["series"] = names
    assert list_zarr_images(tmp_path / "c.zarr") == [tmp_path / "c.zarr" / name for name in names]


def test_a_converted_file_of_one_image_stays_what_it_is(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "c.zarr", zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    write_image(tmp_path / "c.zarr" / "0")
    assert list_zarr_images(tmp_path / "c.zarr") == [tmp_path / "c.zarr"]
    assert make_slide_name(tmp_path / "c.zarr" / "scan.tif") == "scan"


def test_what_is_damaged_stands_for_itself(tmp_path: Path) -> None:
    endless = zarr.create_group(tmp_path / "a.zarr", zarr_format=2)
    endless.attrs["plate"] = {"wells": [{"path": "."}, {"path": "."}]}
    assert list_zarr_images(tmp_path / "a.zarr") == [tmp_path / "a.zarr"] * 2
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / ".zattrs").write_text('{"plate": 3}')
    (tmp_path / "b.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    assert list_zarr_images(tmp_path / "b.zarr") == [tmp_path / "b.zarr"]
    assert list_zarr_images(tmp_path / "nowhere.zarr") == [tmp_path / "nowhere.zarr"]
    assert list_zarr_images("nowhere://a/b.zarr") == ["nowhere://a/b.zarr"]


@pytest.mark.slow
def test_a_plate_is_run_field_by_field(tmp_path: Path) -> None:
    plate = write_plate(tmp_path / "p.ome.zarr", ["A/1"], version="0.4")
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [str(plate), "--model", "nuclei-fluorescence", "--out", str(out)])
    assert result.exit_code == 1, result.output  # one well is missing
    assert "Z/9" in result.stderr
    assert sorted(entry.name for entry in out.iterdir()) == ["p-A-1-0", "p-A-1-1", "summary.csv"]
    lines = (out / "summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["p-A-1-0", "p-A-1-1", "p-Z-9"]
    assert np.array_equal(
        zarr.open_array(out / "p-A-1-0" / "labels.ome.zarr" / "0", mode="r")[:], np.zeros((40, 50))
    )
