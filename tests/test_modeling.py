"""The towers and the dual encoder: equal to transformers' CLIP where that exists, and to their own plain forms."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from hfclip import (
    HFCLIPConfig,
    HFCLIPForImageClassification,
    HFCLIPModel,
    HFCLIPResNetConfig,
    HFCLIPResNetModel,
    HFCLIPTextModel,
    HFCLIPTextModelWithProjection,
    HFCLIPVisionModelWithProjection,
)
from training.model import checkpoint_activations


PUBLISHED_PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}
EOS, BOS = 99, 98
TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    vocab_size=100,
    bos_token_id=BOS,
    eos_token_id=EOS,
    max_position_embeddings=20,
)
VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)
BAG_OF_WORDS = dict(
    model_type="hfclip_bag_of_words",
    hidden_size=64,
    vocab_size=100,
    bos_token_id=BOS,
    eos_token_id=EOS,
    max_position_embeddings=20,
)
RESNET = dict(model_type="hfclip_resnet", depths=(1, 2, 1, 1), stem_width=8, image_size=64)
# Differences of two float32 computations of one formula in another order of summation, on values of order 1.
CLOSE = dict(rtol=1e-4, atol=2e-6)


def tiny(**fields) -> HFCLIPModel:
    torch.manual_seed(0)
    config = {"text_config": dict(TEXT), "vision_config": dict(VISION), "projection_dim": 48, **fields}
    return HFCLIPModel(HFCLIPConfig(**config)).eval()


def tiny_clip(**kwargs) -> CLIPModel:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=dict(TEXT), vision_config=dict(VISION), projection_dim=48)
    model = CLIPModel._from_config(config, **kwargs).eval()
    # Larger than at initialisation, so that attention is far from uniform and errors show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        model.logit_scale.fill_(2.0)
    return model


def texts(batch_size: int = 5, length: int = 20, pad: int = 0) -> torch.Tensor:
    """Padded captions of different lengths, each `BOS ... EOS pad pad`."""
    torch.manual_seed(1)
    ids = torch.randint(1, BOS, (batch_size, length))
    ids[:, 0] = BOS
    for row in range(batch_size):
        end = 3 + 2 * row
        ids[row, end:] = pad
        ids[row, end] = EOS
    return ids


def images(batch_size: int = 5, size: int = 32) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(batch_size, 3, size, size)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # A key bias shifts all scores of a query alike: its gradient is zero but for rounding.
        atol = 1e-5 if name.endswith("k_proj.bias") else 2e-6
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_architectures_have_the_published_parameter_counts(name):
    with torch.device("meta"):
        model = HFCLIPModel(HFCLIPConfig.from_preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


class TestAgainstTransformers:
    """A random `transformers.CLIPModel`, saved, opened as ours, compared; and the other way round."""

    # flex attention has no backward on CPUs, flash attention needs a GPU.
    @pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
    def test_opens_a_clip_folder_with_equal_outputs_and_gradients(self, attention, tmp_path):
        theirs = tiny_clip(attn_implementation=attention)
        theirs.save_pretrained(tmp_path)
        ours, info = HFCLIPModel.from_pretrained(tmp_path, attn_implementation=attention, output_loading_info=True)
        assert not any(info.values()), info
        backward = attention != "flex_attention"
        inputs = dict(input_ids=texts(), pixel_values=images(), return_loss=True)
        for mask in (None, (texts() != 0).long()):
            with torch.set_grad_enabled(backward):
                for flags in ({}, {"output_hidden_states": True}):
                    expected = theirs(**inputs, attention_mask=mask, **flags)
                    found = ours(**inputs, attention_mask=mask, **flags)
                    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
                        torch.testing.assert_close(found[name], expected[name], **CLOSE)
                    self.assert_same_hidden_states(found, expected, flags)
        if backward:
            expected.loss.backward()
            found.loss.backward()
            assert_same_gradients(gradients(ours), gradients(theirs))

    def assert_same_hidden_states(self, found, expected, flags):
        torch.testing.assert_close(
            found.vision_model_output.last_hidden_state, expected.vision_model_output.last_hidden_state, **CLOSE
        )
        if flags:
            for tower in ("text_model_output", "vision_model_output"):
                assert len(found[tower].hidden_states) == len(expected[tower].hidden_states) == 4
                for ours, theirs in zip(found[tower].hidden_states, expected[tower].hidden_states):
                    torch.testing.assert_close(ours, theirs, **CLOSE)

    def test_packed_text_has_the_gradients_of_padded_text(self, tmp_path):
        theirs = tiny_clip()
        theirs.save_pretrained(tmp_path)
        ours = HFCLIPModel.from_pretrained(tmp_path).train()
        theirs.train()
        for model in (ours, theirs):
            model(input_ids=texts(), pixel_values=images(), return_loss=True).loss.backward()
        assert_same_gradients(gradients(ours), gradients(theirs))

    def test_attentions_agree(self, tmp_path):
        theirs = tiny_clip(attn_implementation="eager")
        theirs.save_pretrained(tmp_path)
        ours = HFCLIPModel.from_pretrained(tmp_path, attn_implementation="eager")
        inputs = dict(input_ids=texts(), pixel_values=images(), output_attentions=True)
        found, expected = ours(**inputs), theirs(**inputs)
        for tower in ("text_model_output", "vision_model_output"):
            assert len(found[tower].attentions) == 3
            for mine, other in zip(found[tower].attentions, expected[tower].attentions):
                torch.testing.assert_close(mine, other, **CLOSE)

    def test_transformers_opens_our_folder(self, tmp_path):
        ours = tiny()
        ours.save_pretrained(tmp_path)
        theirs, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        for model in (ours, theirs):
            model.train()
            model(input_ids=texts(), pixel_values=images(), return_loss=True).loss.backward()
        assert_same_gradients(gradients(ours), gradients(theirs))

    @pytest.mark.parametrize("theirs, ours", [
        (CLIPTextModelWithProjection, HFCLIPTextModelWithProjection),
        (CLIPVisionModelWithProjection, HFCLIPVisionModelWithProjection),
        (CLIPForImageClassification, HFCLIPForImageClassification),
        (CLIPTextModel, HFCLIPTextModel),
    ])  # fmt: skip
    def test_heads_open_folders_of_their_counterparts(self, theirs, ours, tmp_path):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=dict(TEXT), vision_config=dict(VISION), num_labels=7)
        if theirs is not CLIPForImageClassification:
            config = config.text_config if "Text" in theirs.__name__ else config.vision_config
        reference = theirs(config).eval()
        reference.save_pretrained(tmp_path)
        model, info = ours.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        inputs = {"input_ids": texts()} if "Text" in theirs.__name__ else {"pixel_values": images()}
        index = 1 if theirs is CLIPTextModel else 0
        torch.testing.assert_close(model(**inputs)[index], reference(**inputs)[index], **CLOSE)

    def test_parts_of_a_joint_folder_open_alone(self, tmp_path):
        joint = tiny()
        joint.save_pretrained(tmp_path)
        text = HFCLIPTextModelWithProjection.from_pretrained(tmp_path)
        vision = HFCLIPVisionModelWithProjection.from_pretrained(tmp_path)
        expected = joint.encode_text(texts(), normalize=False)
        torch.testing.assert_close(text(texts()).text_embeds, expected, **CLOSE)
        expected = joint.encode_image(images(), normalize=False)
        torch.testing.assert_close(vision(images()).image_embeds, expected, **CLOSE)

    def test_interpolated_positions_agree(self, tmp_path):
        theirs = tiny_clip()
        theirs.save_pretrained(tmp_path)
        ours = HFCLIPModel.from_pretrained(tmp_path)
        pixel_values = torch.randn(2, 3, 48, 40)
        expected = theirs.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(ours.get_image_features(pixel_values).pooler_output, expected, **CLOSE)

    def test_repairs_the_old_end_of_text_id(self, tmp_path):
        """Configs from before transformers' pull request 24773 say 2 and mean the highest id."""
        config = CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=dict(VISION), projection_dim=48)
        theirs = CLIPModel(config).eval()
        theirs.save_pretrained(tmp_path)
        ours = HFCLIPModel.from_pretrained(tmp_path)
        assert ours.config.text_config.eos_token_id == EOS
        expected = theirs.get_text_features(texts()).pooler_output
        torch.testing.assert_close(ours.get_text_features(texts()).pooler_output, expected, **CLOSE)


