"""What the frozen stem sees of one to four channels."""

from __future__ import annotations

import pytest
import torch

from darcnn.runtime.errors import ShapeError
from darcnn.training.model.backbone import to_three_channels
from darcnn.training.model.network import Darcnn


def bytes_of(channels: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, channels, 32, 32)).float()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_map_is_linear_and_keeps_the_range(channels: int) -> None:
    a, b = bytes_of(channels), bytes_of(channels)
    assert to_three_channels(a).shape == (2, 3, 32, 32)
    torch.testing.assert_close(to_three_channels(a + b), to_three_channels(a) + to_three_channels(b))
    for level in (0.0, 255.0):
        assert (to_three_channels(torch.full((1, channels, 4, 4), level)) == level).all()


def test_one_and_three_channels_stay_as_they_are() -> None:
    grey, colours = bytes_of(1), bytes_of(3)
    assert torch.equal(to_three_channels(grey), grey.expand(-1, 3, -1, -1))
    assert to_three_channels(colours) is colours


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_each_channel_has_the_same_share(channels: int) -> None:
    shares = [
        to_three_channels(torch.eye(channels)[index].reshape(1, channels, 1, 1)).sum().item()
        for index in range(channels)
    ]
    assert shares == pytest.approx([3 / channels] * channels)


@pytest.mark.parametrize("channels", [0, 5])
def test_other_numbers_of_channels_are_a_mistake(channels: int) -> None:
    with pytest.raises(ShapeError, match=f"{channels} channels"):
        to_three_channels(torch.zeros(1, channels, 4, 4))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_trunk_sees_the_three(network: Darcnn, channels: int) -> None:
    images = bytes_of(channels)
    assert torch.equal(network.trunk(images), network.trunk(to_three_channels(images)))
