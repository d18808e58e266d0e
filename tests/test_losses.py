"""Losses against the original's numbers and against loops that say what they mean."""

import math

import pytest
import torch
import torch.nn.functional as F

from torch_function import (
    LOSSES,
    NormalizationLayer,
    batch_based_classification_loss,
    caption_aware_classification_loss,
    composition_losses,
    draw_negatives,
    soft_triplet_loss,
    text_prediction_loss,
)

from . import golden


def golden_triplets():
    features = torch.tensor(golden.ARRAYS["soft_triplet/features"], requires_grad=True)      # (8, 16)
    negatives = [[k for anchor, _, k in golden.VALUES["soft_triplet"]["triplets"] if anchor == i] for i in range(8)]
    return features, torch.tensor(negatives)


def test_soft_triplet_value_and_half_gradient_are_the_originals():
    features, negatives = golden_triplets()
    loss = soft_triplet_loss(features[:4], features[4:], negatives)
    assert loss.item() == pytest.approx(golden.VALUES["soft_triplet"]["loss"], rel=1e-4)
    loss.backward()
    torch.testing.assert_close(features.grad, torch.tensor(golden.ARRAYS["soft_triplet/grad"]), rtol=1e-4, atol=1e-6)


def test_soft_triplet_gradient_is_half_of_the_losss():
    features, negatives = golden_triplets()
    soft_triplet_loss(features[:4], features[4:], negatives).backward()
    copy = features.detach().clone().requires_grad_()
    terms = [F.softplus((copy[i] - copy[(i + 4) % 8]).square().sum() - (copy[i] - copy[k]).square().sum())
             for i in range(8) for k in negatives[i]]
    torch.stack(terms).mean().backward()
    torch.testing.assert_close(2 * features.grad, copy.grad)


@pytest.mark.parametrize("batch", [2, 3, 7, 33])
def test_soft_triplet_matches_a_loop(batch):
    query, target = torch.randn(2, batch, 5, generator=torch.Generator().manual_seed(batch))
    negatives = draw_negatives(batch)
    rows, total = torch.cat([query, target]).tolist(), 0.0
    for i, anchor in enumerate(rows):
        for k in negatives[i].tolist():
            assert k % batch != i % batch                                       # neither itself nor its twin
            total += math.log1p(math.exp(math.dist(anchor, rows[(i + batch) % (2 * batch)]) ** 2
                                         - math.dist(anchor, rows[k]) ** 2))
    assert soft_triplet_loss(query, target, negatives).item() == pytest.approx(total / negatives.numel(), rel=1e-5)


def test_negatives_are_three_distinct_rows_and_every_allowed_row_is_drawn():
    torch.manual_seed(0)
    assert draw_negatives(2).shape == (4, 2)                                    # only two other rows exist
    drawn = torch.stack([draw_negatives(4) for _ in range(200)])                # (200, 8, 3)
    assert all(len(set(row)) == 3 for row in drawn.flatten(0, 1).tolist())
    for i in range(8):
        assert set(drawn[:, i].flatten().tolist()) == {k for k in range(8) if k % 4 != i % 4}


def test_classification_matches_a_loop():
    query, target = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for i in range(5):
        scores = [float(query[i] @ target[j]) for j in range(5)]
        expected += math.log(sum(map(math.exp, scores))) - scores[i]
    assert batch_based_classification_loss(query, target).item() == pytest.approx(expected / 5, rel=1e-5)


def test_caption_aware_classification_matches_a_loop():
    query, target = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    goals = [7, 2, 7, 3, 2]
    expected = 0.0
    for i in range(5):
        scores = [math.exp(float(query[i] @ target[j])) for j in range(5)]
        expected -= math.log(sum(scores[j] for j in range(5) if goals[j] == goals[i]) / sum(scores))
    found = composition_losses({"query": query, "target": target}, "caption_aware_classification",
                               target_labels=torch.tensor(goals))
    assert found["total training loss"].item() == pytest.approx(expected / 5, rel=1e-5)
    plain = batch_based_classification_loss(query, target)
    torch.testing.assert_close(caption_aware_classification_loss(query, target), plain)
    assert found["total training loss"] < plain


def test_a_predicted_text_points_at_its_text_or_one_that_says_the_same_with_half_of_the_probability():
    """Scores are 10 cos: (10, 0, 10), (10, 0, 10), (0, 10, 0); right are the texts 0 and 2, 1, and 0 and 2. The first
    row is done."""
    text = torch.tensor([[1.0, 0], [0, 3], [2, 0]], requires_grad=True)
    told = torch.tensor([[5.0, 0], [1, 0], [0, 1]], requires_grad=True)
    both, one = math.log(2 * math.exp(10) + 1), math.log(math.exp(10) + 2)
    assert both - math.log(2 * math.exp(10)) < math.log(2)
    expected = (0 + (both - 0 - math.log(2)) + (one - math.log(2) - math.log(2))) / 3
    loss = text_prediction_loss(told, text, torch.tensor([7, 3, 7]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert text.grad is None and told.grad.any(1).tolist() == [False, True, True]


def test_normalization_scales_unit_rows_by_one_learned_number():
    layer = NormalizationLayer()
    rows = layer(torch.tensor([[3.0, 4.0], [0.0, 0.1]]))
    torch.testing.assert_close(rows, torch.tensor([[2.4, 3.2], [0.0, 4.0]]))
    assert layer.norm_s.requires_grad and layer.norm_s.shape == (1,)


@pytest.mark.parametrize("loss", LOSSES)
def test_total_weighs_the_terms_that_are_there(loss):
    named = {name: torch.randn(4, 6) for name in ("query", "target", "image", "decoded_image", "text", "decoded_text",
                                                  "source", "rotated_back", "text_prediction")}
    named["text_labels"] = torch.arange(4)
    losses = composition_losses(named, loss)
    assert list(losses) == [loss, "L2_loss", "L2_loss_text", "rot_sym_loss", "told_text_loss", "total training loss"]
    expected = (losses[loss] + 0.1 * losses["L2_loss"] + 0.1 * losses["L2_loss_text"] + 0.01 * losses["rot_sym_loss"]
                + losses["told_text_loss"])
    torch.testing.assert_close(losses["total training loss"], expected)
    assert losses["L2_loss"].item() == pytest.approx((named["image"] - named["decoded_image"]).square().mean().item())
    alone = composition_losses({name: named[name] for name in ("query", "target")}, loss)
    assert list(alone) == [loss, "total training loss"]
