"""Each slide has a folder of results of its own, whatever the files are called."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.errors import UsageError
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.sinks.result_folder import make_folder_name
from darcnn.runtime.slide_list import find_unread, place_results

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
    for name in ("a.png", "b.ND2", "c.lif", "d.vsi", "e.npy", "notes.txt"):
        (tmp_path / name).touch()
    (line,) = find_unread([str(tmp_path), str(tmp_path / "b.ND2"), "https://a.org/b.zarr"])
    assert "left out, for they are not read: b.ND2, c.lif, d.vsi and 1 more; export OME-TIFF" in line
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
