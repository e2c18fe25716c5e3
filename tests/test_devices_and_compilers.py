"""Models in other hands: weights kept elsewhere by accelerate, graphs of torch's compilers, what looks for layers."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from test_modeling import BAG_OF_WORDS, CLOSE, RESNET, VISION, gradients, images, texts, tiny
from test_zero_shot import photos, processor, tiny_model  # noqa: F401
from torch import nn

from hfclip import HFCLIPConfig, HFCLIPForImageClassification, HFCLIPModel, ZeroShotClassifier


TOWERS = {
    "vit": dict(vision_config=dict(VISION)),
    "vit-mean": dict(vision_config={**VISION, "pooling": "mean"}),
    "resnet": dict(vision_config=dict(RESNET)),
    "bag-of-words": dict(text_config=dict(BAG_OF_WORDS)),
    "sigmoid": dict(logit_bias_init_value=-10.0),
}
CPU = torch.device("cpu")


def answers(model) -> dict[str, torch.Tensor]:
    outputs = model(input_ids=texts(), pixel_values=images())
    return {
        "image": model.encode_image(images()),
        "other size": model.encode_image(images(2, 64)),
        "text": model.encode_text(texts()),
        "logits": outputs.logits_per_image,
        "known": model(image_embeds=outputs.image_embeds, text_embeds=outputs.text_embeds).logits_per_image,
    }


@torch.no_grad()
def test_hooks_see_the_stages_of_a_resnet():
    model, seen = tiny(vision_config=dict(RESNET)), []
    model.vision_model.layer4.register_forward_hook(lambda *call: seen.append(call[2].shape))
    model.encode_image(images(2, 64))
    assert seen == [(2, 256, 2, 2)]


def test_shapes_are_known_without_a_device():
    model = tiny().to("meta")
    assert model(input_ids=texts().to("meta"), pixel_values=images().to("meta")).logits_per_image.shape == (5, 5)


@pytest.mark.parametrize("given, message", [
    (dict(image_embeds=torch.ones(2, 7), text_embeds=torch.ones(2, 48)), r"image_embeds: found \(2, 7\), expected .*48"),
    (dict(image_embeds=torch.ones(48), text_embeds=torch.ones(2, 48)), r"image_embeds: found \(48,\)"),
    (dict(image_embeds=torch.ones(2, 48), text_embeds=[1.0]), "text_embeds: found list"),
    (dict(image_embeds=torch.ones(2, 48)), "You have to specify"),
    (dict(image_embeds=torch.ones(2, 48), embeds_only=True), "embeds_only: expected"),
    (dict(embeds_only=True), "embeds_only: expected"),
])  # fmt: skip
def test_rejects_embeddings_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**given)


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_answers(name, place, tmp_path):
    model = tiny(**copy.deepcopy(TOWERS[name]))
    expected = answers(model)
    if place == "cpu":
        accelerate.cpu_offload(model, CPU)
    else:
        accelerate.disk_offload(model, str(tmp_path), CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    for what, found in answers(model).items():
        torch.testing.assert_close(found, expected[what], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_a_device_map_with_little_memory_gives_the_same_answers(vision, tmp_path):
    model = tiny(vision_config=dict(vision))
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    spread = HFCLIPModel.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=str(tmp_path / "rest")
    )
    assert "disk" in spread.hf_device_map.values()
    expected = answers(model)
    for what, found in answers(spread).items():
        torch.testing.assert_close(found, expected[what], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_an_offloaded_classifier_gives_the_same_answers(vision):
    config = HFCLIPConfig(vision_config=dict(vision), projection_dim=48, num_labels=3)
    model = HFCLIPForImageClassification(config).eval()
    expected = model(images()).logits
    accelerate.cpu_offload(model, CPU)
    torch.testing.assert_close(model(images()).logits, expected, **CLOSE)


def test_zero_shot_classification_with_offloaded_weights(processor, tmp_path):  # noqa: F811
    model = tiny_model()
    make = lambda: ZeroShotClassifier(model, processor, ["cat", "dog"])
    expected = make().logits(photos(2))
    accelerate.cpu_offload(model, CPU)
    torch.testing.assert_close(make().logits(photos(2)), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="weights are offloaded"):
        make().save(tmp_path)


@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_towers_and_the_dual_encoder_compile_as_one_graph(vision):
    torch.compiler.reset()
    model, inputs = tiny(vision_config=dict(vision)), dict(input_ids=texts(), pixel_values=images())
    mask = (texts() != 0).long()
    compile = lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for function, arguments in (
            (model.encode_text, (texts(),)),
            (model.encode_text, (texts(), mask)),
            (model.encode_image, (images(),)),
            (model.encode_image, (images(3),)),
        ):
            torch.testing.assert_close(compile(function)(*arguments), function(*arguments), **CLOSE)
        found = compile(model)(**inputs).logits_per_image
        torch.testing.assert_close(found, model(**inputs).logits_per_image, **CLOSE)


@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects")  # of capture_outputs
def test_towers_export_strictly(vision):
    model = tiny(vision_config=dict(vision))
    for tower, value in ((model.vision_model, images()), (model.text_model, texts())):
        exported = torch.export.export(tower, (value,), strict=True).module()
        torch.testing.assert_close(exported(value).pooler_output, tower(value).pooler_output, **CLOSE)


def test_a_resnet_in_training_compiles_as_one_graph_with_the_same_gradients():
    torch.compiler.reset()
    # float64: with few images BatchNorm amplifies rounding a thousandfold.
    plain, compiled = (tiny(vision_config=dict(RESNET)).vision_model.train().double() for _ in range(2))
    for tower in (plain, torch.compile(compiled, fullgraph=True, backend="aot_eager")):
        tower(images().double()).pooler_output.square().sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(compiled)[name], gradient, rtol=1e-9, atol=1e-9)
    for found, expected in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["plain", "reentrant", "compiled"])
def test_statistics_move_once_a_step_under_checkpointing(kind):
    torch.compiler.reset()
    plain, saving = (tiny(vision_config=dict(RESNET)).vision_model.train().double() for _ in range(2))
    enable = getattr(saving, "activation_checkpointing_enable", None) or saving.gradient_checkpointing_enable
    enable({"use_reentrant": kind == "reentrant"})
    run = torch.compile(saving, backend="aot_eager") if kind == "compiled" else saving
    for tower in (plain, run):
        # Two batches before either's backward pass, as in a step of micro-batches; a compiled graph takes one at a time.
        for together in (images(6).split(3),) if kind != "compiled" else ((part,) for part in images(6).split(3)):
            for output in [tower(pixels.double().requires_grad_()).pooler_output for pixels in together]:
                output.square().sum().backward()
    for (name, expected), found in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=name)
    assert int(saving.bn1.num_batches_tracked) == 2 and saving.layer1[0].bn1.momentum == plain.layer1[0].bn1.momentum
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(saving)[name], gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_layers_are_of_torchs_own_classes(vision):
    """Quantisation, pruning and counters look for layers by their exact class."""
    model = tiny(vision_config=dict(vision))
    layers = {type(module) for module in model.modules() if not list(module.children())}
    assert nn.Linear in layers
    assert all(layer.__module__.startswith(("torch.", "transformers.")) for layer in layers)
    # Deprecated in torch in favour of torchao, which needs no exact class; bitsandbytes looks as this does.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, pixel_values):
        return self.model(input_ids, pixel_values).logits_per_image


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_traced_model_reads_its_inputs():
    model = tiny()
    other = texts().roll(1, dims=0)
    expected = model(input_ids=other, pixel_values=images()).logits_per_image
    for warm in (False, True):
        if warm:
            model(input_ids=texts(), pixel_values=images())
        traced = torch.jit.trace(Logits(model), (texts(), images()))
        torch.testing.assert_close(traced(other, images()), expected, **CLOSE)


@torch.no_grad()
def test_threads_with_different_texts_get_their_own():
    model, pixels = tiny(), images(1)
    batches = [texts().roll(row, dims=0) for row in range(4)]
    expected = [model(input_ids=ids, pixel_values=pixels).logits_per_image for ids in batches]

    @torch.no_grad()
    def ask(number: int) -> bool:
        found = model(input_ids=batches[number % 4], pixel_values=pixels).logits_per_image
        return torch.allclose(found, expected[number % 4], **CLOSE)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(200)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_write_to_a_weight_counts_in_the_next_call(dtype):
    model = tiny().to(dtype)
    inputs = dict(input_ids=texts(), pixel_values=images(1).to(dtype))
    writes = {
        "a row, as textual inversion writes it": lambda: model.text_model.embeddings.token_embedding.weight.data[
            texts()[0, 1]
        ].neg_(),
        "a sign": lambda: model.text_projection.weight.data.neg_(),
        "an order": lambda: model.text_projection.weight.data.copy_(model.text_projection.weight.data.flip(0)),
        "a bias": lambda: model.text_model.encoder.layers[1].mlp.fc2.bias.data.add_(0.5),
    }
    for what, write in writes.items():
        before = model(**inputs).text_embeds
        write()
        after = model(**inputs).text_embeds
        assert not torch.equal(after, before) or what.startswith("a row"), what
        assert torch.equal(after, copy.deepcopy(model)(**inputs).text_embeds), what


@torch.no_grad()
def test_logits_of_half_precision_rank_as_the_embeddings_do():
    model = tiny(projection_dim=64).to(torch.bfloat16)
    model.logit_scale.fill_(4.605)  # the highest, 100
    generator = torch.Generator().manual_seed(0)
    label_embeds = nn.functional.normalize(torch.randn(1000, 64, generator=generator), dim=-1).bfloat16()
    image_embeds = nn.functional.normalize(torch.randn(200, 64, generator=generator), dim=-1).bfloat16()
    expected = image_embeds.double() @ label_embeds.double().t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(image_embeds=image_embeds, text_embeds=label_embeds).logits_per_image
    for logits in (model(image_embeds=image_embeds, text_embeds=label_embeds).logits_per_image, under_autocast):
        assert logits.dtype == torch.float32
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        best = logits.topk(2).values
        assert (best[:, 0] > best[:, 1]).all()
