"""Speed for inference that a user asks for by name; without it the models are plain.

    model = optimize_for_inference(HFCLIPModel.from_pretrained(folder))

    classify = pipeline("zero-shot-image-classification", model=folder,
                        pipeline_class=hfclip.ZeroShotImageClassificationPipeline)
    classify(images, candidate_labels=labels)       # the labels are embedded once, for all images of the call

Neither keeps anything between two calls: what is computed follows from the weights at that moment.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.activations import GELUActivation, QuickGELUActivation
from transformers.image_utils import load_image

from .modeling_hfclip_transformer import HFCLIPMLP


LABELS_AT_A_TIME = 256
ROWS = 1600  # of a product, for which oneDNN chooses the order of weights that are kept: 32 images of 50 tokens
# oneDNN's name and kind of an activation a, and the factor s by which it is a(x) = oneDNN's(s x) / s.
ACTIVATIONS = {QuickGELUActivation: ("swish", "", 1.702), GELUActivation: ("gelu", "none", 1.0)}


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Makes linear layers and patch embeddings compute float32 inference on CPUs with oneDNN's product, in place.

    Plain torch takes MKL's for linear layers, which is slower on processors that are not Intel's, a convolution for
    patches, which puts its weights in another order at each call, and passes over memory for the activations of MLPs,
    which become a part of their first product. All are exact to rounding, and read the weights as they are at each call.
    With gradients, other dtypes, on other devices, under autocast, and in graphs that are traced, compiled or exported,
    the layers compute what they did before.

    Layers of exactly the classes `nn.Linear` and `nn.Conv2d` (whose windows neither overlap nor leave gaps) with plain
    weights are changed. What looks for these classes (quantisation, counters of operations) comes before.

    Returns:
        The same model, in evaluation mode.

    Raises:
        RuntimeError: this build of torch has no oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        raise RuntimeError("optimize_for_inference: found a build of torch without oneDNN. Use the model as it is.")
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
            module.__class__ = OneDNNLinear
        elif type(module) is nn.Conv2d and type(module.weight) is nn.Parameter and _cuts_patches(module):
            module.__class__ = OneDNNPatchEmbedding
        elif type(module) is HFCLIPMLP and type(module.activation_fn) in ACTIVATIONS:
            module.__class__ = OneDNNMLP
    return model.eval()


def _cuts_patches(layer: nn.Conv2d) -> bool:
    """Whether the windows of a convolution lie side by side, so that it is a linear layer of each."""
    plain = (layer.padding, layer.dilation, layer.groups) == ((0, 0), (1, 1), 1)
    return plain and layer.kernel_size == layer.stride and min(layer.stride) > 1


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Keeps the weights of an optimized model in oneDNN's order inside, where they do not change; it takes their size.

    Without it they are put in this order at each call.
    """
    layers = [module for module in model.modules() if type(module) is OneDNNLinear]
    try:
        for layer in layers:
            layer.ordered = {}
        yield
    finally:
        for layer in layers:
            del layer.ordered


class OneDNNLinear(nn.Linear):
    """`nn.Linear` with oneDNN's kernel for what it can do; see `optimize_for_inference`."""

    ordered: dict[str, Tensor] | None = None  # the weight in oneDNN's order, where it is kept, from its first use on

    def forward(self, x: Tensor) -> Tensor:
        if not _can_take(self, x) or x.shape[-1] != self.in_features:
            return super().forward(x)
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None, activation: str = "none", kind: str = "") -> Tensor:
        weight = self.weight
        if self.ordered is not None:
            if not self.ordered:
                self.ordered["weight"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            weight = self.ordered["weight"]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind)


class OneDNNMLP(HFCLIPMLP):
    """`HFCLIPMLP` whose activation is computed with the first product; see `optimize_for_inference`."""

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.fc1, self.activation_fn, self.fc2)
        fits = type(self.fc1) is type(self.fc2) is OneDNNLinear and x.shape[-1] == self.fc1.in_features
        is_seen = any(
            part._forward_hooks or part._forward_pre_hooks for part in parts
        )  # by who wants what lies between
        if not fits or is_seen or not (_can_take(self.fc1, x) and _can_take(self.fc2, x)):
            return super().forward(x)
        name, kind, scale = ACTIVATIONS[type(self.activation_fn)]
        hidden = self.fc1.product(x * scale, self.fc1.bias * scale, name, kind)
        return self.fc2.product(hidden, self.fc2.bias * scale).div_(scale)