class TestText:
    def test_tokens_behind_the_end_change_nothing(self):
        model = tiny()
        garbage = texts()
        garbage[:, 16:] = 7
        torch.testing.assert_close(model.encode_text(garbage), model.encode_text(texts()), rtol=0, atol=1e-6)

    def test_computes_only_real_tokens(self):
        model, seen = tiny(), []
        model.text_model.encoder.layers[0].mlp.register_forward_hook(lambda *a: seen.append(a[1][0].shape[0]))
        ids = texts().repeat(10, 1)  # 400 real tokens of 1,000, computed as a multiple of 64
        model.encode_text(ids)
        assert int((ids != 0).sum()) == 400 and seen == [448]

    def test_padding_in_front_is_masked(self):
        model = tiny()
        ids = texts(1)[:, :4]
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
        mask = (torch.arange(7) >= 3).long()[None]
        positions = (torch.arange(7) - 3).clamp(min=0)[None]
        found = model.get_text_features(padded, mask, position_ids=positions).pooler_output
        expected = model.get_text_features(ids).pooler_output
        torch.testing.assert_close(found, expected, **CLOSE)

    def test_rejects_a_text_without_end(self):
        ids = texts()
        ids[2][ids[2] == EOS] = 5
        with pytest.raises(ValueError, match=r"no end-of-text token 99 in row\(s\) \[2\]"):
            tiny().encode_text(ids)

    def test_a_masked_text_without_end_is_pooled_at_its_last_token(self):
        model = tiny()
        ids = torch.tensor([[BOS, 4, 5, 0, 0]])
        states = model.text_model(ids[:, :3], torch.ones(1, 3)).last_hidden_state
        pooled = model.text_model(ids, torch.tensor([[1, 1, 1, 0, 0]])).pooler_output
        torch.testing.assert_close(pooled, states[:, 2], **CLOSE)

    def test_rejects_a_text_beyond_the_context(self):
        with pytest.raises(ValueError, match="found 21 tokens, expected at most 20"):
            tiny().encode_text(torch.full((1, 21), EOS))

    def test_bag_of_words_ignores_order_and_padding(self):
        model = tiny(text_config=dict(model_type="hfclip_bag_of_words", vocab_size=100, hidden_size=32,
                                      bos_token_id=BOS, eos_token_id=EOS))  # fmt: skip
        one = model.encode_text(torch.tensor([[BOS, 1, 2, 3, EOS, 0]]))
        other = model.encode_text(torch.tensor([[BOS, 3, 1, 2, EOS, 44]]))
        torch.testing.assert_close(one, other, **CLOSE)
        assert not torch.allclose(one, model.encode_text(torch.tensor([[BOS, 3, 1, EOS]])), atol=1e-3)


