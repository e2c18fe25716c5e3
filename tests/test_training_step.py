"""The step on a device: micro-batches are queued without waiting for it, and nothing is sent to it twice; and the step
with an objective that has another head and another loss."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel
from training.config import Config
from training.objectives import Objective
from training.objectives.contrastive import Contrastive
from training.phases import Phase, Phases
from training.report.timing import Stopwatch
from training.step import build_step, split, text_lengths


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
VIT = {**TOWER, "model_type": "hfclip_vit", "image_size": 32, "patch_size": 8}
RESNET = {
    "model_type": "hfclip_resnet",
    "depths": [1, 1, 1, 1],
    "stem_width": 8,
    "image_size": 32,
    "projection_dim": 16,
}
TEXT = {**TOWER, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "max_position_embeddings": 12}
BAG_OF_WORDS = {"model_type": "hfclip_bag_of_words", "hidden_size": 32, "vocab_size": 100, "eos_token_id": 99}
BATCH = 12


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate without another test's settings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class PlainLoss(Contrastive):
    """Torch has no autocast for the meta device."""

    def loss(self, embeds, scalars, inputs):
        images, texts = embeds
        return (images * texts).sum() * scalars["logit_scale"].exp()


class WordPredictor(HFCLIPModel):
    """A model with a head of its own: from the image to the words of its caption."""

    def __init__(self, config: HFCLIPConfig):
        super().__init__(config)
        self.words = nn.Linear(config.projection_dim, config.text_config.vocab_size)

    def forward(self, pixel_values):
        return self.words(self.encode_image(pixel_values))


class BagOfWords(Objective):
    couples_pairs = False

    def __init__(self, config: Config):
        pass

    def embed(self, model, part):
        words = F.one_hot(part["input_ids"], TEXT["vocab_size"]).amax(dim=1)
        return model(part["pixel_values"]), words

    def loss(self, embeds, scalars, inputs):
        logits, words = embeds
        return F.binary_cross_entropy_with_logits(logits, words.float())


def batch(group: bool = True) -> dict[str, torch.Tensor]:
    """As the loader gives it, captions of many lengths, the longest first."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 11, (BATCH, 1), generator=generator).sort(dim=0, descending=True).values
    ids = torch.randint(1, 90, (BATCH, 12), generator=generator).where(torch.arange(12) < lengths, 99)
    pixels = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    whole = {"pixel_values": pixels, "input_ids": ids, "attention_mask": (torch.arange(12) <= lengths).long()}
    return whole | ({"group_id": torch.arange(BATCH)} if group else {})


def step_on(device: str, vision: dict = VIT, text: dict = TEXT, model=HFCLIPModel, objective=PlainLoss, **optim):
    optim = {"batch_size": BATCH, "steps": 10, "lr": 5e-4, "warmup_steps": 1, **optim}
    config = Config.from_dict({"model": {"preset": "ViT-B/32", "tokenizer": "given"}, "optim": optim})
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    step = build_step(
        model(HFCLIPConfig(projection_dim=16, vision_config=vision, text_config=text)).train(),
        config,
        accelerator,
        HFCLIPImageProcessor(size=32),
        objective=objective(config),
        total_steps=10,
        watch=Stopwatch(torch.device("cpu")),
        phases=Phases([], Phase(32, 12, 0.0), stride=8, steps_per_epoch=10, total_steps=10),
    )
    # Set behind `build_step`: optimizers are not made for weights without values.
    PartialState().device = accelerator.state.device = torch.device(device)
    step.core.to(device)
    step.pixel_mean, step.pixel_std = step.pixel_mean.to(device), step.pixel_std.to(device)
    return step


class Sent(TorchDispatchMode):
    """What is copied from the host to the device, by its shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten._to_copy.default and arguments[0].device.type == "cpu" != result.device.type:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("text", [TEXT, BAG_OF_WORDS], ids=["transformer", "bag of words"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_no_value_is_read_from_the_device_before_the_loss(vision, text, micro_batch_size):
    """On the meta device there are none: whatever the host would have to wait for raises."""
    step = step_on("meta", vision, text, micro_batch_size=micro_batch_size)
    loss = step._backward(batch(group=False))
    assert loss.device.type == "meta"
    assert all(parameter.grad is not None for parameter in step.core.parameters())


@pytest.mark.parametrize("micro_batch_size", [None, 6, 2])
def test_batch_is_sent_to_the_device_once_whatever_the_number_of_micro_batches(micro_batch_size):
    step = step_on("meta", micro_batch_size=micro_batch_size)
    with Sent() as sent:
        step._backward(batch(group=False))
    assert sent.shapes.count((BATCH, 3, 32, 32)) == 1
    assert sent.shapes.count((BATCH, 12)) == 2  # ids and mask
    assert not [shape for shape in sent.shapes if len(shape) == 4 and shape[0] < BATCH]


def test_pictures_beyond_what_a_device_should_hold_are_sent_by_micro_batches(monkeypatch):
    monkeypatch.setattr("training.step.MOST_ON_DEVICE", BATCH * 3 * 32 * 32 - 1)
    step = step_on("meta", micro_batch_size=6)
    with Sent() as sent:
        step._backward(batch(group=False))
    assert (BATCH, 3, 32, 32) not in sent.shapes
    assert sent.shapes.count((6, 3, 32, 32)) == 4  # two of them in two passes


def test_micro_batches_are_views_cut_at_their_longest_text():
    whole = batch()
    lengths = text_lengths(whole, HFCLIPConfig(text_config=TEXT))
    assert lengths == whole["attention_mask"].sum(dim=1).tolist()
    parts = split({**whole, "text_lengths": lengths}, 5)
    assert [len(part["group_id"]) for part in parts] == [3, 3, 2, 2, 2]
    assert sum((part["text_lengths"] for part in parts), []) == lengths
    for part in parts:
        assert part["input_ids"].shape[1] == max(part["text_lengths"])
        assert part["pixel_values"].untyped_storage().data_ptr() == whole["pixel_values"].untyped_storage().data_ptr()


def test_text_ends_at_its_first_end_token_and_left_padding_gives_no_lengths():
    whole, config = batch(), HFCLIPConfig(text_config=TEXT)
    whole["input_ids"][0, 2] = 99
    assert text_lengths(whole, config)[0] == 3
    whole["attention_mask"] = whole["attention_mask"].flip(1)
    assert text_lengths(whole, config) is None


def test_objective_with_a_head_of_its_own_learns_alike_in_micro_batches():
    """The loss of a pair depends on no other here: no gradient cache, one forward pass."""
    losses, weights = [], []
    for micro_batch_size in (None, 4):
        torch.manual_seed(0)
        step = step_on("cpu", model=WordPredictor, objective=BagOfWords, lr=1e-2, micro_batch_size=micro_batch_size)
        passes = []
        step.core.words.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        pairs = {name: values[:11] for name, values in batch().items()}  # micro-batches of 4, 4 and 3
        step.config.optim.batch_size = 11
        losses.append([step(pairs, number)["loss"] for number in range(4)])
        weights.append([parameter.detach() for parameter in step.core.parameters()])
        assert len(passes) == 4 * (1 if micro_batch_size is None else 3)
    assert losses[0][-1] < 0.95 * losses[0][0]
    # Sums in another order; AdamW divides by the root of squares, and so by rounding noise where there is no gradient.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for whole, parts in zip(*weights, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-3)
