"""Mistake 6: what moves and what stays in each stage, and which loss reaches which part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from darcnn.training.adapt.difference import difference_loss
from darcnn.training.checkpoint import CheckpointInfo
from darcnn.training.config import Recipe
from darcnn.training.data.batches import Batch
from darcnn.training.loop import LoopPlan, train
from darcnn.training.model.network import Darcnn
from darcnn.training.steps import adapt_losses, learning_parts, refine_losses, source_losses

SOURCE_TERMS = {"rpn_objectness", "rpn_box", "head_objectness", "head_box", "head_mask"}

LEARNING = {
    "source": {"shared_encoder", "proposer", "source_heads"},
    "adapt": {
        "shared_encoder", "source_encoder", "target_encoder", "proposer", "source_heads", "projection"
    },
    "refine": {"shared_encoder", "target_encoder", "proposer", "target_heads"},
}  # fmt: skip

KEEP = 0.75  # of M^t in each step of the slow average

# Boxes of 128 px and more are pooled from P4 and P5. A tile of 128 px has none, so that the heads do not
# see what a private encoder adds to those two levels last.
_UNSEEN = {f"pyramid.layer_blocks.{level}.0.{kind}" for level in (2, 3) for kind in ("weight", "bias")}
# L_diff centres its rows, L_target compares regions with their mean and L_sim images with each other:
# none of them sees a constant that is added to a whole level.
_CONSTANTS = {f"pyramid.layer_blocks.{level}.0.bias" for level in range(4)}
NO_GRADIENT = {
    "source": set(),
    "adapt": {f"source_encoder.{name}" for name in _CONSTANTS & _UNSEEN}
    | {f"target_encoder.{name}" for name in _CONSTANTS}
    | {f"projection.{level}.bias" for level in range(4)},
    "refine": {f"target_encoder.{name}" for name in _UNSEEN},
}


@dataclass(frozen=True)
class Step:
    """One step of a stage: the tensors before and after, and each term's largest gradient by name."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    gradients: dict[str, dict[str, float]]

    @property
    def changed(self) -> set[str]:
        return {name for name, tensor in self.after.items() if not torch.equal(tensor, self.before[name])}

    def reached(self, *terms: str) -> set[str]:
        """Return the parts to which the gradient of `terms` gets, though every part asks for one."""
        return parts_of(name for term in terms for name in self.gradients[term])


def parts_of(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def steps(
    _imagenet_network: Darcnn,
    make_batch: Callable[..., Batch],
    make_target_tiles: Callable[[int, int], Tensor],
    recipe: Recipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Step]:
    """One step of each stage with the real losses and the real loop, on tiles of 128 px."""
    batch = make_batch(128, 20.0, 90.0)  # small and large objects, so that the heads see P2 and P3
    unlabelled = make_target_tiles(128, 2)

    def losses_of(network: Darcnn, stage: str) -> dict[str, Tensor]:
        if stage == "source":
            return source_losses(network, batch)
        if stage == "refine":
            return refine_losses(network, batch)
        return adapt_losses(network, batch, unlabelled, recipe.adapt_stage, 0.5)

    return {
        stage: _take(_imagenet_network, stage, losses_of, recipe, tmp_path_factory.mktemp(stage))
        for stage in LEARNING
    }


def _take(
    start: Darcnn,
    stage: str,
    losses_of: Callable[[Darcnn, str], dict[str, Tensor]],
    recipe: Recipe,
    folder: Path,
) -> Step:
    network = copy.deepcopy(start).train()
    # every part but the trunk asks for gradients: only the graph, not a flag, may hold one back
    asking = [part for name, part in network.named_children() if name != "trunk"]
    named = dict(zip(_names(network, asking), network.select_trainable(*asking), strict=True))
    torch.manual_seed(0)
    gradients = {
        term: _gradients(loss, named) for term, loss in _grouped(losses_of(network, stage), stage).items()
    }
    info = CheckpointInfo(stage, 0, False, recipe)
    plan = LoopPlan(stage, 1, learning_rate=1e-3, warm_up=1, folder=folder, info=info)
    after_step = (lambda: network.follow_source_heads(KEEP)) if stage == "adapt" else (lambda: None)
    before = _copy(network)
    train(network, plan, lambda step: step, lambda number, step: losses_of(network, stage), after_step)
    return Step(before, _copy(network), gradients)


def _names(network: nn.Module, parts: list[nn.Module]) -> list[str]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for part in parts for parameter in part.parameters()]


