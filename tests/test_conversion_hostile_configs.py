"""A config.json that no model has is refused in bounded time and memory, with what was found, by the library and by every
program that reads it."""

import copy
import json
import shutil
import time

import pytest
from conversion_utils import run_script
from transformers import CLIPConfig, CLIPModel

from hfclip import HFCLIPConfig, HFCLIPModel, HFCLIPTextConfig


SECONDS = 10  # of this process; what is refused takes thousandths of one
TEXT, VISION = "text_config", "vision_config"
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    text = dict(TINY, vocab_size=100, bos_token_id=98, eos_token_id=99, max_position_embeddings=16)
    config = HFCLIPConfig(text_config=text, vision_config=dict(TINY, image_size=16, patch_size=8), projection_dim=16)
    HFCLIPModel(config).save_pretrained(path := tmp_path_factory.mktemp("ours"))
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    text = dict(TINY, vocab_size=100, bos_token_id=98, eos_token_id=99, max_position_embeddings=16)
    config = CLIPConfig(text_config=text, vision_config=dict(TINY, image_size=16, patch_size=8), projection_dim=16)
    CLIPModel(config).save_pretrained(path := tmp_path_factory.mktemp("theirs"))
    return path


def nested(levels, value):
    for _ in range(levels):
        value = {TEXT: value} if levels > 250 else [value]
    return value


HUGE, ENDLESS = 10**9, 10**30
CASES = [
    *[(TEXT, {name: value}) for name in ("num_hidden_layers", "hidden_size", "vocab_size") for value in (HUGE, ENDLESS, -1, 0, True, "12", None, 1.5, [1], {"a": 1})],
    *[(TEXT, {name: value}) for name in ("intermediate_size", "num_attention_heads", "max_position_embeddings", "projection_dim") for value in (HUGE, -1, True, "x")],
    *[(VISION, {name: value}) for name in ("image_size", "patch_size", "num_channels", "num_hidden_layers") for value in (HUGE, ENDLESS, -1, 0, "x", None)],
    *[(VISION, dict(model_type="hfclip_resnet", depths=depths)) for depths in ([HUGE] * 4, [1, 1, 1, HUGE], [1, 1, 1], 5, [True] * 4, [-1] * 4, ["a"] * 4)],
    (VISION, dict(model_type="hfclip_resnet", stem_width=HUGE)),
    (TEXT, dict(hidden_size=100_000, num_attention_heads=100, num_hidden_layers=1_000)),
    *[(TEXT, {name: value}) for name in ("layer_norm_eps", "attention_dropout", "initializer_factor") for value in (float("nan"), float("inf"), -1.0, "x", True)],
    *[(None, {name: value}) for name in ("logit_scale_init_value", "logit_bias_init_value") for value in (float("nan"), float("inf"), 10**400, 1e300, "x", True)],
    *[(None, {"num_labels": value}) for value in (HUGE, -3, "x", True)],
    (None, dict(projection_dim=HUGE)),
    (None, dict(id2label=[1])),
    (None, dict(id2label={"a": "b"})),
    (TEXT, dict(eos_token_id=-1)),
    (TEXT, dict(pad_token_id=-5)),
    (TEXT, dict(hidden_act="nonsense")),
    *[(TEXT, dict(model_type=kind, **{name: HUGE})) for kind, name in (("bert", "num_hidden_layers"), ("distilbert", "n_layers"), ("gpt2", "n_layer"), ("t5", "num_layers"), ("gemma3_text", "num_hidden_layers"), ("bert", "num_labels"), ("bert", "vocab_size"))],
    *[(TEXT, dict(model_type="bert", **fields)) for fields in (dict(num_attention_heads=0), dict(hidden_size=-4), dict(hidden_act="nonsense"), dict(num_hidden_layers="x"))],
    *[(VISION, dict(model_type=kind, **fields)) for kind, fields in (("vit", dict(num_hidden_layers=HUGE)), ("vit", dict(image_size=HUGE)), ("vit", dict(patch_size=0)), ("resnet", dict(depths=[HUGE])), ("swin", dict(depths=[HUGE, 1])), ("convnext", dict(num_stages=HUGE)), ("siglip_vision_model", dict(num_hidden_layers=HUGE)), ("clip_vision_model", dict(num_hidden_layers=HUGE)), ("timm_wrapper", dict(architecture="resnet18", model_args={"depth": HUGE})))],
    *[(None, dict(quantization_config=value)) for value in ("x", [], {}, 7, {"quant_method": "nonsense"}, {"quant_method": ["a"]}, {"quant_method": "bitsandbytes", "load_in_4bit": "maybe"}, {"quant_method": "gptq", "bits": -7})],
    *[(part, dict(attn_implementation=value)) for part in (None, TEXT) for value in ("nonsense", 5, ["eager"], {"a": "b"}, "../x")],
    *[(None, dict(dtype=value)) for value in ("nonsense", 5, ["a"], "int8", "load")],
    *[(None, {key: value}) for key, value in (("to_dict", 5), ("__class__", "x"), ("sub_configs", 5), ("attribute_map", 5), ("use_return_dict", 3))],
    (None, dict(junk=nested(200, 1))),
    (None, dict(text_config=nested(300, {}))),
    (None, dict(text_config=5)),
    (None, dict(text_config="x")),
    (None, dict(text_pooling=["mean"])),
    (None, dict(model_type=["hfclip"])),
    (TEXT, dict(model_type={"a": 1})),
    (TEXT, dict(model_type=5)),
]  # fmt: skip