class TestImages:
    @pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
    def test_serves_other_sizes_and_refuses_impossible_ones(self, vision):
        model = tiny(vision_config=dict(vision))
        stride = 8 if vision is VISION else 32
        assert model.encode_image(torch.randn(2, 3, 4 * stride, 3 * stride)).shape == (2, 48)
        with pytest.raises(ValueError, match=f"multiples of {stride}"):
            model.encode_image(torch.randn(2, 3, 4 * stride, 3 * stride + 1))
        with pytest.raises(ValueError, match="interpolate_pos_encoding=False"):
            model.get_image_features(torch.randn(2, 3, 4 * stride, 3 * stride), interpolate_pos_encoding=False)
        with pytest.raises(ValueError, match="found shape"):
            model.encode_image(torch.randn(3, 32, 32))

    def test_interpolation_to_the_trained_grid_is_the_identity(self):
        embeddings = tiny().vision_model.embeddings
        other = copy.deepcopy(embeddings)
        other.grid_size = 4
        assert torch.equal(embeddings.positions(4, 4), embeddings.position_embedding.weight)
        assert embeddings.positions(6, 2).shape == (13, 64)

    def test_embedding_alone_equals_the_full_output(self):
        model = tiny()
        expected = model.get_image_features(images()).pooler_output
        torch.testing.assert_close(model.encode_image(images(), normalize=False), expected, **CLOSE)

    def test_patch_dropout_only_trains(self):
        model = tiny(vision_config={**VISION, "patch_dropout": 0.5})
        full = tiny()
        torch.testing.assert_close(model.encode_image(images()), full.encode_image(images()), **CLOSE)
        seen = []
        model.train().vision_model.encoder.layers[0].register_forward_hook(lambda *a: seen.append(a[2].shape[1]))
        model.encode_image(images())
        assert seen == [1 + 8]

    def test_resnet_exposes_its_feature_maps(self):
        model = HFCLIPResNetModel(HFCLIPResNetConfig(**{**RESNET, "projection_dim": 48}))
        outputs = model(images(2, 64), output_hidden_states=True)
        strides = [4, 4, 8, 16, 32]
        assert [tuple(m.shape[-2:]) for m in outputs.hidden_states] == [(64 // s, 64 // s) for s in strides]
        assert outputs.last_hidden_state.shape == (2, 256, 2, 2)
        assert outputs.pooler_output.shape == (2, 48)

    def test_resnet_pool_equals_multi_head_attention(self):
        """OpenAI's definition: torch's multi-head attention whose query is the mean of the map."""
        pool = HFCLIPResNetModel(HFCLIPResNetConfig(**{**RESNET, "projection_dim": 48})).attnpool
        feature_map = torch.randn(2, 256, 2, 2)
        tokens = feature_map.flatten(2).permute(2, 0, 1)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
        expected, _ = torch.nn.functional.multi_head_attention_forward(
            tokens[:1], tokens, tokens, 256, pool.num_heads, None,
            torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
            pool.c_proj.weight, pool.c_proj.bias, use_separate_proj_weight=True, need_weights=False,
            q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
        )  # fmt: skip
        torch.testing.assert_close(pool(feature_map), expected[0], **CLOSE)


class TestTraining:
    @pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
    def test_gradient_checkpointing_changes_nothing(self, vision):
        size = 32 if vision is VISION else 64
        plain = tiny(vision_config=dict(vision)).train()
        saving = copy.deepcopy(plain)
        checkpoint_activations(saving)
        for model in (plain, saving):
            model(input_ids=texts(), pixel_values=images(size=size), return_loss=True).loss.backward()
        assert_same_gradients(gradients(saving), gradients(plain))
        # Running statistics of BatchNorm move once, although the forward pass runs twice.
        for (name, found), expected in zip(saving.named_buffers(), plain.buffers()):
            torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}")

    @pytest.mark.slow
    def test_compiled_equals_eager(self):
        model = tiny()
        compiled = torch.compile(copy.deepcopy(model))
        for batch_size in (5, 3):
            inputs = dict(input_ids=texts(batch_size), pixel_values=images(batch_size))
            expected, found = model(**inputs), compiled(**inputs)
            torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-5)

    def test_embeds_only_equals_the_full_forward(self):
        model = tiny()
        full = model(input_ids=texts(), pixel_values=images())
        embeds = model(input_ids=texts(), pixel_values=images(), embeds_only=True)
        torch.testing.assert_close(embeds.image_embeds, full.image_embeds, **CLOSE)
        torch.testing.assert_close(embeds.text_embeds, full.text_embeds, **CLOSE)
        assert embeds.logits_per_image is None
        assert model(pixel_values=images(), embeds_only=True).text_embeds is None

    def test_a_frozen_tower_stays_as_it_is(self):
        model = tiny(vision_config=dict(RESNET)).train()
        model.freeze("vision")
        before = copy.deepcopy(model.vision_model.state_dict())
        model.train()
        model(input_ids=texts(), pixel_values=images(size=64), return_loss=True).loss.backward()
        assert all(parameter.grad is None for parameter in model.vision_model.parameters())
        assert model.text_projection.weight.grad is not None
        for name, tensor in model.vision_model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        with pytest.raises(ValueError, match="expected 'vision' or 'text'"):
            model.freeze("image")

    def test_sigmoid_trained_models_have_a_bias(self):
        model = tiny(logit_bias_init_value=-10.0, logit_scale_init_value=2.3)
        outputs = model(input_ids=texts(), pixel_values=images(), return_loss=True)
        expected = outputs.image_embeds @ outputs.text_embeds.T * model.logit_scale.exp() - 10
        torch.testing.assert_close(outputs.logits_per_image, expected, **CLOSE)
        signs = 2 * torch.eye(5) - 1
        loss = torch.log1p(torch.exp(-signs * expected)).sum() / 5
        torch.testing.assert_close(outputs.loss, loss, **CLOSE)

    def test_initial_weights_follow_openai(self):
        model = HFCLIPModel(
            HFCLIPConfig(text_config=dict(hidden_size=256, num_attention_heads=4, num_hidden_layers=2))
        )
        layer = model.text_model.encoder.layers[0]
        for weight, std in [
            (layer.self_attn.q_proj.weight, 256**-0.5),
            (layer.self_attn.out_proj.weight, 256**-0.5 * 4**-0.5),
            (layer.mlp.fc1.weight, 512**-0.5),
            (model.text_projection.weight, 256**-0.5),
            (model.text_model.embeddings.token_embedding.weight, 0.02),
        ]:
            # The standard deviation of n draws has a standard error of 1/sqrt(2n), here below 0.3 %.
            assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert model.logit_scale.item() == pytest.approx(2.6592)