def _grouped(losses: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
    """Return the terms of stage 1 one by one, those of the other stages by the part that makes them."""
    assert set(losses) - {"similarity", "difference", "consistency"} == SOURCE_TERMS
    if stage == "adapt":
        return losses
    groups = {"rpn": 0.0, "head": 0.0}
    return {group: sum(loss for n, loss in losses.items() if n.startswith(group)) for group in groups}  # type: ignore[misc]


def _gradients(loss: Tensor, named: dict[str, nn.Parameter]) -> dict[str, float]:
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    largest = {n: g.abs().max().item() for n, g in zip(named, found, strict=True) if g is not None}
    return {name: value for name, value in largest.items() if value > 0.0}


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def test_one_step_of_the_source_stage_changes_e_c_r_and_m_s_only(steps: dict[str, Step]) -> None:
    assert parts_of(steps["source"].changed) == LEARNING["source"]


def test_one_step_of_adaptation_moves_m_t_by_the_slow_average_only(steps: dict[str, Step]) -> None:
    step = steps["adapt"]
    assert parts_of(step.changed) == LEARNING["adapt"] | {"target_heads"}
    for name in (n for n in step.after if n.startswith("target_heads.")):
        theirs = step.after["source_heads." + name.removeprefix("target_heads.")]
        torch.testing.assert_close(step.after[name], KEEP * step.before[name] + (1 - KEEP) * theirs)


def test_one_step_of_refinement_leaves_e_p_s_and_m_s_alone(steps: dict[str, Step]) -> None:
    assert parts_of(steps["refine"].changed) == LEARNING["refine"]


@pytest.mark.parametrize("stage", LEARNING)
def test_trunk_and_frozen_normalisations_never_change(
    steps: dict[str, Step], network: Darcnn, stage: str
) -> None:
    changed = steps[stage].changed
    assert "trunk" not in parts_of(changed)
    # what is in the state but no parameter are the statistics and scales of normalisations
    assert changed <= {name for name, _ in network.named_parameters()}
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())


@pytest.mark.parametrize("stage", LEARNING)
def test_every_parameter_that_learns_gets_a_gradient_and_changes(
    steps: dict[str, Step], network: Darcnn, stage: str
) -> None:
    step = steps[stage]
    learning = {name for name, _ in network.named_parameters() if name.split(".")[0] in LEARNING[stage]}
    total: dict[str, float] = {}
    for gradients in step.gradients.values():
        for name, value in gradients.items():
            total[name] = max(total.get(name, 0.0), value)
    silent = {name for name in learning if total.get(name, 0.0) < 1e-8}
    assert silent <= NO_GRADIENT[stage]
    assert learning - step.changed <= NO_GRADIENT[stage]


@pytest.mark.parametrize("stage", LEARNING)
def test_only_the_parts_that_learn_ask_for_gradients(network: Darcnn, stage: str) -> None:
    yielded = list(network.select_trainable(*learning_parts(network, stage)))
    asking = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert parts_of(asking) == LEARNING[stage]
    assert len(yielded) == len(asking)


def test_a_few_small_parts_of_those_that_stage_2_teaches(network: Darcnn) -> None:
    yielded = list(network.select_trainable(*learning_parts(network, "refine", few=True)))
    asking = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(yielded) == len(asking)
    assert parts_of(asking) == {"target_encoder", "proposer", "target_heads"}
    branch = sum(p.numel() for part in network.target_branch() for p in part.parameters())
    assert 0.02 < sum(parameter.numel() for parameter in yielded) / branch < 0.06


def test_l_target_reaches_the_target_encoder_only(steps: dict[str, Step]) -> None:
    assert steps["adapt"].reached("consistency") == {"target_encoder"}


def test_l_diff_reaches_the_three_encoders_only(steps: dict[str, Step]) -> None:
    assert steps["adapt"].reached("difference") == {"shared_encoder", "source_encoder", "target_encoder"}


def test_l_sim_reaches_the_shared_encoder_and_the_projection_only(steps: dict[str, Step]) -> None:
    assert steps["adapt"].reached("similarity") == {"shared_encoder", "projection"}


def test_l_source_never_reaches_the_target_encoder_or_heads(steps: dict[str, Step]) -> None:
    step = steps["adapt"]
    assert step.reached(*SOURCE_TERMS) == {"shared_encoder", "source_encoder", "proposer", "source_heads"}
    assert step.reached("rpn_objectness", "rpn_box") == {"shared_encoder", "proposer"}


@pytest.mark.parametrize("term", ["head_objectness", "head_box", "head_mask"])
def test_heads_take_proposals_as_numbers(steps: dict[str, Step], term: str) -> None:
    assert steps["adapt"].reached(term) == {"source_encoder", "source_heads"}


def test_source_stage_learns_through_one_encoder(steps: dict[str, Step]) -> None:
    assert steps["source"].reached("rpn") == {"shared_encoder", "proposer"}
    assert steps["source"].reached("head") == {"shared_encoder", "source_heads"}


def test_refinement_learns_through_the_target_branch(steps: dict[str, Step]) -> None:
    assert steps["refine"].reached("rpn") == {"shared_encoder", "proposer"}
    assert steps["refine"].reached("head") == {"target_encoder", "target_heads"}


