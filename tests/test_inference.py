"""What is faster on request: the same values as without, and those of the weights at that moment."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_modeling import CLOSE, RESNET, VISION, images, texts, tiny
from test_zero_shot import LABELS, photos, processor, tiny_model  # noqa: F401
from torch import nn
from torch.autograd import forward_ad
from transformers import pipeline

from hfclip import (
    HFCLIPForImageClassification,
    HFCLIPVisionConfig,
    ZeroShotImageClassificationPipeline,
    optimize_for_inference,
)
from hfclip.inference import fixed_weights
from hfclip.modeling_hfclip_transformer import HFCLIPMLP


class TestOptimizedModels:
    @torch.no_grad()
    @pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
    def test_values_are_those_of_the_plain_model(self, vision):
        plain = tiny(vision_config=dict(vision))
        fast = optimize_for_inference(copy.deepcopy(plain).train())
        assert not fast.training and not any(type(module) is nn.Linear for module in fast.modules())
        inputs = dict(input_ids=texts(), pixel_values=images())
        torch.testing.assert_close(fast(**inputs).logits_per_image, plain(**inputs).logits_per_image, **CLOSE)
        torch.testing.assert_close(fast.encode_text(texts()), plain.encode_text(texts()), **CLOSE)

    @torch.no_grad()
    def test_a_write_to_a_weight_counts(self):
        fast = optimize_for_inference(tiny())
        fast.encode_text(texts())
        fast.text_model.encoder.layers[1].mlp.fc1.weight.data.neg_()
        expected = tiny()
        expected.load_state_dict(fast.state_dict())
        torch.testing.assert_close(fast.encode_text(texts()), expected.encode_text(texts()), **CLOSE)

    def test_it_trains_saves_and_compiles_as_before(self, tmp_path):
        plain, fast = tiny().train(), optimize_for_inference(tiny()).train()
        for model in (plain, fast):
            model(texts(), images(), return_loss=True).loss.backward()
        for expected, found in zip(plain.parameters(), fast.parameters(), strict=True):
            assert torch.equal(found.grad, expected.grad)
        fast.eval().save_pretrained(tmp_path)
        again = type(fast).from_pretrained(tmp_path)
        assert type(again.visual_projection) is nn.Linear
        with torch.no_grad():
            compiled = torch.compile(fast.encode_image, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(images()), again.encode_image(images()), **CLOSE)

    @torch.no_grad()
    def test_weights_that_are_fixed_give_the_same_values_and_are_read_anew_afterwards(self):
        plain, fast = tiny(), optimize_for_inference(tiny())
        with fixed_weights(fast):
            for _ in range(2):
                torch.testing.assert_close(fast.encode_image(images()), plain.encode_image(images()), **CLOSE)
        for model in (plain, fast):
            model.vision_model.encoder.layers[0].mlp.fc1.weight.neg_()
        torch.testing.assert_close(fast.encode_image(images()), plain.encode_image(images()), **CLOSE)


class TestOneDNNMLP:
    @torch.no_grad()
    @pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
    def test_activation_is_the_plain_one(self, activation):
        """Also for large values, and where somebody looks at what lies between the layers."""
        torch.manual_seed(0)
        plain = HFCLIPMLP(HFCLIPVisionConfig(hidden_size=24, intermediate_size=40, hidden_act=activation))
        fast, seen = optimize_for_inference(copy.deepcopy(plain)), []
        assert (type(fast) is HFCLIPMLP) == (activation == "gelu_pytorch_tanh")
        for scale in (0.1, 3, 300):
            x = torch.randn(2, 5, 24) * scale
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6 * scale)
        fast.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6 * scale)
        torch.testing.assert_close(seen[0], plain.fc1(x), rtol=1e-5, atol=1e-6 * scale)


class TestOneDNNLinear:
    """The optimised layer against torch's."""

    def pair(self, bias=True):
        torch.manual_seed(0)
        plain = nn.Linear(40, 24, bias=bias)
        return optimize_for_inference(nn.Sequential(copy.deepcopy(plain)))[0], plain

    @torch.no_grad()
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("x", [
        torch.randn(7, 40), torch.randn(40), torch.randn(2, 0, 40), torch.randn(2, 3, 5, 40), torch.randn(40, 7).t(),
        torch.randn(3, 7, 80)[..., ::2], torch.randn(3, 1, 40).expand(3, 4, 40),
    ])  # fmt: skip
    def test_values_are_the_same(self, x, bias):
        fast, plain = self.pair(bias)
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)

    def test_gradients_are_the_same(self):
        fast, plain = self.pair()
        x = torch.randn(5, 40, requires_grad=True)
        for layer in (fast, plain):
            layer(x).pow(2).sum().backward()
        assert torch.equal(fast.weight.grad, plain.weight.grad)

    @pytest.mark.parametrize("with_gradients", [True, False])
    def test_derivatives_see_through_it(self, with_gradients):
        fast, plain = self.pair()
        x, v = torch.randn(5, 40), torch.randn(5, 40)
        with torch.set_grad_enabled(with_gradients):
            for found, expected in (
                (torch.func.jvp(fast, (x,), (v,))[1], v @ plain.weight.t()),
                (torch.func.grad(lambda x: fast(x).sum())(x), plain.weight.sum(0).expand(5, 40)),
            ):
                torch.testing.assert_close(found, expected, **CLOSE)
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(fast(forward_ad.make_dual(x, v))).tangent
            torch.testing.assert_close(tangent, v @ plain.weight.t(), **CLOSE)
            by_bias = lambda bias: torch.func.functional_call(fast, {"bias": bias}, x)
            assert torch.func.jvp(by_bias, (plain.bias,), (torch.ones(24),))[1].eq(1).all()

    @torch.no_grad()
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("x", [
        torch.randn(2, 3, 12, 8), torch.randn(2, 3, 13, 9), torch.randn(3, 12, 8), torch.randn(1, 12, 8, 3).permute(0, 3, 1, 2),
    ])  # fmt: skip
    def test_patches_are_embedded_as_by_a_convolution(self, x, bias):
        plain = nn.Conv2d(3, 5, kernel_size=4, stride=4, bias=bias)
        (fast,) = optimize_for_inference(nn.Sequential(copy.deepcopy(plain)))
        assert type(fast) is not nn.Conv2d
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)

    @pytest.mark.parametrize(
        "other", [{"padding": 1}, {"groups": 3}, {"dilation": 2}, {"stride": 2}, {"kernel_size": 1}]
    )
    def test_other_convolutions_stay_as_they_are(self, other):
        layer = nn.Conv2d(3, 6, **{"kernel_size": 4, "stride": 4, **other})
        assert type(optimize_for_inference(nn.Sequential(layer))[0]) is nn.Conv2d

    def test_weights_of_other_kinds_stay_as_they_are(self):
        class Quantised(torch.Tensor):
            pass

        layer = nn.Linear(4, 3)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
        assert type(optimize_for_inference(nn.Sequential(layer))[0]) is nn.Linear

    @torch.no_grad()
    def test_other_precisions_are_torchs(self):
        fast, plain = self.pair()
        x = torch.randn(5, 40)
        assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))
        fast, plain = self.pair()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fast(x), plain(x)) and fast(x).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def pipelines(processor):  # noqa: F811
    parts = dict(tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    make = lambda **kind: pipeline("zero-shot-image-classification", model=tiny_model(), **parts, **kind)
    return make(), make(pipeline_class=ZeroShotImageClassificationPipeline)


class TestPipeline:
    @staticmethod
    def count(model) -> list:
        calls = []
        model.text_model.register_forward_pre_hook(lambda *call: calls.append(1))
        return calls

    @staticmethod
    def assert_same(found, expected):
        for row, known in zip(found, expected, strict=True):
            assert [one["label"] for one in row] == [one["label"] for one in known]
            scores = [torch.tensor([one["score"] for one in side]) for side in (row, known)]
            torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("options", [
        {}, {"hypothesis_template": "the {} on a table"}, {"batch_size": 4}, {"timeout": 1.0}
    ])  # fmt: skip
    def test_scores_are_those_of_the_standard_pipeline(self, pipelines, options):
        standard, ours = pipelines
        images, labels = photos(6), LABELS[:5]
        expected = standard(images, candidate_labels=labels, **{k: v for k, v in options.items() if k != "batch_size"})
        calls = self.count(ours.model)
        self.assert_same(ours(images, candidate_labels=labels, **options), expected)
        assert len(calls) == 1, "the labels of a call are embedded once"
        self.assert_same(list(ours((image for image in images), candidate_labels=labels, **options)), expected)
        self.assert_same([ours(images[0], labels, **options)], expected[:1])

    def test_a_template_may_be_given_when_it_is_made(self, pipelines, processor):  # noqa: F811
        parts = dict(tokenizer=processor.tokenizer, image_processor=processor.image_processor)
        made = ZeroShotImageClassificationPipeline(
            model=pipelines[1].model, hypothesis_template="the {} on a table", **parts
        )
        expected = pipelines[1](photos(2), LABELS[:3], hypothesis_template="the {} on a table")
        self.assert_same(made(photos(2), LABELS[:3]), expected)

    @torch.no_grad()
    def test_a_write_to_a_weight_counts_in_the_next_call(self, pipelines):
        standard, ours = pipelines
        for pipe in pipelines:
            pipe(photos(1), candidate_labels=LABELS)
            pipe.model.text_model.embeddings.token_embedding.weight.data.neg_()
        self.assert_same(ours(photos(2), candidate_labels=LABELS), standard(photos(2), candidate_labels=LABELS))

    def test_threads_with_different_labels_get_their_own(self, pipelines):
        ours, images = pipelines[1], photos(1)
        groups = [LABELS[:2], LABELS[2:4], LABELS[1:5], LABELS]
        expected = [ours(images, candidate_labels=labels) for labels in groups]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: ours(images, candidate_labels=groups[n % 4]), range(40)))
        for number, result in enumerate(found):
            self.assert_same(result, expected[number % 4])

    def test_refuses_what_it_cannot_use(self, pipelines, processor):  # noqa: F811
        for labels in ([], None, "cat, dog"):
            with pytest.raises(ValueError, match="expected a list of at least one label"):
                pipelines[1](photos(1), candidate_labels=labels)
        with pytest.raises(ValueError, match="where the label goes"):
            pipelines[1](photos(1), candidate_labels=LABELS, hypothesis_template="a photo")
        parts = dict(tokenizer=processor.tokenizer, image_processor=processor.image_processor)
        with pytest.raises(TypeError, match="needs a HFCLIPModel, found HFCLIPForImageClassification"):
            ZeroShotImageClassificationPipeline(model=HFCLIPForImageClassification(tiny_model().config), **parts)