def changed(written, part, fields):
    config = copy.deepcopy(written)
    if part is None:
        return config | fields
    config[part] = fields if "model_type" in fields else config[part] | fields
    return config


def test_from_pretrained_refuses_each(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    written = json.loads((folder / "config.json").read_text())
    for part, fields in CASES:
        (source / "config.json").write_text(json.dumps(changed(written, part, fields)))
        started = time.process_time()
        with pytest.raises(ValueError, match="found|expected|refuse|field"):
            HFCLIPModel.from_pretrained(source)
            pytest.fail(f"opened {part} {fields}")
        assert time.process_time() - started < SECONDS, (part, fields)


@pytest.mark.parametrize("text", ["[1]", "5", "null", "[" * 100_000, '{"a":' * 100_000])
def test_from_pretrained_refuses_json_that_is_no_config(text, folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match="config"):
        HFCLIPModel.from_pretrained(source)


def test_a_config_object_refuses_the_same():
    for fields in (dict(num_hidden_layers=HUGE), dict(hidden_size="x"), dict(num_labels=HUGE), dict(vocab_size=True)):
        with pytest.raises(ValueError, match="found|expected"):
            HFCLIPTextConfig(**fields)
        with pytest.raises(ValueError, match="found|expected"):
            HFCLIPConfig(text_config=fields)


def test_published_sizes_are_far_below_the_limits():
    HFCLIPConfig(vision_config=dict(hidden_size=6144, intermediate_size=24576, num_hidden_layers=48, num_attention_heads=48, image_size=1024, patch_size=4))  # fmt: skip
    HFCLIPConfig(text_config=dict(vocab_size=901_629, eos_token_id=2, max_position_embeddings=8192))
    HFCLIPConfig(vision_config=dict(model_type="hfclip_resnet", depths=[3, 15, 36, 10], stem_width=128), projection_dim=1024)  # fmt: skip
    HFCLIPConfig(text_config=dict(model_type="llama", hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128))  # fmt: skip


# A case of each kind is enough for the programs: they all read configs through the same door.
EACH = [
    (TEXT, dict(num_hidden_layers=HUGE)),
    (VISION, dict(image_size=HUGE)),
    (TEXT, dict(vocab_size="x")),
    (VISION, dict(model_type="hfclip_resnet", depths=[HUGE] * 4)),
    (VISION, dict(model_type="convnext", depths=[1, 1, 1, HUGE])),
    (None, dict(quantization_config={"quant_method": "nonsense"})),
    (None, dict(attn_implementation="flash_attention_2")),
    (None, dict(num_labels=HUGE)),
    (None, dict(junk=nested(200, 1))),
    (None, dict(text_config=5)),
]


@pytest.mark.parametrize(
    "program, options",
    [
        ("export", ("--to", "transformers")),
        ("export", ("--to", "onnx")),
        ("surgery", ("resize", "--image-size", 32)),
        ("surgery", ("activation", "--to", "gelu")),
        ("convert_transformers", ()),
    ],
)
def test_programs_refuse_each_in_one_line(program, options, folder, theirs, tmp_path):
    start = theirs if program == "convert_transformers" else folder
    source = shutil.copytree(start, tmp_path / "source")
    written = json.loads((start / "config.json").read_text())
    for part, fields in EACH:
        if program == "convert_transformers" and "attn_implementation" in fields:
            continue  # no part of the result, which is built on the device of no data
        (source / "config.json").write_text(json.dumps(changed(written, part, fields)))
        before, after = (options[:1], options[1:]) if program == "surgery" else ((), options)
        started = time.process_time()
        result = run_script(program, *before, source, tmp_path / "out", *after, status=2)
        assert "found" in result.error or "refuse" in result.error or "FlashAttention" in result.error, result.error
        assert time.process_time() - started < SECONDS, (part, fields)
    assert not (tmp_path / "out").exists()