class TestForeignTowers:
    BERT = dict(model_type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                vocab_size=100)  # fmt: skip
    TOWERS = {
        "swin": dict(vision_config=dict(model_type="swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1],
                                        num_heads=[2, 2], window_size=4)),
        "dinov2": dict(vision_config=dict(model_type="dinov2", hidden_size=32, num_hidden_layers=2, image_size=32,
                                          num_attention_heads=2, patch_size=8)),
        "convnext": dict(vision_config=dict(model_type="convnext", hidden_sizes=[8, 16, 24, 32],
                                            depths=[1, 1, 1, 1])),
        "bert": dict(text_config=BERT),
        "bert-cls": dict(text_config=BERT, text_pooling="cls"),
        "bert-pooler": dict(text_config=BERT, text_pooling="pooler"),
        "modernbert": dict(text_config=dict(model_type="modernbert", hidden_size=32, num_hidden_layers=2, pad_token_id=0,
                                            num_attention_heads=2, intermediate_size=64, vocab_size=100)),
    }  # fmt: skip

    @pytest.mark.parametrize("name", TOWERS)
    def test_trains_and_survives_saving(self, name, tmp_path):
        model = tiny(**copy.deepcopy(self.TOWERS[name])).train()
        model(input_ids=texts(), pixel_values=images(), return_loss=True).loss.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == [], "parameters without a gradient break data parallelism"
        model.eval().save_pretrained(tmp_path)
        again, info = HFCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        expected = model(input_ids=texts(), pixel_values=images()).logits_per_image
        torch.testing.assert_close(again(input_ids=texts(), pixel_values=images()).logits_per_image, expected)

    def test_padding_does_not_change_a_pooled_mean(self):
        model = tiny(text_config=dict(self.BERT))
        short = texts(1)[:, :4]
        torch.testing.assert_close(model.encode_text(texts(1)), model.encode_text(short), **CLOSE)

    def test_starts_from_pretrained_towers(self, tmp_path):
        source = tiny(**copy.deepcopy(self.TOWERS["dinov2"]), text_config=dict(self.BERT))
        source.vision_model.save_pretrained(tmp_path / "vision")
        source.text_model.save_pretrained(tmp_path / "text")
        model = HFCLIPModel.from_vision_text_pretrained(
            str(tmp_path / "vision"), str(tmp_path / "text"), projection_dim=48
        ).eval()
        ids, pixel_values = texts(), images()
        mask = (ids != 0).long()
        torch.testing.assert_close(
            model.vision_model(pixel_values).pooler_output, source.vision_model(pixel_values).pooler_output, **CLOSE
        )
        torch.testing.assert_close(model.text_model(ids, mask)[0], source.text_model(ids, mask)[0], **CLOSE)

    def test_rejects_a_pooler_that_is_not_there(self):
        config = dict(self.TOWERS["modernbert"]["text_config"])
        with pytest.raises(ValueError, match="no pooler_output"):
            tiny(text_config=config, text_pooling="pooler").encode_text(texts())


