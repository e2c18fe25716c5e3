"""The gradient cache on one process: the same loss and gradients as one graph over all micro-batches."""

import pytest
import torch
from torch import nn

from hfclip import HFCLIPConfig, HFCLIPModel, contrastive_loss, sigmoid_loss
from hfclip.grad_cache import cached_backward
from training.model import checkpoint_activations


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
VIT = {**TOWER, "model_type": "hfclip_vit", "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
RESNET = {"model_type": "hfclip_resnet", "depths": [1, 1, 1, 1], "stem_width": 8, "image_size": 32}
RESNET |= {"projection_dim": 16}
NUM_PAIRS = 11


def tiny_model(dtype=torch.float64, vision=VIT, **vision_settings) -> HFCLIPModel:
    torch.manual_seed(0)
    text = {**TOWER, "num_hidden_layers": 2, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99}
    config = HFCLIPConfig(
        projection_dim=16,
        vision_config={**vision, **vision_settings},
        text_config={**text, "max_position_embeddings": 12},
    )
    return HFCLIPModel(config).to(dtype).train()


def batch(sizes, dtype=torch.float64) -> list[dict]:
    """Micro-batches of these sizes, captions of many lengths."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(sum(sizes), 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(1, 90, (sum(sizes), 12), generator=generator)
    lengths = torch.randint(3, 12, (sum(sizes), 1), generator=generator)
    place = torch.arange(12)
    ids = ids.where(place < lengths, 99)
    mask = (place <= lengths).long()
    return [
        {"pixel_values": p, "input_ids": i, "attention_mask": m}
        for p, i, m in zip(pixels.split(sizes), ids.split(sizes), mask.split(sizes), strict=True)
    ]


def embed_with(model):
    def embed(micro_batch):
        output = model(**micro_batch, embeds_only=True)
        return output.image_embeds, output.text_embeds

    return embed


def clip_loss(images, texts, logit_scale):
    return contrastive_loss(images, texts, logit_scale.exp())


def in_one_graph(model, micro_batches, loss, parameters):
    """The definition: all micro-batches embedded with a graph, then the loss of all of them."""
    embeds = [embed_with(model)(micro_batch) for micro_batch in micro_batches]
    value = loss(*(torch.cat(parts) for parts in zip(*embeds, strict=True)), *parameters)
    value.backward()
    return value.detach()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return found


def assert_close(found, expected, tolerance):
    total = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    assert found.keys() == expected.keys() and total > 0
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            # The key's bias has no gradient but rounding noise, since softmax ignores it: the second term.
            limit = tolerance * gradient.norm() + 1e-3 * tolerance * total
            assert (found[name] - gradient).norm() <= limit, name


def both_ways(model, micro_batches, loss=clip_loss, parameters=None, **options):
    """(loss, gradients, next random number) of the definition and of the cache, from the same random state."""
    parameters = [model.logit_scale] if parameters is None else parameters
    results = []
    for run in (in_one_graph, lambda *given: cached_backward(embed_with(model), *given[1:], **options)):
        torch.manual_seed(3)
        value = run(model, micro_batches, loss, parameters)
        results.append((value, gradients(model), torch.rand(1)))
    return results


@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (1,) * 11])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradients_are_those_of_one_graph_with_patch_dropout(sizes, dtype, tolerance):
    model = tiny_model(dtype, patch_dropout=0.5)
    expected, found = both_ways(model, batch(sizes, dtype))
    assert found[0] == pytest.approx(expected[0].item(), rel=1e-6)
    assert_close(found[1], expected[1], tolerance)
    assert found[2] == expected[2]  # what is drawn after the step is the same, too


def test_dropout_drawn_anew_would_be_noticed():
    model = tiny_model(patch_dropout=0.5)
    _, (_, expected, _) = both_ways(model, batch((4, 7)))
    torch.manual_seed(4)
    cached_backward(embed_with(model), batch((4, 7)), clip_loss, [model.logit_scale])
    with pytest.raises(AssertionError):
        assert_close(gradients(model), expected, 1e-3)


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model(patch_dropout=0.5)
    expected, _ = both_ways(model, batch((4, 7)))
    checkpoint_activations(model)
    _, found = both_ways(model, batch((4, 7)))
    assert_close(found[1], expected[1], 1e-10)


def test_autocast_gives_the_gradients_of_autocast_in_one_graph():
    model = tiny_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = both_ways(model, batch((4, 7), torch.float32))
    assert found[0] == expected[0]
    # The same bfloat16 numbers in both; only the order in which float32 gradients are summed differs.
    assert_close(found[1], expected[1], 1e-2)


def test_weights_cast_once_for_the_first_pass_still_get_their_gradients():
    """Autocast keeps what it has cast in the first pass until the outermost context ends."""
    model = tiny_model(torch.float32)

    def embed(micro_batch):
        with torch.autocast("cpu", torch.bfloat16):
            return embed_with(model)(micro_batch)

    found = []
    for options in ({}, {"first_pass": lambda: torch.autocast("cpu", torch.bfloat16)}):
        value = cached_backward(embed, batch((4, 7), torch.float32), clip_loss, [model.logit_scale], **options)
        found.append((value, gradients(model)))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_compiled_model():
    model = tiny_model(num_hidden_layers=1)
    expected, _ = both_ways(model, batch((4, 4)))
    model.compile(backend="aot_eager")
    _, found = both_ways(model, batch((4, 4)))
    assert_close(found[1], expected[1], 1e-10)


def test_locked_tower_gets_no_gradient():
    model = tiny_model()
    model.freeze("vision")
    expected, found = both_ways(model, batch((4, 7)))
    assert any(gradient is None for gradient in found[1].values())
    assert_close(found[1], expected[1], 1e-10)


def test_all_parameters_that_the_loss_reads_get_their_gradient():
    model = tiny_model()
    bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))

    def loss(images, texts, logit_scale, logit_bias):
        return sigmoid_loss(images, texts, logit_scale.exp(), logit_bias)

    biases = []
    for run in (in_one_graph, lambda *given: cached_backward(embed_with(model), *given[1:])):
        run(model, batch((4, 7)), loss, [model.logit_scale, bias])
        biases.append(bias.grad)
        bias.grad = None
    assert biases[0] != 0 and torch.allclose(*biases, rtol=1e-12)


def test_factor_of_a_gradient_scaler_reaches_every_gradient():
    model = tiny_model()
    expected, found = both_ways(model, batch((4, 7)), backward=lambda value: (1024 * value).backward())
    assert found[0] == expected[0]
    assert_close({n: g / 1024 for n, g in found[1].items()}, expected[1], 1e-12)


def test_gradients_add_to_those_that_are_there():
    model = tiny_model()
    (_, expected, _), _ = both_ways(model, batch((4, 7)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    cached_backward(embed_with(model), batch((4, 7)), clip_loss, [model.logit_scale])
    assert_close({n: g - 1 for n, g in gradients(model).items()}, expected, 1e-10)


def test_batch_norm_sees_micro_batches_and_its_statistics_move_once():
    moved = []
    for run in (in_one_graph, cached_backward):
        model = tiny_model(vision=RESNET)
        first = model if run is in_one_graph else embed_with(model)
        options = {} if run is in_one_graph else {"buffers": model.buffers()}
        value = run(first, batch((4, 7)), clip_loss, [model.logit_scale], **options)
        moved.append((value, gradients(model), {n: b.clone() for n, b in model.named_buffers()}))
    (value, expected, buffers), (found_value, found, found_buffers) = moved
    assert found_value == value
    assert_close(found, expected, 1e-10)
    assert any("running_mean" in name for name in buffers)
    assert all(torch.equal(found_buffers[name], b) for name, b in buffers.items())


def test_rejects_no_micro_batches():
    model = tiny_model()
    with pytest.raises(ValueError, match="expected at least one"):
        cached_backward(embed_with(model), [], clip_loss, [model.logit_scale])
