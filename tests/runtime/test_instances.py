"""Objects of one image: chosen by masks, numbers or slices, never beyond the image."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.instances import Instances


def squares(n: int, shape: tuple[int, int] = (40, 50)) -> Instances:
    low = np.array([[3 * k, 2 * k] for k in range(n)], np.int64).reshape(-1, 2)
    rings = [np.array([[x, y], [x + 2, y], [x + 2, y + 2], [x, y + 2], [x, y]], float) for x, y in low]
    return Instances(
        shape=shape,
        boxes=np.concatenate([low, low + 2], axis=1).astype(np.float32),
        scores=np.linspace(0.9, 0.5, n, dtype=np.float32),
        origins=low,
        masks=tuple(np.ones((2, 2), np.bool_) for _ in range(n)),
        outlines=tuple(rings),
        truncated=np.zeros(n, np.bool_),
    )


@given(
    st.integers(0, 8).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.booleans(), min_size=n, max_size=n))
    )
)
def test_masks_numbers_and_lists_choose_the_same(chosen: tuple[int, list[bool]]) -> None:
    n, keep = chosen
    found, rows = squares(n), [row for row, kept in enumerate(keep) if kept]
    for one in (keep, np.array(keep, np.bool_), rows, np.array(rows, np.int32)):
        assert found.select(one).scores.tolist() == found.scores[rows].tolist()


def test_a_slice_chooses_too() -> None:
    found = squares(5)
    assert found.select(slice(1, 3)).scores.tolist() == found.scores[1:3].tolist()


@pytest.mark.parametrize("keep", [[True], np.ones(7, np.bool_), [0.7, 1.9], np.ones((5, 1), np.bool_), 3])
def test_what_chooses_nothing_is_refused(keep: object) -> None:
    with pytest.raises(ShapeError, match="chooses none of 5 objects"):
        squares(5).select(keep)  # type: ignore[arg-type]


def test_objects_beyond_the_image_are_refused() -> None:
    with pytest.raises(ShapeError, match="beyond the image of 4 x 40 px"):
        Instances.concatenate((40, 4), [squares(2)])


def test_instances_are_compared_by_identity() -> None:
    found = squares(3)
    assert found == found
    assert found != copy.deepcopy(found)
    assert found in [squares(3), found]
    assert len({found, found}) == 1