class TestLoading:
    @pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
    def test_saved_weights_come_back_bit_for_bit(self, vision, tmp_path):
        model = tiny(vision_config=dict(vision))
        model.save_pretrained(tmp_path)
        again = HFCLIPModel.from_pretrained(tmp_path)
        expected = model.state_dict()
        assert again.state_dict().keys() == expected.keys()
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, expected[name]), name

    def test_a_missing_projection_leaves_loaded_weights_alone(self, tmp_path):
        """Transformers issue 46620: loading a part must not draw the rest of the model anew."""
        model = tiny()
        state = {name: t for name, t in model.state_dict().items() if name != "visual_projection.weight"}
        model.save_pretrained(tmp_path, state_dict=state)
        again, info = HFCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {"visual_projection.weight"}
        for name, tensor in state.items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert 0.05 < again.visual_projection.weight.std() < 0.5  # initialised, not left over memory

    @pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
    @pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
    def test_every_attention_implementation_loads(self, vision, attention, tmp_path):
        tiny(vision_config=dict(vision)).save_pretrained(tmp_path)
        model = HFCLIPModel.from_pretrained(tmp_path, attn_implementation=attention)
        assert model.text_model.config._attn_implementation == attention

    def test_half_precision_and_device_map(self, tmp_path):
        tiny().save_pretrained(tmp_path)
        model = HFCLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        embeds = model.encode_image(images().bfloat16())
        assert embeds.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits: each of the 48 squares is within 2^-8, and so is their sum.
        torch.testing.assert_close(embeds.float().norm(dim=-1), torch.ones(5), rtol=0, atol=2**-8)

    def test_weight_only_quantisation(self, tmp_path):
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
        from transformers import TorchAoConfig

        model = tiny()
        model.save_pretrained(tmp_path)
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        quantised = HFCLIPModel.from_pretrained(tmp_path, quantization_config=config)
        assert type(quantised.text_model.encoder.layers[0].mlp.fc1.weight.data) is not torch.Tensor
        cosines = (quantised.encode_image(images()) * model.encode_image(images())).sum(-1)
        # 8 bits a weight are 0.4 % of each row's largest; over a few layers directions move by about a percent.
        assert cosines.min() > 0.999
        texts_again = [quantised(input_ids=texts(), pixel_values=images()).text_embeds for _ in range(2)]
        assert torch.equal(*texts_again)


