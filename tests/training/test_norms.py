"""Frozen normalisation: folded into its convolution, and unfolded again."""

from __future__ import annotations

import copy

import torch
from torch import nn

from darcnn.training.model.network import Darcnn
from darcnn.training.model.norms import normed_convolutions


def test_every_normalisation_of_a_backbone_has_its_convolution(network: Darcnn) -> None:
    encoder = network.shared_encoder
    found = list(normed_convolutions(encoder, "shared_encoder."))
    norms = [module for module in encoder.modules() if hasattr(module, "running_var")]
    assert [pair.norm for pair in found] == norms
    for pair in found:
        assert network.get_submodule(pair.path) is pair.convolution
        assert len(pair.scale()) == pair.convolution.out_channels


def test_folding_leaves_the_features_as_they_are(network: Darcnn, small_tiles: torch.Tensor) -> None:
    folded = copy.deepcopy(network).eval()
    for pair in normed_convolutions(folded):
        pair.fold()
    assert not any(hasattr(module, "running_var") for module in folded.modules())
    with torch.no_grad():
        for ours, theirs in zip(
            folded.shared_encoder(folded.trunk(small_tiles)),
            network.eval().shared_encoder(network.trunk(small_tiles)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_unfolding_what_was_folded_gives_the_convolution_and_the_shift_back(network: Darcnn) -> None:
    folded = copy.deepcopy(network)
    for pair in normed_convolutions(folded):
        pair.fold()
    again = copy.deepcopy(network)
    for pair in normed_convolutions(again):
        nn.init.zeros_(pair.convolution.weight)
        pair.norm.get_buffer("bias").zero_()
    for pair in normed_convolutions(again):
        convolution = folded.get_submodule(pair.path)
        pair.unfold(convolution.weight, convolution.bias)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
