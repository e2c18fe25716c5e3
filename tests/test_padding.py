"""Padding never changes an embedding: on either side, with any id, packed or not, in our text towers and in others'."""

import pytest
import torch
from test_modeling import BAG_OF_WORDS, CLOSE, EOS, TEXT, images, texts, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModelWithProjection

from hfclip import HFCLIPTextModelWithProjection, modeling_hfclip_text, packing_hfclip


BERT = dict(
    model_type="bert",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    vocab_size=100,
    max_position_embeddings=40,
)
ROBERTA = {**BERT, "model_type": "roberta", "pad_token_id": 1}
SIGLIP = {**BERT, "model_type": "siglip_text_model", "max_position_embeddings": 20, "pad_token_id": 1}
TOWERS = {
    "transformer": (dict(TEXT), None),
    "bag-of-words": (dict(BAG_OF_WORDS), None),
    "reads-padding": ({**TEXT, "causal": False, "pooling": "last"}, None),
    "bert-mean": (BERT, "mean"),
    "bert-pooler": (BERT, "pooler"),
    "bert-cls": (BERT, "cls"),
    "bert-last": (BERT, "last"),
    "roberta": (ROBERTA, "pooler"),
    "siglip": (SIGLIP, "pooler"),
}


def lengths() -> torch.Tensor:
    return (texts() == EOS).int().argmax(dim=1) + 1


def padded(pad: int, columns_before: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of `texts()`, each text moved to the right by its number of columns."""
    ids, mask = torch.full((5, 20), pad), torch.zeros(5, 20, dtype=torch.long)
    for row, (text, length, start) in enumerate(zip(texts(), lengths(), columns_before)):
        ids[row, start : start + length] = text[:length]
        mask[row, start : start + length] = 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("side", ["left", "both", "some"])
def test_left_padding_gives_the_embedding_of_the_text_alone(name, side):
    config, rule = TOWERS[name]
    model = tiny(text_config=dict(config), **({"text_pooling": rule} if rule else {}))
    pad = model.config.text_config.pad_token_id
    alone = [model.encode_text(text[None, :length], torch.ones(1, length)) for text, length in zip(texts(), lengths())]
    columns = {
        "left": [20 - n for n in lengths()],
        "both": [(20 - n) // 2 for n in lengths()],
        "some": [0, 3, 0, 1, 8],
    }
    # A tower that reads its padding was trained with one pad id; the others are blind to it.
    for pad_id in {pad} if name in ("reads-padding", "siglip") else {pad, 7, EOS}:
        ids, mask = padded(pad_id, columns[side])
        for found in (
            model.encode_text(ids, mask),
            model.encode_text(ids, mask.bool()),
            model(input_ids=ids, attention_mask=mask, pixel_values=images()).text_embeds,
        ):
            torch.testing.assert_close(found, torch.cat(alone), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_ways_through_the_text_tower_agree(attention):
    model = tiny()
    model.set_attn_implementation(attention)
    expected = model(input_ids=texts(), pixel_values=images()).text_embeds
    right, mask = padded(0, [0] * 5)
    hole = mask.clone()
    hole[:, 2] = 0
    for found in (
        model.encode_text(right),
        model.encode_text(right, mask),
        model.encode_text(right, text_lengths=lengths().tolist()),
        torch.cat([model.encode_text(text[None]) for text in right]),
    ):
        torch.testing.assert_close(found, expected, **CLOSE)
    # A token masked in the middle is not seen, and leaves its position behind.
    without = model(input_ids=right, attention_mask=hole, pixel_values=images()).text_embeds
    assert (without - expected).abs().max() > 1e-2
    torch.testing.assert_close(model.encode_text(right, hole), without, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("columns", [[0] * 5, [20 - n for n in lengths()]], ids=["right", "left"])
def test_skipped_padding_is_zero_and_the_rest_in_its_place(columns):
    tower = tiny().text_model
    ids, mask = padded(0, columns)
    plain, skipping = tower(ids, mask), tower(ids, mask, skip_padding=True)
    torch.testing.assert_close(skipping.pooler_output, plain.pooler_output, **CLOSE)
    expected = plain.last_hidden_state * mask[..., None]
    torch.testing.assert_close(skipping.last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hidden_states_behind_the_end_are_those_of_transformers(tmp_path):
    ours = HFCLIPTextModelWithProjection(tiny().config.text_config).eval()
    ours.text_model.config.hidden_act = "quick_gelu"
    ours.save_pretrained(tmp_path)
    model = tiny()
    theirs = CLIPTextModelWithProjection._from_config(
        CLIPTextModelWithProjection.config_class(**TEXT, projection_dim=48, hidden_act="quick_gelu")
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    expected = theirs(texts()).last_hidden_state
    torch.testing.assert_close(ours(texts()).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    model.text_model.load_state_dict(ours.text_model.state_dict())
    for outputs in (
        model.get_text_features(texts()),
        model(input_ids=texts(), pixel_values=images()).text_model_output,
    ):
        torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-4, atol=1e-5)


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for a device: values that are read, and sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_embedding_on_a_device_waits_for_nothing(monkeypatch, attention):
    """Stands in for a GPU: values there are not on the host, and reading one would be a wait."""
    model = tiny()
    model.set_attn_implementation(attention)
    ids, mask = padded(0, [20 - n for n in lengths()])
    expected, waits = model.encode_text(texts()), Reads()
    for module in (modeling_hfclip_text, packing_hfclip):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(modeling_hfclip_text, "check_texts", lambda *inputs: None)
    for inputs in (dict(input_ids=texts()), dict(input_ids=ids, attention_mask=mask)):
        with waits:
            found = model.encode_text(**inputs)
        torch.testing.assert_close(found, expected, **CLOSE)
    assert waits.found == []


def test_impossible_lengths_are_refused():
    model = tiny()
    for found in ([], [3], [0] * 5, [21] * 5):
        with pytest.raises(ValueError, match="expected one from 1 to 20 for each of 5 texts"):
            model.encode_text(texts(), text_lengths=found)
    for found in ("33333", [3.0] * 5, torch.tensor([3] * 5)):
        with pytest.raises(ValueError, match="expected a list of integers"):
            model.encode_text(texts(), text_lengths=found)
    with pytest.raises(ValueError, match="padded on the left"):
        model.encode_text(*padded(0, [20 - n for n in lengths()]), text_lengths=[20] * 5)