class TestAdapters:
    def test_lora_trains_every_projection(self):
        peft = pytest.importorskip("peft")
        model = tiny()
        before = model.encode_image(images())
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        torch.testing.assert_close(model.encode_image(images()), before, **CLOSE)
        model.train()(input_ids=texts(), pixel_values=images(), return_loss=True).loss.backward()
        adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
        assert len(adapters) == 2 * 6 * 6  # two matrices, six projections, three layers in each of two towers
        assert all(p.grad is not None for p in adapters.values())
        assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("fields, message", [
    (dict(vision_config={**VISION, "image_size": 36}), "multiple of the patch. The nearest is 32"),
    (dict(vision_config={**VISION, "hidden_size": 66}), "the number of heads divides"),
    (dict(vision_config={**VISION, "patch_dropout": 1.0}), r"a share in \[0, 1\)"),
    (dict(vision_config={**VISION, "hidden_act": "quik_gelu"}), "quick_gelu"),
    (dict(vision_config={**RESNET, "image_size": 100}), "a multiple of the total stride, 32"),
    (dict(vision_config={**RESNET, "depths": (1, 2)}), "four positive numbers"),
    (dict(vision_config={**RESNET, "projection_dim": 7}), "the same, since this tower"),
    (dict(text_config={**TEXT, "eos_token_id": 100}), "an id from 0 to 99"),
    (dict(text_config={**TEXT, "hiden_size": 64}), "Did you mean `hidden_size`"),
    (dict(text_config=dict(VISION, model_type="hfclip_vit")), "expected a text tower"),
    (dict(text_config=dict(model_type="brt")), "Did you mean `bert`"),
    (dict(text_pooling="mean"), "expected 'pooler'"),
    (dict(projection_dim=0), "a positive number"),
    (dict(text_config={**TEXT, "layer_norm_eps": -1.0}), "layer_norm_eps=-1.0, expected a positive number"),
    (dict(logit_scale_init_value=float("nan")), "logit_scale_init_value=nan, expected a finite number"),
])  # fmt: skip
def test_rejects_impossible_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_rejects_an_unknown_preset():
    with pytest.raises(ValueError, match="Did you mean 'ViT-B/32'"):
        HFCLIPConfig.from_preset("vit-b/32")
    with pytest.raises(ValueError, match="Unknown preset None"):
        HFCLIPConfig.from_preset(None)


def test_presets_take_changes_of_single_fields():
    config = HFCLIPConfig.from_preset(
        "ViT-L/14", vision_config={"patch_dropout": 0.5}, text_config={"vocab_size": 60000}
    )
    assert (config.vision_config.hidden_size, config.vision_config.patch_dropout) == (1024, 0.5)
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (768, 60000)
    with pytest.raises(ValueError, match="no field `patch_dropout`.*vision_config"):
        HFCLIPConfig.from_preset("ViT-B/32", patch_dropout=0.5)


