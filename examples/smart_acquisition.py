"""Find cells at low magnification, then visit the best of them at high magnification, in one acquisition.

    python examples/smart_acquisition.py       # a simulated microscope, nothing to set up
    python examples/smart_acquisition.py --config scope.cfg --pixel-size 0.65 --field 665 665 \\
        --low Objective,Label,10x --high Objective,Label,60x

Needs `pip install 'darcnn[micromanager]'`, and for a real microscope its Micro-Manager configuration and
device adapters (`mmcore install`). Writes `smart_acquisition.png`: the survey with the visits numbered, and
below it what was seen at each. If the stage goes to the wrong side of an object, pass --axes -1 1, 1 -1 or
-1 -1, or --turned.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from useq import GridRowsColumns, MDAEvent, MDASequence

from darcnn.runtime.live import CameraAxes, LiveSegmenter, MosaicGrid
from darcnn.runtime.live.micromanager import SmartAcquisition

IMAGES = Path(__file__).resolve().parent.parent / "tests" / "data"

Frames = list[tuple[MDAEvent, NDArray[Any]]]


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True), help="Micro-Manager configuration.")
@click.option("--model", default="nuclei-fluorescence", show_default=True)
@click.option(
    "--low", default="Turret,Label,10x", show_default=True, help="Device, property and value of the survey."
)
@click.option("--high", default="Turret,Label,20x", show_default=True, help="The same for the visits.")
@click.option("--pixel-size", type=float, default=1.0, show_default=True, help="Micrometres, survey.")
@click.option(
    "--field", type=(float, float), default=(192.0, 192.0), show_default=True, help="Micrometres, survey."
)
@click.option("--rows", type=click.IntRange(1), default=2, show_default=True)
@click.option("--columns", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--best", type=click.IntRange(1), default=8, show_default=True, help="Objects to visit at most."
)
@click.option("--axes", type=(int, int), default=(1, 1), show_default=True)
@click.option("--turned", is_flag=True, help="The camera is turned by a quarter.")
@click.option("--out", type=click.Path(path_type=Path), default="smart_acquisition.png", show_default=True)
def main(
    config: Path | None,
    model: str,
    low: str,
    high: str,
    pixel_size: float,
    field: tuple[float, float],
    rows: int,
    columns: int,
    best: int,
    axes: tuple[int, int],
    turned: bool,
    out: Path,
) -> None:
    """Survey a grid of fields, then visit the best objects."""
    logging.getLogger("pymmcore-plus").setLevel(logging.ERROR)
    core = _open(config)
    camera = CameraAxes(*axes, is_turned=turned)
    fields = GridRowsColumns(rows=rows, columns=columns, fov_width=field[0], fov_height=field[1])
    x, y = core.getXYPosition()
    survey = [
        event.model_copy(update={"properties": [tuple(low.split(","))]})
        for event in MDASequence(stage_positions=[(x, y)], grid_plan=fields)
    ]
    visit = MDAEvent(properties=[tuple(high.split(","))])
    frames: Frames = []

    @core.mda.events.frameReady.connect
    def keep(image: NDArray[Any], event: MDAEvent) -> None:
        frames.append((event, image.copy()))
        click.echo(f"{event.pos_name or 'survey':<10} {event.x_pos:8.1f} {event.y_pos:8.1f} um")

    with (
        LiveSegmenter(model, queue=rows * columns) as live,
        SmartAcquisition(
            core, live, survey, visit=visit, best=best, pixel_size_um=pixel_size, axes=camera
        ) as smart,
    ):
        core.mda.run(smart.events())
        click.echo(f"{len(smart.found())} objects on {smart.n_frames} fields, {len(smart.visits)} visited:")
        for number, one in enumerate(smart.visits):
            click.echo(
                f"object {number}   {one.x_um:8.1f} {one.y_um:8.1f} um   score {one.score:.3f}   "
                f"{one.diameter_um:.1f} um   found on {one.frame}"
            )
    _draw(frames, len(survey), pixel_size, camera).save(out)
    click.echo(f"wrote {out}")


def _open(config: Path | None) -> Any:
    if config is None:
        from simulated_microscope import make_specimen, open_microscope

        return open_microscope(make_specimen(IMAGES))
    from pymmcore_plus import CMMCorePlus

    core = CMMCorePlus.instance()
    core.loadSystemConfiguration(config)
    return core


def _draw(frames: Frames, n_survey: int, pixel_size: float, camera: CameraAxes) -> Image.Image:
    """Return the survey, its visits numbered, and below it what was seen at each."""
    survey, visits = frames[:n_survey], frames[n_survey:]
    places = [(event.x_pos or 0.0, event.y_pos or 0.0) for event, _ in survey]
    shape = survey[0][1].shape
    grid = MosaicGrid.from_stage(places, field_px=(shape[0], shape[1]), pixel_size_um=pixel_size, axes=camera)
    top = max(float(np.percentile(image, 99.5)) for _, image in survey)
    picture = Image.new("L", grid.shape[::-1])
    for (left, upper), (_, image) in zip(grid.corners_px, survey, strict=True):
        picture.paste(_grey(image, top), (left, upper))
    picture = picture.resize((2 * picture.width, 2 * picture.height)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    first = camera.to_picture(np.asarray(places[0])) / pixel_size - grid.corners_px[0]
    for number, (event, _) in enumerate(visits):
        at = (
            camera.to_picture(np.asarray([event.x_pos, event.y_pos])) / pixel_size
            - first
            + np.asarray(shape[::-1]) / 2
        )
        draw.ellipse([*(2 * at - 22), *(2 * at + 22)], outline=(255, 190, 0), width=2)
        draw.text(tuple(2 * at + 16), str(number), fill=(255, 190, 0), font_size=16)
    side = picture.width // 4
    sheet = Image.new("RGB", (picture.width, picture.height + side * -(-len(visits) // 4)))
    sheet.paste(picture, (0, 0))
    for number, (_, image) in enumerate(visits):
        seen = _grey(image, top).resize((side, side)).convert("RGB")
        ImageDraw.Draw(seen).text((4, 2), str(number), fill=(255, 190, 0), font_size=16)
        sheet.paste(seen, (side * (number % 4), picture.height + side * (number // 4)))
    return sheet


def _grey(image: NDArray[Any], top: float) -> Image.Image:
    return Image.fromarray(np.clip(image * (255.0 / top), 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
