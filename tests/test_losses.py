"""The losses in one process: against their definitions with dense matrices, in precision, and in what they refuse."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hfclip.losses import contrastive_loss, sigmoid_loss


# float64 against float64: both sides are sums of some hundred terms of order 1, so 1e-12 is far above rounding
# (2e-16 a term) and far below any missing or doubled term.
EXACT = dict(rtol=1e-12, atol=1e-12)

ALL_DIFFERENT = [3, 1, 4, 0, 9, 2]
REPEATED = [5, 7, 5, 2, 7, 5]
ALL_EQUAL = [1] * 6


def embeddings(num_pairs=6, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, num_pairs, dim, dtype=torch.float64, generator=generator)
    return F.normalize(draw[0], dim=-1), F.normalize(draw[1], dim=-1)


def dense_contrastive(images, texts, scale, ids=None):
    """The definition, pair by pair: cross-entropy of both softmaxes with targets uniform over the positives."""
    num_pairs = len(images)
    ids = range(num_pairs) if ids is None else ids
    logits = scale * images @ texts.T
    total = 0.0
    for i in range(num_pairs):
        positives = [j for j in range(num_pairs) if ids[j] == ids[i]]
        for j in positives:
            total = total - torch.log(logits[i].exp() / logits[i].exp().sum())[j] / len(positives)
            total = total - torch.log(logits[:, i].exp() / logits[:, i].exp().sum())[j] / len(positives)
    return total / (2 * num_pairs)


def dense_sigmoid(images, texts, scale, bias, ids=None):
    num_pairs = len(images)
    ids = range(num_pairs) if ids is None else ids
    total = 0.0
    for i in range(num_pairs):
        for j in range(num_pairs):
            z = 1 if ids[i] == ids[j] else -1
            total = total - torch.log(1 / (1 + torch.exp(-z * (scale * images[i] @ texts[j] + bias))))
    return total / num_pairs


@pytest.mark.parametrize("ids", [None, ALL_DIFFERENT, REPEATED, ALL_EQUAL])
def test_losses_equal_their_definitions(ids):
    images, texts = embeddings()
    group_id = None if ids is None else torch.tensor(ids)
    torch.testing.assert_close(
        contrastive_loss(images, texts, 7.0, group_id=group_id), dense_contrastive(images, texts, 7.0, ids), **EXACT
    )
    torch.testing.assert_close(
        sigmoid_loss(images, texts, 7.0, -3.0, group_id=group_id),
        dense_sigmoid(images, texts, 7.0, -3.0, ids),
        **EXACT,
    )


@pytest.mark.parametrize("ids", [None, REPEATED])
def test_gradients_equal_finite_differences(ids):
    group_id = None if ids is None else torch.tensor(ids)
    images, texts = (embeds.requires_grad_() for embeds in embeddings(dim=3))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    # Defaults of gradcheck (step 1e-6, atol 1e-5, rtol 1e-3) are those of central differences in float64.
    assert torch.autograd.gradcheck(
        lambda *inputs: contrastive_loss(*inputs, group_id=group_id), (images, texts, scale)
    )
    assert torch.autograd.gradcheck(
        lambda *inputs: sigmoid_loss(*inputs, group_id=group_id), (images, texts, scale, bias)
    )


@pytest.mark.parametrize("ids", [None, REPEATED])
def test_gradients_equal_those_of_the_definition(ids):
    group_id = None if ids is None else torch.tensor(ids)
    scale, bias = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (*embeddings(), scale, bias)]
    for ours, dense, used in (
        (contrastive_loss(*inputs[:3], group_id=group_id), dense_contrastive(*inputs[:3], ids), inputs[:3]),
        (sigmoid_loss(*inputs, group_id=group_id), dense_sigmoid(*inputs, ids), inputs),
    ):
        for found, expected in zip(torch.autograd.grad(ours, used), torch.autograd.grad(dense, used), strict=True):
            torch.testing.assert_close(found, expected, **EXACT)


def test_different_ids_are_the_plain_loss_and_repeated_ones_are_not():
    images, texts = embeddings()
    plain = contrastive_loss(images, texts, 7.0)
    plain_sigmoid = sigmoid_loss(images, texts, 7.0, -3.0)
    different, repeated = torch.tensor(ALL_DIFFERENT), torch.tensor(REPEATED)
    torch.testing.assert_close(contrastive_loss(images, texts, 7.0, group_id=different), plain, **EXACT)
    assert torch.equal(sigmoid_loss(images, texts, 7.0, -3.0, group_id=different), plain_sigmoid)
    assert (contrastive_loss(images, texts, 7.0, group_id=repeated) - plain).abs() > 0.1
    assert (sigmoid_loss(images, texts, 7.0, -3.0, group_id=repeated) - plain_sigmoid).abs() > 0.1


def test_equal_embeddings_cost_log_of_the_batch():
    images = F.normalize(torch.ones(6, 5), dim=-1)
    # Every row is uniform over 6 columns; float32 resolves log 6 to about 2e-7.
    torch.testing.assert_close(contrastive_loss(images, images, 100.0).item(), math.log(6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_computed_in_float32(dtype):
    images, texts = (embeds.to(dtype) for embeds in embeddings())
    scale = torch.tensor(100.0, dtype=dtype)
    loss = contrastive_loss(images, texts, scale)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images.float(), texts.float(), 100.0))
    assert torch.equal(
        sigmoid_loss(images, texts, scale, -10.0), sigmoid_loss(images.float(), texts.float(), 100.0, -10.0)
    )


def test_half_precision_embeddings_get_gradients_of_their_own_dtype():
    images, texts = (embeds.bfloat16().requires_grad_() for embeds in embeddings())
    contrastive_loss(images, texts, 100.0).backward()
    assert images.grad.dtype == texts.grad.dtype == torch.bfloat16
    assert images.grad.abs().sum() > 0


def test_autocast_does_not_reach_the_logits():
    images, texts = (embeds.float() for embeds in embeddings())
    expected = contrastive_loss(images, texts, 100.0), sigmoid_loss(images, texts, 100.0, -10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (images @ texts.T).dtype == torch.bfloat16  # autocast is at work here
        found = contrastive_loss(images, texts, 100.0), sigmoid_loss(images, texts, 100.0, -10.0)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_extreme_scales_stay_finite():
    images, texts = (embeds.float().requires_grad_() for embeds in embeddings())
    for loss in (contrastive_loss(images, -images, 1e4), sigmoid_loss(images, texts, 1e4, -1e4)):
        loss.backward()
        assert loss.isfinite() and images.grad.isfinite().all()


def test_scale_may_be_a_number_of_numpy():
    images, texts = embeddings()
    assert contrastive_loss(images, texts, np.float32(7)) == contrastive_loss(images, texts, 7.0)


def test_scale_may_be_a_parameter_of_shape_one():
    images, texts = embeddings()
    scale = torch.nn.Parameter(torch.tensor([7.0], dtype=torch.float64))
    loss = contrastive_loss(images, texts, scale)
    loss.backward()
    assert loss.shape == () and scale.grad.shape == (1,)
    torch.testing.assert_close(loss.detach(), contrastive_loss(images, texts, 7.0), **EXACT)


@pytest.mark.parametrize("loss", [contrastive_loss, lambda *args, **kwargs: sigmoid_loss(*args, -10.0, **kwargs)])
@pytest.mark.parametrize(
    ("images", "texts", "group_id", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(4, 6), None, r"\(4, 8\).*\(4, 6\).*expected the same"),
        (torch.zeros(4, 8), torch.zeros(3, 8), None, r"\(4, 8\).*\(3, 8\).*expected the same"),
        (torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), None, r"expected the same \(local_batch, dim\)"),
        (torch.zeros(8), torch.zeros(8), None, r"expected the same \(local_batch, dim\)"),
        (torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(3, dtype=torch.int64), r"group_id is \(3,\).*\(4,\)"),
        (torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4, 1, dtype=torch.int64), r"group_id is \(4, 1\)"),
        (torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4), r"float32: expected \(4,\) of torch.int64"),
        (torch.zeros(0, 8), torch.zeros(0, 8), None, "global batch is empty"),
        (torch.zeros(4, 8).long(), torch.zeros(4, 8).long(), None, "int64.*expected floating point"),
        (torch.zeros(4, 8), torch.zeros(4, 8).bool(), None, "bool.*expected floating point"),
    ],
)
def test_rejects_inputs_that_do_not_fit(loss, images, texts, group_id, message):
    with pytest.raises(ValueError, match=message):
        loss(images, texts, 1.0, group_id=group_id)


@pytest.mark.parametrize("loss", [contrastive_loss, lambda *args, **kwargs: sigmoid_loss(*args, -10.0, **kwargs)])
def test_rejects_what_is_no_tensor(loss):
    embeds = torch.zeros(4, 8)
    with pytest.raises(TypeError, match="image_embeds must be a torch.Tensor, found ndarray"):
        loss(np.zeros((4, 8)), embeds, 1.0)
    with pytest.raises(TypeError, match="text_embeds must be a torch.Tensor, found ndarray"):
        loss(embeds, np.zeros((4, 8)), 1.0)
    with pytest.raises(TypeError, match="group_id must be a torch.Tensor, found list"):
        loss(embeds, embeds, 1.0, group_id=[0, 1, 2, 3])
    with pytest.raises(TypeError, match="scale must be a number or a tensor of one element, found NoneType"):
        loss(embeds, embeds, None)


def test_rejects_scale_and_bias_of_several_elements():
    embeds = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"scale must have one element, found shape \(4, 1\)"):
        contrastive_loss(embeds, embeds, torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"bias must have one element, found shape \(4,\)"):
        sigmoid_loss(embeds, embeds, 1.0, torch.zeros(4))