def test_a_shared_tower_config_is_left_as_it_was():
    text = HFCLIPConfig.from_preset("ViT-B/32").text_config
    HFCLIPConfig(text_config=text, projection_dim=64)
    assert text.projection_dim == 512


def test_a_tower_of_another_kind_is_refused(tmp_path):
    tiny(vision_config=dict(RESNET)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hfclip_resnet"):
        HFCLIPVisionModelWithProjection.from_pretrained(tmp_path)


@pytest.mark.parametrize("inputs, message", [
    (dict(pixel_values=[[0.0]]), "pixel_values.*found a list"),
    (dict(input_ids=[[1, EOS]]), "input_ids.*found a list"),
    (dict(input_ids=torch.tensor([[1, 100, EOS]])), "found id 100, expected 0 to 99"),
    (dict(input_ids=torch.tensor([[1, -1, EOS]])), "found id -1, expected 0 to 99"),
    (dict(input_ids=torch.zeros(2, 0, dtype=torch.long)), r"found shape \(2, 0\)"),
    (dict(input_ids=texts()[:0]), r"found shape \(0, 20\)"),
    (dict(pixel_values=torch.zeros(0, 3, 32, 32)), r"found shape \(0, 3, 32, 32\)"),
    (dict(attention_mask=torch.ones(5, 3)), r"found shape \(5, 3\), expected that of input_ids, \(5, 20\)"),
    (dict(return_loss=True), "found 2 images and 5 texts"),
])  # fmt: skip
@pytest.mark.parametrize("text_tower", [TEXT, dict(BAG_OF_WORDS)])
def test_rejects_inputs_that_do_not_fit(text_tower, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny(text_config=text_tower)(**{"input_ids": texts(), "pixel_values": images(2), **inputs})


class TestVariantsOfOpenCLIP:
    """Towers with another pooling, without the first LayerNorm, or that see the whole text, against plain attention."""

    @staticmethod
    def plain_blocks(encoder, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden)"""
        for layer in encoder.layers:
            attention, y = layer.self_attn, layer.layer_norm1(x)
            parts = (attention.q_proj(y), attention.k_proj(y), attention.v_proj(y))
            q, k, v = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
            scores = q @ k.mT / attention.head_dim**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
            x = x + attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.layer_norm2(x))
        return x

    @staticmethod
    def assert_trains(tower, pooled: torch.Tensor) -> None:
        pooled.square().sum().backward()
        for name, gradient in gradients(tower).items():
            # A key bias shifts all scores of a query alike: its gradient is zero but for rounding.
            assert gradient is not None and gradient.isfinite().all(), name
            assert name.endswith("k_proj.bias") or gradient.abs().max() > 0, name

    @pytest.mark.parametrize("pooling", ["cls", "mean", "norm_of_mean"])
    @pytest.mark.parametrize("pre_layer_norm", [True, False])
    def test_image_tower_equals_its_plain_form(self, pooling, pre_layer_norm):
        model = tiny(vision_config={**VISION, "pooling": pooling, "pre_layer_norm": pre_layer_norm})
        tower, pixels = model.vision_model, images(3)
        assert ("vision_model.pre_layrnorm.weight" in model.state_dict()) == pre_layer_norm
        x = tower.embeddings(pixels)
        x = self.plain_blocks(tower.encoder, tower.pre_layrnorm(x) if pre_layer_norm else x)
        expected = {
            "cls": tower.post_layernorm(x[:, 0]),
            "mean": tower.post_layernorm(x[:, 1:]).mean(1),
            "norm_of_mean": tower.post_layernorm(x[:, 1:].mean(1)),
        }
        for pooled_only in (True, False):
            pooled = tower(pixels, pooled_only=pooled_only).pooler_output
            torch.testing.assert_close(pooled, expected[pooling], **CLOSE)
        others = [value for name, value in expected.items() if name != pooling]
        assert all((pooled - value).abs().max() > 1e-2 for value in others)
        projected = model.encode_image(pixels, normalize=False)
        torch.testing.assert_close(projected, model.visual_projection(expected[pooling]), **CLOSE)
        self.assert_trains(tower, tower(pixels, pooled_only=True).pooler_output @ torch.randn(64, 8))

    def test_mean_pooling_takes_other_sizes_and_dropped_patches(self):
        tower = tiny(vision_config={**VISION, "pooling": "mean", "patch_dropout": 0.5}).vision_model
        assert tower(images(2, 48)).pooler_output.shape == (2, 64)
        assert tower.train()(images(2)).last_hidden_state.shape == (2, 1 + 8, 64)

    @pytest.mark.parametrize(
        "fields",
        [
            dict(causal=False),
            dict(causal=False, pooling="first"),
            dict(causal=False, pooling="last"),
            dict(pooling="last"),
            dict(causal=False, pooling="last", pad_token_id=7),
        ],
    )
    def test_text_tower_that_reads_padding_equals_its_plain_form(self, fields):
        model = tiny(text_config={**TEXT, **fields})
        tower, config = model.text_model, model.config.text_config
        assert config.reads_padding
        ids = texts(5, 20, pad=config.pad_token_id)
        x = tower.embeddings(ids, torch.arange(20)[None])
        x = tower.final_layer_norm(self.plain_blocks(tower.encoder, x, causal=config.causal))
        position = {"eos": (ids == EOS).int().argmax(1), "first": 0, "last": 19}[config.pooling]
        expected = x[torch.arange(5), position]
        torch.testing.assert_close(tower(ids).pooler_output, expected, **CLOSE)
        # Texts cut behind the longest are filled up again, and a mask takes no padding away.
        short, mask = ids[:, :14], (torch.arange(14) < 6).long().expand(5, 14)
        torch.testing.assert_close(tower(short).pooler_output, expected, **CLOSE)
        torch.testing.assert_close(model.encode_text(short, mask, normalize=False), model.text_projection(expected), **CLOSE)  # fmt: skip
        outputs = tower(ids, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(outputs.pooler_output, expected, **CLOSE)
        assert len(outputs.hidden_states) == 4
        self.assert_trains(tower, tower(ids).pooler_output @ torch.randn(64, 8))

    def test_padding_changes_the_embedding_only_where_the_tower_reads_it(self):
        for fields, reads in ((dict(), False), (dict(causal=False), True), (dict(pooling="last"), True)):
            model = tiny(text_config={**TEXT, **fields})
            with torch.no_grad():
                one, other = (model.encode_text(texts(pad=pad)) for pad in (0, 5))
            assert torch.allclose(one, other, **CLOSE) != reads

    def test_variants_save_and_load(self, tmp_path):
        vision, text = dict(pooling="mean", pre_layer_norm=False), dict(causal=False, pooling="last")
        model = tiny(vision_config={**VISION, **vision}, text_config={**TEXT, **text})
        model.save_pretrained(tmp_path)
        loaded, info = HFCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            inputs = dict(input_ids=texts(), pixel_values=images())
            assert torch.equal(loaded.eval()(**inputs).logits_per_image, model(**inputs).logits_per_image)

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        fields = dict(vision_config={**VISION, "pooling": "mean"}, text_config={**TEXT, "causal": False})
        plain, saving = tiny(**fields).train(), tiny(**fields).train()
        checkpoint_activations(saving)
        for model in (plain, saving):
            model(texts(), images(), return_loss=True).loss.backward()
        assert_same_gradients(gradients(saving), gradients(plain))

    @pytest.mark.parametrize(
        "tower, message",
        [
            (dict(text_config=dict(pooling="first")), "pooling='first' in a causal tower"),
            (dict(text_config=dict(pooling="mean")), "pooling"),
            (dict(vision_config=dict(pooling="last")), "pooling"),
            (dict(vision_config=dict(pre_layrnorm=False)), "Did you mean `pre_layer_norm`"),
        ],
    )
    def test_rejects_combinations_that_make_no_sense(self, tower, message):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            HFCLIPConfig(**tower)

    def test_rejects_texts_that_cannot_be_filled_up_or_pooled(self):
        tower = tiny(text_config={**TEXT, "causal": False, "pad_token_id": None}).text_model
        with pytest.raises(ValueError, match="names no pad_token_id"):
            tower(texts(2, 14))
        assert tower(texts(2, 20)).pooler_output.shape == (2, 64)
        with pytest.raises(ValueError, match="no end-of-text token"):
            tower(torch.full((2, 20), 5))
