"""Configurations of the towers and of the dual encoder.

A tower is chosen by the `model_type` of its config: `hfclip_vit`, `hfclip_resnet`, `hfclip_text` and
`hfclip_bag_of_words` are ours, any other type is one that transformers knows. Configs written by transformers'
`CLIPModel` are read as they are: `clip`, `clip_text_model` and `clip_vision_model` mean ours. So are those of its other
dual encoders (`families_hfclip`), and of its VisionTextDualEncoderModel, whose towers are pooled by their own poolers.

    dict / config object / folder -> translate (transformers' dual encoders -> ours) -> limits -> typed fields -> validate_*

Sizes and settings that no model has (`limits_hfclip`) and fields of the wrong kind are refused with a ValueError that
says what was found, what was expected and what to do, before anything is built.
"""

import copy
import difflib
from typing import Any, Literal

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .families_hfclip import refuse_other_families
from .foreign_hfclip import foreign, is_foreign, pinned
from .limits_hfclip import limited, refuse_absurd
from .presets_hfclip import fields_of_preset
from .projection_hfclip import ProjectionType, require_projection
from .requirements_hfclip import Requirements
from .translation_hfclip import TRANSFORMERS_MODEL_TYPES, build_foreign_config, translate_transformers_config


Pooling = Literal["pooler", "cls", "mean", "last"]


class HFCLIPBaseConfig(Requirements, PreTrainedConfig):
    """What all hfclip configs share: reading transformers' CLIP configs, and refusing misspelt fields."""

    _auto_class = "AutoConfig"  # saved folders carry this code, so that they load where hfclip is not installed

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)
        # Also run by @strict, which would wrap the ValueError in an error of its own.
        self.validate_architecture()

    def _refuse_misspelt(self, unknown: dict[str, Any]) -> None:
        """An unknown key is kept, as in every transformers config, unless it is nearly the name of a field."""
        fields = [name for name in self.__dataclass_fields__ if not name.startswith("_")]
        misplaced = self._fields_of_parts() & unknown.keys()
        if misplaced:
            raise ValueError(
                f"{type(self).__name__} has no field `{sorted(misplaced)[0]}`: it belongs in text_config or vision_config."
            )
        accepted = {*fields, "num_labels", "attn_implementation", "output_attentions", "torch_dtype", "model_type"}
        for key in unknown.keys() - accepted:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.87)
            if nearest:
                raise ValueError(f"{type(self).__name__} has no field `{key}`. Did you mean `{nearest[0]}`?")

    def _fields_of_parts(self) -> set[str]:
        """Names of fields that only sub-configs have."""
        return set()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        kwargs = pinned(pretrained_model_name_or_path, kwargs)
        if is_foreign(pretrained_model_name_or_path, kwargs):
            return foreign(pretrained_model_name_or_path).open_config(pretrained_model_name_or_path, **kwargs)
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            config_dict.keys()
        except (AttributeError, TypeError, RecursionError) as error:  # JSON that is no object, or nested without end
            raise ValueError(
                f"{pretrained_model_name_or_path}: found a config.json that is no config ({type(error).__name__}: {error}), "
                "expected an object of a model's settings. Fetch the file again."
            ) from error
        refuse_absurd(str(pretrained_model_name_or_path), config_dict)
        written = config_dict.get("model_type")
        if (
            cls.model_type not in TOWER_CONFIGS
            and isinstance(written, str | None)
            and written not in TRANSFORMERS_MODEL_TYPES
        ):
            refuse_other_families(str(pretrained_model_name_or_path), written)
        config_dict = translate_transformers_config(config_dict)
        found = (config_dict.get(cls.base_config_key) or config_dict).get("model_type", cls.model_type)
        if cls.model_type in TOWER_CONFIGS and found != cls.model_type and found in TOWER_CONFIGS:
            raise ValueError(
                f"{pretrained_model_name_or_path}: found a tower of type `{found}`, expected `{cls.model_type}`. Open "
                "it with AutoModel, or with the class of its own type."
            )
        return config_dict, kwargs