class OneDNNPatchEmbedding(nn.Conv2d):
    """`nn.Conv2d` of windows side by side as one matrix product; see `optimize_for_inference`."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.stride
        fits = x.ndim == 4 and x.shape[1] == self.in_channels and not (x.shape[2] % height or x.shape[3] % width)
        if not (fits and _can_take(self, x)):
            return super().forward(x)
        # (batch, channels, rows * height, columns * width) -> (batch, rows, columns, channels * height * width)
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        embeds = torch.ops.mkldnn._linear_pointwise(patches, self.weight.flatten(1), self.bias, "none", [], "")
        return embeds.permute(0, 3, 1, 2)


def _can_take(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Whether oneDNN's kernel computes what this layer would compute of `x`, derivatives and graphs included."""
    return (
        type(x) is Tensor
        and type(layer.weight) in (nn.Parameter, Tensor)
        and x.dtype == layer.weight.dtype == torch.float32
        and x.device.type == layer.weight.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not any(
            forward_ad.unpack_dual(v).tangent is not None for v in (x, layer.weight, layer.bias) if v is not None
        )
    )


class ZeroShotImageClassificationPipeline(transformers.ZeroShotImageClassificationPipeline):
    """Zero-shot image classification whose labels are embedded once per call, for all images of the call.

    The standard pipeline embeds the labels anew with each image. Scores are the same. Give it many images at once, as
    a list, a generator or a data set; for labels that stay from call to call there is `ZeroShotClassifier`.

    Raises:
        TypeError: the model is not a `HFCLIPModel`.
    """

    def __init__(self, hypothesis_template: str = "This is a photo of {}.", **kwargs):
        self.hypothesis_template = hypothesis_template
        super().__init__(**kwargs)
        if not hasattr(self.model, "encode_text"):
            raise TypeError(
                f"This pipeline needs a HFCLIPModel, found {type(self.model).__name__}. Open the folder with "
                "HFCLIPModel.from_pretrained, or use the pipeline of transformers."
            )

    def __call__(self, image: Any = None, candidate_labels: Iterable[str] = (), **kwargs) -> list:
        """See transformers' pipeline of the same name; `tokenizer_kwargs` reach the tokenizer.

        Raises:
            ValueError: no labels, one string in place of a list, or a template without a place for the label.
        """
        if isinstance(candidate_labels, str) or not (labels := list(candidate_labels or ())):
            raise ValueError(f"candidate_labels: found {candidate_labels!r}, expected a list of at least one label.")
        template = kwargs.pop("hypothesis_template", self.hypothesis_template)
        texts = [template.format(label) for label in labels]
        if len(set(labels)) > 1 and len(set(texts)) == 1:
            raise ValueError(f"hypothesis_template: found {template!r}, expected {{}} in it, where the label goes.")
        text_embeds = self._embed(texts, kwargs.pop("tokenizer_kwargs", None))
        return super().__call__(image, labels, text_embeds=text_embeds, **kwargs)

    def _embed(self, texts: list[str], tokenizer_kwargs: dict | None) -> Tensor:
        """(len(texts), projection_dim) unit embeddings."""
        embeds = []
        with self.device_placement(), self.get_inference_context()():
            for start in range(0, len(texts), LABELS_AT_A_TIME):
                batch = texts[start : start + LABELS_AT_A_TIME]
                inputs = self.tokenizer(batch, return_tensors="pt", **{"padding": True, **(tokenizer_kwargs or {})})
                inputs = self.ensure_tensor_on_device(**inputs)
                embeds.append(self.model.encode_text(inputs["input_ids"], inputs.get("attention_mask")))
        return torch.cat(embeds)

    def _sanitize_parameters(self, text_embeds: Tensor | None = None, **kwargs) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, {**forward, "text_embeds": text_embeds}, postprocess

    def preprocess(self, image: Any, candidate_labels: list[str], timeout: float | None = None) -> dict:
        image = load_image(image, timeout=timeout)
        inputs = self.image_processor(images=[image], return_tensors="pt").to(self.dtype)
        inputs["candidate_labels"] = candidate_labels
        return inputs

    def _forward(self, model_inputs: dict, text_embeds: Tensor) -> dict:
        candidate_labels = model_inputs.pop("candidate_labels")
        # The embedding alone: the last block need not compute what nobody reads.
        image_embeds = self.model.encode_image(**model_inputs)
        outputs = self.model(image_embeds=image_embeds, text_embeds=text_embeds)
        return {"candidate_labels": candidate_labels, "logits": outputs.logits_per_image}