def test_target_heads_stay_where_the_slow_average_is_switched_off(network: Darcnn) -> None:
    with torch.no_grad():
        for parameter in network.source_heads.parameters():
            parameter.add_(1.0)
    before = _copy(network)
    network.follow_source_heads(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("keep", "stays"), [(1.0, True), (0.75, False)])
def test_the_target_encoder_follows_the_source_encoder_where_asked(
    network: Darcnn, keep: float, stays: bool
) -> None:
    with torch.no_grad():
        for parameter in network.source_encoder.parameters():
            parameter.add_(1.0)
    before = _copy(network)
    network.follow_source_encoder(keep)
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    own = {f"target_encoder.{name}" for name, _ in network.target_encoder.named_parameters()}
    assert moved == (set() if stays else own)
    for name in moved:
        twin = before[name.replace("target_encoder", "source_encoder")]
        assert torch.allclose(network.state_dict()[name], torch.lerp(before[name], twin, 1.0 - keep))


def test_alpha_beta_and_gamma_weigh_the_terms_of_equation_1(
    network: Darcnn, small_batch: Batch, small_tiles: Tensor, recipe: Recipe
) -> None:
    def losses(alpha: float, beta: float, gamma: float) -> dict[str, Tensor]:
        torch.manual_seed(0)  # RPN and heads sample
        weights = replace(recipe.adapt_stage, beta=beta, gamma=gamma)
        with torch.no_grad():
            return adapt_losses(network, small_batch, small_tiles, weights, alpha)

    whole, part = losses(1.0, 1.0, 1.0), losses(0.5, 0.25, 0.1)
    assert set(whole) == SOURCE_TERMS | {"similarity", "difference", "consistency"}
    for name, weight in (("similarity", 0.5), ("difference", 0.25), ("consistency", 0.1)):
        assert whole[name].item() > 0
        assert part[name].item() == pytest.approx(weight * whole[name].item(), rel=1e-3)
    for name in SOURCE_TERMS:
        assert part[name].item() == pytest.approx(whole[name].item(), rel=1e-3)


def test_l_diff_pairs_the_encoders_of_one_domain(
    network: Darcnn, small_batch: Batch, small_tiles: Tensor, recipe: Recipe
) -> None:
    with torch.no_grad():
        for number, encoder in enumerate((network.source_encoder, network.target_encoder), start=1):
            for parameter in encoder.parameters():  # no two encoders alike
                parameter.mul_(1.0 + 0.1 * number * torch.rand_like(parameter))
        losses = adapt_losses(network, small_batch, small_tiles, recipe.adapt_stage, 1.0)
        domains = ((small_batch.images, network.source_encoder), (small_tiles, network.target_encoder))
        expected = sum(
            difference_loss(
                network.shared_encoder(network.trunk(images)), encoder(network.trunk(images))
            ).item()
            for images, encoder in domains
        )
    assert losses["difference"].item() == pytest.approx(recipe.adapt_stage.beta * expected, rel=1e-3)


def test_l_target_of_a_batch_is_the_mean_over_its_images(
    network: Darcnn, small_batch: Batch, small_tiles: Tensor, recipe: Recipe
) -> None:
    tiles = torch.stack([small_tiles[0], 255.0 - small_tiles[1]])  # two backgrounds as different as can be

    def consistency(images: Tensor) -> float:
        with torch.no_grad():
            losses = adapt_losses(network, small_batch, images, recipe.adapt_stage, 1.0)
        return losses["consistency"].item()

    assert consistency(tiles) == pytest.approx(
        (consistency(tiles[:1]) + consistency(tiles[1:])) / 2, rel=1e-3
    )


def test_consistency_is_zero_where_no_proposal_is_good_enough(
    network: Darcnn, small_batch: Batch, small_tiles: Tensor, recipe: Recipe
) -> None:
    with torch.no_grad():
        network.proposer.head.cls_logits.bias.fill_(-5.0)  # objectness below 0.5 everywhere
    list(network.select_trainable(*learning_parts(network, "adapt")))
    losses = adapt_losses(network, small_batch, small_tiles, recipe.adapt_stage, 1.0)
    assert losses["consistency"].item() == 0.0
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_a_tile_without_objects_teaches_background(network: Darcnn, small_batch: Batch) -> None:
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
        "doubtful": torch.zeros(0, 4),
        "seed": torch.tensor(0),
    }
    batch = Batch(small_batch.images, [empty, small_batch.targets[1]])
    with torch.no_grad():
        losses = refine_losses(network, batch)
        nothing = refine_losses(network, Batch(batch.images[:1], [empty]))
    assert all(torch.isfinite(loss) for loss in (*losses.values(), *nothing.values()))
    assert nothing["head_mask"].item() == nothing["head_box"].item() == 0.0


def test_losses_of_heads_in_evaluation_mode_are_refused(network: Darcnn, small_batch: Batch) -> None:
    network.eval()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        source_losses(network, small_batch)