@limited
class HFCLIPTextConfig(HFCLIPBaseConfig):
    """Causal text transformer, pooled at the first end-of-text token (paper section 2.4).

    Fields carry the names of transformers' `CLIPTextConfig`; `projection_dim` is the size of the joint space. Some of
    OpenCLIP's towers are not causal (CLIPA), or pool the first or last position in place of the end-of-text token, or
    `class`, a learned token after the text (CoCa). Such a tower reads its padding, so it fills texts up to
    `max_position_embeddings` with `pad_token_id`. `layer_scale_init_value`: blocks scale what they add (LayerScale).
    """

    model_type = "hfclip_text"
    kind = "transformer"
    base_config_key = "text_config"
    pooler_is_projected = False

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    initializer_factor: int | float = 1.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    causal: bool = True
    pooling: Literal["eos", "first", "last", "class"] = "eos"
    layer_scale_init_value: float | int | None = None
    projection_type: ProjectionType = "linear"

    @property
    def reads_padding(self) -> bool:
        """Whether tokens after the end of a text change its embedding."""
        return not self.causal or self.pooling != "eos"

    @property
    def packs_texts(self) -> bool:
        """Whether nothing needs to be computed after the first end-of-text token."""
        return not self.reads_padding

    def validate_architecture(self):
        self._require_transformer(self.vocab_size + self.max_position_embeddings)
        self._require_ids()
        self._require(
            not (self.causal and self.pooling == "first"),
            "pooling='first' in a causal tower, whose first position sees nothing of the text",
            "pooling='eos' or 'last', or causal=False",
            "OpenAI's models are causal and pool at 'eos'.",
        )
        self._require(
            self.pooling != "class" or self.causal and self.pad_token_id is not None,
            f"pooling='class' with causal={self.causal} and pad_token_id={self.pad_token_id}",
            "a causal tower that knows its padding",
            "CoCa's has the id 0.",
        )


@limited
class HFCLIPBagOfWordsConfig(HFCLIPBaseConfig):
    """Bag-of-words (CBOW) text tower: the mean of the token embeddings (baseline of the paper's figure 2)."""

    model_type = "hfclip_bag_of_words"
    kind = "bag of words"
    base_config_key = "text_config"
    pooler_is_projected = False
    reads_padding = False

    vocab_size: int = 49408
    hidden_size: int = 512
    projection_dim: int = 512
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    initializer_factor: int | float = 1.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def validate_architecture(self):
        self._require_eps()
        self._require_initializer_factor()
        self._require_parameters((self.vocab_size + self.max_position_embeddings) * self.hidden_size)
        self._require_ids()


@limited
class HFCLIPVisionConfig(HFCLIPBaseConfig):
    """Vision transformer with a class token and a LayerNorm before the blocks (paper section 2.4).

    `patch_dropout` is the share of patches left out in training (FLIP, arXiv 2212.00794); evaluation sees them all.
    `image_size` and `patch_size` are in pixels; other image sizes are served by interpolating the positions.

    Some of OpenCLIP's towers (CLIPA) have no LayerNorm before the blocks, `pre_layer_norm: false`, or another pooling:
    `cls` is the class token after the last LayerNorm, `mean` the mean of the patches after it, `norm_of_mean` the
    LayerNorm of the mean of the patches, `attention` that of what a learned query of `projection_dim` dimensions and
    `pooling_heads` heads sees (CoCa). `layer_scale_init_value`: blocks scale what they add (LayerScale).
    """

    model_type = "hfclip_vit"
    kind = "ViT"
    base_config_key = "vision_config"
    pooler_is_projected = False

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    patch_dropout: int | float = 0.0
    pre_layer_norm: bool = True
    pooling: Literal["cls", "mean", "norm_of_mean", "attention"] = "cls"
    pooling_heads: int = 8
    layer_scale_init_value: float | int | None = None
    projection_type: ProjectionType = "linear"
    initializer_factor: int | float = 1.0

    @property
    def stride(self) -> int:
        """Pixels that the side of an image has to be a multiple of."""
        return self.patch_size

    @property
    def projection_size(self) -> int | None:
        """Size of the pooled output, where it is not `hidden_size`."""
        return self.projection_dim if self.pooling == "attention" else None

    def validate_architecture(self):
        num_patches, size_of_patch = (self.image_size // self.patch_size) ** 2, self.num_channels * self.patch_size**2
        self._require_transformer(num_patches + size_of_patch)
        self._require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} and patch_size={self.patch_size}",
            "an image size that is a multiple of the patch",
            f"The nearest is {max(1, round(self.image_size / self.patch_size)) * self.patch_size}.",
        )
        self._require(
            0.0 <= self.patch_dropout < 1.0,
            f"patch_dropout={self.patch_dropout}",
            "a share in [0, 1)",
            "FLIP trains with 0.5 or 0.75; 0 keeps all patches.",
        )
        self._require(
            self.pooling != "attention" or self.pooling_heads > 0 and self.projection_dim % self.pooling_heads == 0,
            f"projection_dim={self.projection_dim} and pooling_heads={self.pooling_heads}",
            "a joint space whose dimensions the heads divide",
            "CoCa has 8 heads.",
        )


