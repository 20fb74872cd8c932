"""Each slide has a folder of results of its own, whatever the files are called."""

import uuid
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.sinks.result_folder import make_folder_name
from darcnn.runtime.slide_list import find_unread, list_slides, place_results

names = st.text("aAb.", min_size=1, max_size=2).filter(lambda name: name.strip("."))


@given(st.lists(st.lists(names, min_size=1, max_size=4), max_size=6))
def test_no_result_lies_where_another_does_or_among_its_files(parts: list[list[str]]) -> None:
    slides = list(dict.fromkeys(Path("/data", *folders[:-1], f"{folders[-1]}.svs") for folders in parts))
    try:
        below = place_results(slides)
    except UsageError:
        return
    folders = [
        str(folder / make_folder_name(make_slide_name(slide))).casefold()
        for folder, slide in zip(below, slides, strict=True)
    ]
    assert len(set(folders)) == len(folders)
    assert not any(one != other and Path(one) in Path(other).parents for one in folders for other in folders)


def test_folders_are_kept_only_where_names_clash_and_as_many_as_it_takes() -> None:
    slides = [Path("/x/p1/A1/f.tif"), Path("/x/p2/A1/f.tif"), Path("/x/p1/A2/f.tif"), Path("/x/p1/g.tif")]
    assert place_results(slides) == (Path("p1/A1"), Path("p2/A1"), Path("p1/A2"), Path())
    assert place_results(slides[:1]) == (Path(),)
    assert place_results(["s3://b/1/f.ome.zarr", "s3://b/2/f.ome.zarr"]) == (Path("1"), Path("2"))
    assert place_results(["s3://b/A:1/f.ome.zarr", Path("/2/f.tif")]) == (Path("A_1"), Path("2"))


def test_images_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.OIR", "c.oib", "d.vsi", "e.npy", "notes.txt"):
        (tmp_path / name).touch()
    (line,) = find_unread([str(tmp_path), str(tmp_path / "b.OIR"), "https://a.org/b.zarr"])
    assert "left out, for they are not read: b.OIR, c.oib, d.vsi and 1 more; export OME-TIFF" in line
    assert not list(find_unread([str(tmp_path / "a.png")]))


@pytest.mark.parametrize(
    ("slides", "message"),
    [
        (["/x/f.tif", "/x/F.png"], "/x/f.tif and /x/F.png would both be written there"),
        (["/x/A/f.tif", "/x/B/f.tif", "/y/a.tif"], "would lie among those of /y/a.tif"),
    ],
)
def test_what_folders_cannot_tell_apart_is_an_error(slides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        place_results([Path(slide) for slide in slides])


def test_folders_that_a_quoted_pattern_matches_stand_for_their_images(tmp_path):
    for name in ("A1/a.png", "A2/b.png", "A2/notes.txt", "notes/d.txt", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_slides([str(tmp_path / "*")])] == ["a.png", "b.png", "c.png"]
    with pytest.raises(InputError, match="matches folders without images"):
        list_slides([str(tmp_path / "n*")])


def test_packed_volumes_and_bigtiffs_of_ome_are_images_of_a_folder(tmp_path):
    for name in ("a.mrc", "b.mrc.gz", "c.rec.bz2", "d.ome.tf2", "e.txt.gz"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_slides([str(tmp_path)])] == [
        "a.mrc",
        "b.mrc.gz",
        "c.rec.bz2",
        "d.ome.tf2",
    ]


def test_links_in_a_circle_and_names_beyond_measure_are_named_when_they_are_opened(tmp_path):
    (tmp_path / "a.tif").symlink_to(tmp_path / "b.tif")
    (tmp_path / "b.tif").symlink_to(tmp_path / "a.tif")
    assert len(list_slides([str(tmp_path / "a.tif"), "good.tif"])) == 2
    with pytest.raises(InputError, match="cannot be looked at"):
        list_slides(["a" * 300 + ".tif"])


def test_a_plate_without_images_is_told(tmp_path):
    zarr.create_group(tmp_path / "p.zarr", zarr_format=2).attrs["plate"] = {"wells": []}
    with pytest.raises(InputError, match="lists no images"):
        list_slides([str(tmp_path / "p.zarr")])


def test_an_image_in_several_files_of_a_folder_is_listed_once(tmp_path):
    write_positions(tmp_path, [["a_C0.ome.tif", "a_C1.ome.tif"], ["b.ome.tif"]])
    assert [path.name for path in list_slides([str(tmp_path)])] == ["a_C0.ome.tif", "b.ome.tif"]


def write_positions(folder, files):
    """Write OME-TIFFs, each of which knows of all: one image for each list of files, a channel in each."""
    uuids = {name: f"urn:uuid:{uuid.uuid4()}" for names in files for name in names}
    images = ""
    for number, names in enumerate(files):
        places = "".join(
            f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1">'
            f'<UUID FileName="{name}">{uuids[name]}</UUID></TiffData>'
            for c, name in enumerate(names)
        )
        channels = "".join(f'<Channel ID="Channel:{number}:{c}"/>' for c in range(len(names)))
        images += (
            f'<Image ID="Image:{number}"><Pixels ID="Pixels:{number}" DimensionOrder="XYCZT" Type="uint16"'
            f' SizeX="40" SizeY="30" SizeC="{len(names)}" SizeZ="1" SizeT="1">{channels}{places}'
            "</Pixels></Image>"
        )
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    for value, (name, own) in enumerate(uuids.items(), start=1):
        xml = f'<?xml version="1.0"?><OME xmlns="{schema}" UUID="{own}">{images}</OME>'
        pixels = np.full((30, 40), 100 * value, np.uint16)
        tifffile.imwrite(folder / name, pixels, description=xml, metadata=None)


def test_of_positions_in_several_files_each_file_is_its_own(tmp_path):
    write_positions(tmp_path, [["Pos0.ome.tif"], ["Pos1.ome.tif"], ["Pos2.ome.tif"]])
    slides = list_slides([str(tmp_path)])
    found = []
    for path in slides:
        with open_source(path) as reader:
            found.append(int(reader.read(Region(0, 0, 1, 1), level=0)[0, 0, 0]))
    assert found == [100, 200, 300]
