"""The losses in one process: against their definitions with dense matrices, in precision, and in what they refuse.

Tiles are as small as the batches here, so that every test meets whole tiles, broken ones and the edges between them.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfclip.losses import contrastive_loss, sigmoid_loss, tiles


# float64 against float64: both sides are sums of some hundred terms of order 1, so 1e-12 is far above rounding
# (2e-16 a term) and far below any missing or doubled term.
EXACT = dict(rtol=1e-12, atol=1e-12)

ALL_DIFFERENT = [3, 1, 4, 0, 9, 2]
REPEATED = [5, 7, 5, 2, 7, 5]
ALL_EQUAL = [1] * 6

# For 6 pairs: one logit each, whole tiles, a broken last tile, a single tile larger than the batch.
TILES = [1, 3, 4, 1024]


@pytest.fixture(autouse=True)
def tile(request, monkeypatch):
    """4 unless a test has parametrised it: 6 pairs are then 2 x 2 tiles of which 3 are broken."""
    monkeypatch.setattr(tiles, "CPU_TILE", getattr(request, "param", 4))


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


@pytest.mark.parametrize("tile", TILES, indirect=True)
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


@pytest.mark.parametrize("tile", TILES, indirect=True)
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


@pytest.mark.parametrize("tile", TILES, indirect=True)
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


def vectorised(images, texts, scale, bias=None, group_id=None):
    """Both definitions with one dense matrix: contrastive, or sigmoid where there is a bias."""
    ids = torch.arange(len(images)) if group_id is None else group_id
    positive = (ids[:, None] == ids).to(images.dtype)
    logits = scale * images @ texts.T
    if bias is not None:
        return F.binary_cross_entropy_with_logits(logits + bias, positive, reduction="sum") / len(images)
    targets = positive / positive.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def ours(images, texts, scale, bias=None, group_id=None):
    if bias is None:
        return contrastive_loss(images, texts, scale, group_id=group_id)
    return sigmoid_loss(images, texts, scale, bias, group_id=group_id)


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_float32_equals_float64_for_batches_of_many_tiles(bias, grouped, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", 64)
    images, texts = embeddings(num_pairs=300, dim=32)
    texts = F.normalize(images + texts, dim=-1)  # pairs belong together: rows are sure of their text
    group_id = torch.arange(300) % 250 if grouped else None
    inputs = [images, texts, torch.tensor(20.0)] + ([] if bias is None else [torch.tensor(bias)])
    single = [tensor.float().requires_grad_() for tensor in inputs]
    double = [tensor.detach().double().requires_grad_() for tensor in single]
    found, expected = ours(*single, group_id=group_id), vectorised(*double, group_id=group_id)
    assert found.dtype == torch.float32
    for value, reference in zip(
        (found, *torch.autograd.grad(found, single)), (expected, *torch.autograd.grad(expected, double)), strict=True
    ):
        # Logits of 20 are resolved to 1e-6, and with them every exponential; the errors of many terms cancel in part.
        assert (value - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("scale", [100.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("bias", [None, -40.0])
def test_extreme_logits_keep_value_and_gradients(scale, sign, equal, bias):
    """Texts identical or opposite to their images, pairs all different or all equal: both ends of the logits."""
    images = embeddings()[0]
    images = images[:1].repeat(6, 1) if equal else images
    for dtype in (torch.float64, torch.float32):
        inputs = [images, sign * images, torch.tensor(scale)] + ([] if bias is None else [torch.tensor(bias)])
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        double = [tensor.detach().double().requires_grad_() for tensor in inputs]
        found, expected = ours(*inputs), vectorised(*double)
        # A logit is resolved to its precision times the scale; a gradient is at most twice scale (embeddings) or 2.
        tolerance = 10 * scale * torch.finfo(dtype).eps
        assert (found - expected).abs() <= tolerance * max(1, expected.abs())
        gradients = torch.autograd.grad(found, inputs), torch.autograd.grad(expected, double)
        for value, reference, size in zip(*gradients, (scale, scale, 1, 1)):
            assert (value - reference).abs().max() <= tolerance * size


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_no_numbers_are_not_hidden(bias, bad):
    images, texts = embeddings()
    texts[4, 2] = bad
    assert not ours(images, texts, 7.0, bias).isfinite()


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize(
    "trained", [(True, False, True), (False, True, True), (False, False, True), (True, False, False)]
)
def test_locked_towers_leave_the_other_gradients_as_they_are(bias, trained):
    inputs = [*embeddings(), torch.tensor(7.0, dtype=torch.float64)]
    extra = [] if bias is None else [bias]
    everything = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(vectorised(*everything, *extra), everything)
    some = [tensor.clone().requires_grad_(needed) for tensor, needed in zip(inputs, trained, strict=True)]
    ours(*some, *extra).backward()
    for tensor, reference, needed in zip(some, expected, trained, strict=True):
        if needed:
            torch.testing.assert_close(tensor.grad, reference, **EXACT)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strided_embeddings_are_equal_to_contiguous_ones(dtype):
    """Slices of one matrix and a transposed one, as a tower may return them."""
    images, texts = (embeds.to(dtype) for embeds in embeddings())
    strided = torch.cat([images, images], dim=1)[:, :5], texts.T.contiguous().T
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    found = [tensor.detach().requires_grad_() for tensor in strided]
    expected = [images.requires_grad_(), texts.requires_grad_()]
    tolerance = EXACT if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    for function in (lambda *embeds: ours(*embeds, 7.0), lambda *embeds: ours(*embeds, 7.0, -3.0)):
        torch.testing.assert_close(function(*found), function(*expected), **tolerance)
        torch.testing.assert_close(
            torch.autograd.grad(function(*found), found),
            torch.autograd.grad(function(*expected), expected),
            **tolerance,
        )


def test_values_are_there_without_gradients():
    images, texts = embeddings()
    expected = contrastive_loss(images, texts, 7.0), sigmoid_loss(images, texts, 7.0, -3.0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            parameters = [embeds.clone().requires_grad_() for embeds in (images, texts)]
            assert torch.equal(contrastive_loss(*parameters, 7.0), expected[0])
            assert torch.equal(sigmoid_loss(*parameters, 7.0, -3.0), expected[1])


def test_rejects_second_derivatives():
    images, texts = (embeds.requires_grad_() for embeds in embeddings())
    for loss in (contrastive_loss(images, texts, 7.0), sigmoid_loss(images, texts, 7.0, -3.0)):
        with pytest.raises(RuntimeError, match="no second derivatives.*without create_graph"):
            torch.autograd.grad(loss, images, create_graph=True)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_nothing_larger_than_embeddings_and_tiles_is_ever_made(bias, grouped, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", 8)
    images, texts = (embeds.requires_grad_() for embeds in embeddings(num_pairs=100, dim=3))
    group_id = torch.arange(100) % 10 if grouped else None
    with LargestTensor() as dense:
        vectorised(images, texts, 7.0, bias, group_id).backward()
    with LargestTensor() as tiled:
        ours(images, texts, 7.0, bias, group_id).backward()
    assert dense.elements >= 100 * 100  # the measure sees the square
    assert tiled.elements == 100 * 3


@pytest.mark.parametrize("bias", [None, -3.0])
def test_compiled_programs_do_not_unroll_the_tiles(bias, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", 1)
    nodes = []

    def count(graph_module, _):
        nodes.extend(graph_module.graph.nodes)
        return graph_module.forward

    def program(images, texts):
        return 2 * ours(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), 7.0, bias)

    inputs = [embeds.requires_grad_() for embeds in embeddings(num_pairs=20)]
    expected = program(*inputs)
    found = torch.compile(program, backend=count)(*inputs)
    assert 0 < len(nodes) < 40  # 400 tiles
    assert torch.equal(found, expected)
    for value, reference in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.equal(value, reference)


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


def test_rejects_an_unknown_exchange():
    embeds = torch.zeros(4, 8)
    for loss in (contrastive_loss, lambda *args, **kwargs: sigmoid_loss(*args, -10.0, **kwargs)):
        with pytest.raises(ValueError, match="exchange is 'star': expected one of 'gather', 'ring'"):
            loss(embeds, embeds, 1.0, exchange="star")