@limited
class HFCLIPResNetConfig(HFCLIPBaseConfig):
    """Modified ResNet with attention pooling (paper section 2.4).

    `depths` are the blocks of the four stages, `stem_width` the channels after the stem; stage n has
    `stem_width * 4 * 2**n` channels. The attention pool maps to `projection_dim` itself, so the dual encoder adds
    no projection. `num_attention_heads` of the pool defaults to 64 channels a head. `zero_init_residual` starts each
    block as its shortcut, as OpenAI does for long training; small models and short runs learn faster without.
    """

    model_type = "hfclip_resnet"
    kind = "ModifiedResNet with attention pooling"
    facts = ("image_size", "depths", "stem_width")  # that describe it; other towers by all fields that a card knows
    base_config_key = "vision_config"
    pooler_is_projected = True
    stride = 32  # pixels that the side of an image has to be a multiple of

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    stem_width: int = 64
    projection_dim: int = 1024
    num_attention_heads: int | None = None
    num_channels: int = 3
    image_size: int = 224
    zero_init_residual: bool = True
    initializer_factor: int | float = 1.0

    def __post_init__(self, **kwargs):
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.stem_width * 32 // 64)
        self.depths = list(self.depths)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of the last feature map, before the attention pool."""
        return self.stem_width * 32

    @property
    def num_hidden_layers(self) -> int:
        """Stages: `hidden_states` holds the stem and then one map a stage."""
        return len(self.depths)

    def validate_architecture(self):
        self._require(
            len(self.depths) == 4 and min(self.depths) > 0,
            f"depths={self.depths}",
            "four positive numbers of blocks",
            "RN50 has (3, 4, 6, 3).",
        )
        self._require_initializer_factor()
        # Two 1x1 convolutions of four times the width and one of 3x3; the attention pool has three square matrices.
        in_blocks = sum(17 * number * (self.stem_width * 2**stage) ** 2 for stage, number in enumerate(self.depths))
        self._require_parameters(in_blocks + 3 * self.hidden_size**2)
        self._require(self.stem_width % 2 == 0, f"stem_width={self.stem_width}", "an even number", "RN50 has 64.")
        self._require(
            self.image_size % self.stride == 0,
            f"image_size={self.image_size}",
            f"a multiple of the total stride, {self.stride}",
            f"The nearest is {max(1, round(self.image_size / self.stride)) * self.stride}.",
        )
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            f"num_attention_heads={self.num_attention_heads} for {self.hidden_size} channels",
            "a number of heads that divides the channels",
            f"Leave it out to get {max(1, self.hidden_size // 64)}.",
        )


TOWER_CONFIGS = {
    config.model_type: config
    for config in (HFCLIPTextConfig, HFCLIPBagOfWordsConfig, HFCLIPVisionConfig, HFCLIPResNetConfig)
}


@limited
class HFCLIPConfig(HFCLIPBaseConfig):
    """Dual encoder: an image tower, a text tower, and a joint space of `projection_dim` dimensions.

    Each sub-config is a config object, or a dict with a `model_type` (default: our ViT and our text transformer).
    A tower of a type that only AutoModel knows is pooled by a named rule before its projection:

    - `pooler`: the tower's own `pooler_output` (default for images),
    - `cls`: the first position, `mean`: the mean over real positions (default for foreign text towers),
      `last`: the last real position.

    `text_projection_type` and `vision_projection_type` are kinds of `projection_hfclip`, by default `linear`.
    `logit_scale_init_value` is the natural logarithm of the initial scale, ln(1/0.07) in the paper.
    `logit_bias_init_value` exists for models trained with the sigmoid loss (SigLIP: -10) and is None otherwise.
    """

    model_type = "hfclip"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    text_pooling: Pooling | None = None
    vision_pooling: Pooling | None = None
    text_projection_type: ProjectionType | None = None
    vision_projection_type: ProjectionType | None = None
    logit_scale_init_value: float | int = 2.6592
    logit_bias_init_value: float | int | None = None
    initializer_factor: int | float = 1.0

    def __post_init__(self, **kwargs):
        self.text_config = self._tower_config(self.text_config, HFCLIPTextConfig)
        self.vision_config = self._tower_config(self.vision_config, HFCLIPVisionConfig)
        own_text = self.text_config.model_type in TOWER_CONFIGS
        self.text_pooling = self.text_pooling or ("pooler" if own_text else "mean")
        self.vision_pooling = self.vision_pooling or "pooler"
        self.text_projection_type = self._projection_type(self.text_projection_type, self.text_config)
        self.vision_projection_type = self._projection_type(self.vision_projection_type, self.vision_config)
        super().__post_init__(**kwargs)
        if self.logit_bias_init_value is not None:
            # transformers' zero-shot pipeline takes the sigmoid, not the softmax, where it reads this word here. What is
            # saved is the type of the class.
            self.model_type = f"{type(self).model_type}_siglip"

    def _fields_of_parts(self) -> set[str]:
        parts = {name for tower in TOWER_CONFIGS.values() for name in tower.__dataclass_fields__}
        return parts - self.__dataclass_fields__.keys()

    def _tower_config(self, config: dict | PreTrainedConfig | None, default: type) -> PreTrainedConfig:
        if isinstance(config, PreTrainedConfig) and config.model_type in TRANSFORMERS_MODEL_TYPES:
            config = config.to_dict()
        if isinstance(config, PreTrainedConfig):
            refuse_absurd(type(config).__name__, vars(config))
            tower = copy.deepcopy(config)  # the joint space's size is written into it
        else:
            fields = translate_transformers_config(dict(config or {}))
            model_type = fields.pop("model_type", default.model_type)
            if model_type in TOWER_CONFIGS:
                tower = TOWER_CONFIGS[model_type](**{"projection_dim": self.projection_dim, **fields})
            elif model_type in CONFIG_MAPPING:
                tower = build_foreign_config(CONFIG_MAPPING[model_type], fields)
            else:
                near = difflib.get_close_matches(str(model_type), [*TOWER_CONFIGS, *CONFIG_MAPPING], n=1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                raise ValueError(
                    f"Unknown tower `model_type` {model_type!r}: expected one of {sorted(TOWER_CONFIGS)} or a type "
                    f"that transformers' AutoModel knows.{hint}"
                )
        if tower.model_type in TOWER_CONFIGS and not tower.pooler_is_projected:
            tower.projection_dim = self.projection_dim
        return tower

    @staticmethod
    def _projection_type(kind: ProjectionType | None, tower: PreTrainedConfig) -> ProjectionType:
        kind = kind or getattr(tower, "projection_type", None) or "linear"
        if isinstance(tower, HFCLIPTextConfig | HFCLIPVisionConfig):
            tower.projection_type = kind  # also for the tower alone, with its projection
        return kind

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images that the image tower was built for."""
        return self.vision_config.image_size

    # Our towers' configs say the following themselves; for those of AutoModel it is settled here.

    @property
    def image_stride(self) -> int:
        """Pixels that the side of an image has to be a multiple of."""
        return getattr(self.vision_config, "stride", None) or getattr(self.vision_config, "patch_size", 32)

    @property
    def is_naflex(self) -> bool:
        """Whether images are taken in their own shapes, as patches, and not as squares."""
        return self.vision_config.model_type == "siglip2_vision_model"

    @property
    def has_patches(self) -> bool:
        """Whether the image tower can leave out patches in training."""
        return hasattr(self.vision_config, "patch_dropout")

    @property
    def text_reads_padding(self) -> bool:
        """Whether the text tower computes its whole context, also for shorter texts."""
        # SigLIP's are trained on texts padded to the full context, without a mask: the pooled last position sees it.
        is_siglip = self.text_config.model_type in ("siglip_text_model", "siglip2_text_model")
        return getattr(self.text_config, "reads_padding", is_siglip and self.text_pooling == "pooler")

    @property
    def packs_texts(self) -> bool:
        """Whether the text tower computes nothing after the first end-of-text token."""
        return getattr(self.text_config, "packs_texts", False)

    def validate_architecture(self):
        self._require_finite("logit_scale_init_value", "logit_bias_init_value")
        self._require_initializer_factor()
        expected_key = {"text_config": self.text_config, "vision_config": self.vision_config}
        for key, config in expected_key.items():
            found_key = getattr(config, "base_config_key", "") if config.model_type in TOWER_CONFIGS else key
            self._require(
                found_key == key, f"{key} of type `{config.model_type}`", f"a {key[:-7]} tower", "Swap them."
            )
            if getattr(config, "pooler_is_projected", False):
                self._require(
                    config.projection_dim == self.projection_dim,
                    f"{key}.projection_dim={config.projection_dim} and projection_dim={self.projection_dim}",
                    "the same, since this tower ends in the joint space itself",
                    "Set both to the same number.",
                )
        for modality in ("text", "vision"):
            config, rule = expected_key[f"{modality}_config"], getattr(self, f"{modality}_pooling")
            self._require(
                config.model_type not in TOWER_CONFIGS or rule == "pooler",
                f"{modality}_pooling={rule!r} for the tower `{config.model_type}`",
                "'pooler', since the tower defines its own pooling",
                "Named rules are for towers built by AutoModel.",
            )
            require_projection(self, modality)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "HFCLIPConfig":
        """One of the nine published architectures (paper tables 19 and 20), e.g. `"ViT-B/32"` or `"RN50x16"`.

        `overrides` replace fields; dicts for `text_config` and `vision_config` replace single fields of those.
        Raises ValueError with the nearest name for an unknown preset.
        """
        return cls(**fields_of_preset(name, overrides))
