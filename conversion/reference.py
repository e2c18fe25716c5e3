"""CLIP in plain PyTorch, straight from a checkpoint's own tensors: what a converted model is compared with.

Nothing here knows hfclip, so that an error in its towers or in the key tables cannot hide in both sides of a comparison.
The mapping of tensors may be lazy over a file of gigabytes: every tensor is read once, when it is needed, cast to float32
(or float64), and let go.

    names -> one tower's tensors under OpenAI's names (`_tower`) -> mathematics -> features, not normalised

Three styles of names are understood: OpenAI's (`transformer.resblocks.0 ...`), the same with OpenCLIP's prefix `text.`,
and transformers' (`text_model.encoder.layers.0 ...`). Covered are OpenAI's ModifiedResNet, ViT and text transformer, and
OpenCLIP's variants of them: its activations, masks and poolings, CoCa's among them, LayerScale, no `ln_pre`, and
projections that are missing, matrices or linear layers. All else is refused by name. `Recorder` and `unread` tell whether every tensor of a
checkpoint took part.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hfclip_errors import UsageError


ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
TEXT_POOLINGS = ("argmax", "first", "last", "eos", "class")
VISION_POOLINGS = ("tok", "avg", "query")
BATCH_NORM_EPS = 1e-5

# Scalars and masks that take no part in the features, and two kinds of counters.
CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "logit_scale", "logit_bias")
COUNTERS = (".num_batches_tracked", "embeddings.position_ids")

# The tensor by which a tower is recognised -> the prefix of the tower's names.
TEXT_TOWERS = {
    "token_embedding.weight": "",  # openai/CLIP, open_clip's CLIP
    "text.token_embedding.weight": "text.",  # open_clip's CustomTextCLIP
    "text_model.embeddings.token_embedding.weight": "text_model.",  # CLIPModel, CLIPTextModelWithProjection
    "embeddings.token_embedding.weight": "",  # CLIPTextModel, as transformers 5 saves it
}
IMAGE_TOWERS = {
    "visual.conv1.weight": "visual.",
    "vision_model.embeddings.patch_embedding.weight": "vision_model.",
    "embeddings.patch_embedding.weight": "",
}
# transformers' names -> OpenAI's, piece by piece. `proj.weight` is a linear layer, OpenAI's `proj` a matrix.
TRANSFORMERS_PIECES = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
    "visual_projection.": "proj.",
}
# The names that the mathematics below reads, as patterns.
LAYER = r"\.(weight|bias)"
BATCH_NORM = r"\.(weight|bias|running_mean|running_var)"
BLOCK = (
    rf"transformer\.resblocks\.\d+\.((ln_[12]|attn\.(q|k|v|out)_proj|mlp\.c_(fc|proj)){LAYER}"
    r"|attn\.in_proj_(weight|bias)|ls_[12]\.gamma)"
)
TEXT_NAMES = rf"{BLOCK}|token_embedding\.weight|positional_embedding|ln_final{LAYER}|text_projection|text_projection{LAYER}|cls_emb"
VIT_NAMES = (
    rf"{BLOCK}|class_embedding|positional_embedding|conv1\.weight|ln_(pre|post){LAYER}|proj|proj\.weight"
    rf"|attn_pool\.(query|ln_[qk]{LAYER}|attn\.([qkv]_proj_weight|in_proj_(weight|bias)|out_proj{LAYER}))"
)
RESNET_NAMES = (
    rf"(layer[1-4]\.\d+\.)?(conv[123]\.weight|bn[123]{BATCH_NORM})"
    rf"|layer[1-4]\.\d+\.downsample\.(0\.weight|1{BATCH_NORM})"
    rf"|attnpool\.(positional_embedding|[qkvc]_proj{LAYER})"
)


@dataclass(frozen=True)
class Settings:
    """What a checkpoint's tensors cannot tell. The defaults are OpenAI's.

    Where the two towers differ in `activation` or `layer_norm_eps`, each function gets its own settings.
    """

    text_heads: int | None = None
    """Attention heads of the text tower; None is one for every 64 channels."""
    vision_heads: int | None = None
    """Attention heads of the ViT, or of the ResNet's attention pool; None is one for every 64 channels."""
    activation: str = "quick_gelu"
    """`quick_gelu`, `gelu` or `gelu_tanh`, in the MLPs of both towers."""
    causal: bool = True
    """Whether a text token sees only itself and what precedes it (OpenCLIP: not `no_causal_mask`)."""
    text_pooling: str = "argmax"
    """The token that stands for the text: `argmax` (first highest id), `first`, `last`, `eos` (first
    `eos_token_id`), or `class` (CoCa's, after the whole context). transformers' CLIP is `eos`, except `argmax` for old configs, whose `eos_token_id` is 2."""
    eos_token_id: int | None = None
    """Read by `eos` pooling only."""
    pad_token_id: int = 0
    """Read by `class` pooling only."""
    vision_pooling: str = "tok"
    """`tok` (class token), `avg` (mean over the patches, without the class token), or `query` (CoCa's first query)."""
    pooling_heads: int = 8
    """Read by `query` pooling only."""
    norm_before_pooling: bool = True
    """Whether `ln_post` comes before pooling (OpenCLIP: not `final_ln_after_pool`). It matters to `avg` alone."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm of both towers."""

    def __post_init__(self):
        allowed_values = {"activation": ACTIVATIONS, "text_pooling": TEXT_POOLINGS, "vision_pooling": VISION_POOLINGS}
        for field, allowed in allowed_values.items():
            if getattr(self, field) not in allowed:
                raise UsageError(f"{field} is {getattr(self, field)!r}; choose one of {', '.join(allowed)}.")
        if self.text_pooling == "eos" and self.eos_token_id is None:
            raise UsageError("text_pooling='eos' needs eos_token_id, the id of the end-of-text token.")


class Recorder(Mapping[str, Tensor]):
    """A mapping of tensors that remembers which of them were read; see `unread`."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def unread(recorder: Recorder) -> list[str]:
    """Names of the tensors that took part in nothing so far, apart from constants such as `logit_scale`; sorted."""
    return sorted(name for name in recorder if name not in recorder.read and not _is_constant(name))


@torch.no_grad()
def image_features(
    tensors: Mapping[str, Tensor], pixel_values: Tensor, settings: Settings, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Embeddings of images, not normalised, from the image tower among `tensors`; its kind is told by its names.

    Args:
        pixel_values: (batch, channels, height, width) of the size that the position embeddings were made for.
        dtype: of the arithmetic and of the result.

    Returns:
        (batch, dim); where the tower has no projection, dim is its width.

    Raises:
        UsageError: no image tower, unknown or missing tensors, images of another size, heads that do not divide the width.
    """
    tower = _tower(tensors, IMAGE_TOWERS, "visual_projection.weight", dtype)
    encode = _resnet if any(name.startswith("layer1.") for name in tower.names) else _vit
    return encode(tower, pixel_values.to(dtype), settings)


@torch.no_grad()
def text_features(
    tensors: Mapping[str, Tensor], input_ids: Tensor, settings: Settings, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Embeddings of texts, not normalised, from the text tower among `tensors`.

    There is no attention mask: padding is seen where the tower is not causal, as OpenCLIP does it.

    Args:
        input_ids: (batch, seq) integers, `seq` not above the context length.
        dtype: of the arithmetic and of the result.

    Returns:
        (batch, dim); where the tower has no projection, dim is its width.

    Raises:
        UsageError: as `image_features`; ids outside the vocabulary, too many of them, or no `eos_token_id` in a text.
    """
    tower = _tower(tensors, TEXT_TOWERS, "text_projection.weight", dtype)
    tower.refuse_unknown(TEXT_NAMES)
    # Before the transformer, since texts without an end are refused here.
    pooled_at = _pooled_positions(input_ids, settings)
    x, seen = _embed_tokens(tower, input_ids), None
    if settings.text_pooling == "class":
        x = torch.cat([x, (tower["cls_emb"] + tower["positional_embedding"][-1]).expand(len(x), 1, -1)], dim=1)
        # OpenCLIP's mask of the padding lies one position late.
        seen = torch.cat([torch.ones(len(x), 1, dtype=torch.bool), input_ids != settings.pad_token_id], dim=1)
    x = _transformer(tower, x, settings.text_heads, settings.causal, settings, seen)
    # (batch, seq, width) -> (batch, width); a LayerNorm of single tokens may as well come after the choice
    x = x[torch.arange(len(x)), pooled_at]
    return _project(tower, "text_projection", _layer_norm(tower, "ln_final", x, settings))


# Reading


class _Tower:
    """One tower's tensors under OpenAI's names, each read and cast when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: dict[str, str], dtype: torch.dtype):
        self.tensors = tensors
        self.names = names  # OpenAI's name without the tower's prefix -> the checkpoint's own
        self.dtype = dtype

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Tensor:
        return self.as_stored(name).to(self.dtype)

    def as_stored(self, name: str) -> Tensor:
        if name not in self.names:
            raise UsageError(
                f"The checkpoint has no tensor for {name!r} (OpenAI's name within the tower), which this tower needs; "
                f"the tower has {len(self.names)} tensors. Pass a complete state dict."
            )
        return self.tensors[self.names[name]]

    def refuse_unknown(self, understood: str) -> None:
        unknown = sorted(own for name, own in self.names.items() if not re.fullmatch(understood, name))
        if unknown:
            raise UsageError(
                f"{len(unknown)} tensors are unknown to the reference, such as {unknown[:5]}: features computed "
                "without them would be wrong. It covers OpenAI's towers and OpenCLIP's plain variants of them."
            )

    def count_blocks(self, prefix: str) -> int:
        return len({match[1] for name in self.names if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def _tower(tensors: Mapping[str, Tensor], towers: dict[str, str], projection: str, dtype: torch.dtype) -> _Tower:
    # `in` of a lazy Mapping may read the tensor; its iterator does not.
    names = set(tensors)
    found = [anchor for anchor in towers if anchor in names]
    if len(found) != 1:
        raise UsageError(
            f"Expected one of {list(towers)}, found {found or 'none'} among {len(names)} tensors such as "
            f"{sorted(names)[:3]}. Strip prefixes such as `module.`, and pass one model's weights."
        )
    prefix = towers[found[0]]
    own = {name for name in names if name.startswith(prefix) and (prefix or not name.startswith("visual."))}
    own |= {projection} & names  # transformers keeps it beside the tower
    return _Tower(tensors, {_openai_name(name, prefix): name for name in own if not _is_constant(name)}, dtype)


def _openai_name(name: str, prefix: str) -> str:
    name = name.removeprefix(prefix)
    for piece, openai_piece in TRANSFORMERS_PIECES.items():
        name = name.replace(piece, openai_piece)
    return name


def _is_constant(name: str) -> bool:
    return name in CONSTANTS or name.endswith(COUNTERS)


# Transformers


def _embed_tokens(tower: _Tower, input_ids: Tensor) -> Tensor:
    embeddings = tower.as_stored("token_embedding.weight")
    if input_ids.min() < 0 or input_ids.max() >= len(embeddings):
        raise UsageError(
            f"input_ids reach from {input_ids.min()} to {input_ids.max()}, but the vocabulary has {len(embeddings)} "
            "tokens. Use the checkpoint's own tokenizer."
        )
    positions = tower["positional_embedding"]
    length = input_ids.shape[1]
    if length > len(positions):
        raise UsageError(f"Texts of {length} tokens, but a context length of {len(positions)}. Truncate them.")
    # (batch, seq) -> (batch, seq, width); cast after indexing, the whole matrix is large
    return embeddings[input_ids].to(tower.dtype) + positions[:length]


def _pooled_positions(input_ids: Tensor, settings: Settings) -> Tensor | int:
    if settings.text_pooling == "argmax":
        return input_ids.argmax(dim=-1)
    if settings.text_pooling == "eos":
        is_eos = input_ids == settings.eos_token_id
        if not is_eos.any(dim=-1).all():
            rows = (~is_eos.any(dim=-1)).nonzero().flatten().tolist()
            raise UsageError(f"No end-of-text token {settings.eos_token_id} in the texts {rows[:5]}. Add it to them.")
        return is_eos.int().argmax(dim=-1)
    return 0 if settings.text_pooling == "first" else -1


def _vit(tower: _Tower, pixel_values: Tensor, settings: Settings) -> Tensor:
    tower.refuse_unknown(VIT_NAMES)
    kernel = tower["conv1.weight"]
    # (batch, channels, height, width) -> (batch, width, rows, columns) -> (batch, patches, width)
    x = F.conv2d(pixel_values, kernel, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    del kernel
    # -> (batch, 1 + patches, width)
    x = torch.cat([tower["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = _add_positions(x, tower["positional_embedding"], pixel_values)
    if "ln_pre.weight" in tower:
        x = _layer_norm(tower, "ln_pre", x, settings)
    x = _transformer(tower, x, settings.vision_heads, False, settings)
    norm = partial(_layer_norm, tower, "ln_post", settings=settings)
    # (batch, 1 + patches, width) -> (batch, width)
    if settings.vision_pooling == "query":
        return _project(tower, "proj", norm(_pool_by_queries(tower, x, settings))[:, 0])
    pool = (lambda x: x[:, 0]) if settings.vision_pooling == "tok" else (lambda x: x[:, 1:].mean(dim=1))
    pooled = pool(norm(x)) if settings.norm_before_pooling else norm(pool(x))
    return _project(tower, "proj", pooled)


def _pool_by_queries(tower: _Tower, x: Tensor, settings: Settings) -> Tensor:
    """(batch, seq, width) -> (batch, queries, dim)"""
    query = _layer_norm(tower, "attn_pool.ln_q", tower["attn_pool.query"], settings).expand(len(x), -1, -1)
    keys = _layer_norm(tower, "attn_pool.ln_k", x, settings)
    if "attn_pool.attn.in_proj_weight" in tower:
        matrices = tower["attn_pool.attn.in_proj_weight"].chunk(3)
    else:
        matrices = [tower[f"attn_pool.attn.{part}_proj_weight"] for part in "qkv"]
    biases = tower["attn_pool.attn.in_proj_bias"].chunk(3)
    qkv = map(F.linear, (query, keys, keys), matrices, biases)
    return _linear(tower, "attn_pool.attn.out_proj", attend(*qkv, settings.pooling_heads))


def _transformer(
    tower: _Tower, x: Tensor, num_heads: int | None, causal: bool, settings: Settings, seen: Tensor | None = None
) -> Tensor:
    """`seen`: (batch, seq), the positions that others may see."""
    num_heads = _num_heads(num_heads, x.shape[-1])
    for number in range(tower.count_blocks(r"transformer\.resblocks")):
        block = f"transformer.resblocks.{number}"
        qkv = _query_key_value(tower, f"{block}.attn", _layer_norm(tower, f"{block}.ln_1", x, settings))
        y = _linear(tower, f"{block}.attn.out_proj", attend(*qkv, num_heads, causal, seen))
        x = x + _layer_scale(tower, f"{block}.ls_1", y)
        y = _linear(tower, f"{block}.mlp.c_fc", _layer_norm(tower, f"{block}.ln_2", x, settings))
        y = _linear(tower, f"{block}.mlp.c_proj", ACTIVATIONS[settings.activation](y))
        x = x + _layer_scale(tower, f"{block}.ls_2", y)
    return x


def _num_heads(num_heads: int | None, width: int) -> int:
    if num_heads is None and width % 64:
        raise UsageError(f"A width of {width} is no multiple of 64: set text_heads or vision_heads in the settings.")
    num_heads = num_heads or width // 64
    if width % num_heads:
        raise UsageError(f"{num_heads} heads do not divide a width of {width}: correct the settings.")
    return num_heads


def _query_key_value(tower: _Tower, attn: str, x: Tensor) -> tuple[Tensor, ...]:
    if f"{attn}.in_proj_weight" in tower:
        # (batch, seq, width) -> (batch, seq, 3 * width) -> three times (batch, seq, width)
        return F.linear(x, tower[f"{attn}.in_proj_weight"], tower[f"{attn}.in_proj_bias"]).chunk(3, dim=-1)
    return tuple(_linear(tower, f"{attn}.{part}_proj", x) for part in "qkv")


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, causal: bool = False, seen: Tensor | None = None
) -> Tensor:
    # (batch, seq, width) -> (batch, heads, seq, head width)
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    # (batch, heads, seq, head width) -> (batch, seq, width)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def _layer_norm(tower: _Tower, name: str, x: Tensor, settings: Settings) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tower[f"{name}.weight"], tower[f"{name}.bias"], settings.layer_norm_eps)


def _linear(tower: _Tower, name: str, x: Tensor) -> Tensor:
    return F.linear(x, tower[f"{name}.weight"], tower[f"{name}.bias"])


def _layer_scale(tower: _Tower, name: str, x: Tensor) -> Tensor:
    return x * tower[f"{name}.gamma"] if f"{name}.gamma" in tower else x


def _project(tower: _Tower, name: str, x: Tensor) -> Tensor:
    """A matrix (OpenAI), a linear layer with or without bias (OpenCLIP, transformers), or nothing."""
    if name in tower:
        return x @ tower[name]
    if f"{name}.weight" in tower:
        return F.linear(x, tower[f"{name}.weight"], tower[f"{name}.bias"] if f"{name}.bias" in tower else None)
    return x


def _add_positions(x: Tensor, positions: Tensor, pixel_values: Tensor) -> Tensor:
    if x.shape[1] != len(positions):
        raise UsageError(
            f"Images of {tuple(pixel_values.shape[2:])} pixels give {x.shape[1] - 1} patches, but the checkpoint has "
            f"positions for {len(positions) - 1}. Pass images of its own size."
        )
    return x + positions


# ModifiedResNet


def _resnet(tower: _Tower, pixel_values: Tensor, settings: Settings) -> Tensor:
    tower.refuse_unknown(RESNET_NAMES)
    x = pixel_values
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = _conv_norm(tower, f"conv{number}", f"bn{number}", x, stride=stride, padding=1).relu()
    x = F.avg_pool2d(x, 2)
    for stage in (1, 2, 3, 4):
        for number in range(tower.count_blocks(f"layer{stage}")):
            x = _bottleneck(tower, f"layer{stage}.{number}", x, stride=2 if stage > 1 and number == 0 else 1)
    return _attention_pool(tower, x, pixel_values, settings)


def _bottleneck(tower: _Tower, block: str, x: Tensor, stride: int) -> Tensor:
    """Strides are average pools before convolutions of stride 1."""
    y = _conv_norm(tower, f"{block}.conv1", f"{block}.bn1", x).relu()
    y = _conv_norm(tower, f"{block}.conv2", f"{block}.bn2", y, padding=1).relu()
    y = _conv_norm(tower, f"{block}.conv3", f"{block}.bn3", F.avg_pool2d(y, stride))
    if f"{block}.downsample.0.weight" in tower:
        x = _conv_norm(tower, f"{block}.downsample.0", f"{block}.downsample.1", F.avg_pool2d(x, stride))
    return (x + y).relu()


def _conv_norm(tower: _Tower, conv: str, norm: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    x = F.conv2d(x, tower[f"{conv}.weight"], stride=stride, padding=padding)
    scale = tower[f"{norm}.weight"] / (tower[f"{norm}.running_var"] + BATCH_NORM_EPS).sqrt()
    shift = tower[f"{norm}.bias"] - tower[f"{norm}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def _attention_pool(tower: _Tower, x: Tensor, pixel_values: Tensor, settings: Settings) -> Tensor:
    """The mean over places asks, and it and all places answer; the output projection ends in the joint space."""
    x = x.flatten(2).transpose(1, 2)  # (batch, width, rows, columns) -> (batch, places, width)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    x = _add_positions(x, tower["attnpool.positional_embedding"], pixel_values)
    query = _linear(tower, "attnpool.q_proj", x[:, :1])
    key, value = (_linear(tower, f"attnpool.{part}_proj", x) for part in "kv")
    pooled = attend(query, key, value, _num_heads(settings.vision_heads, x.shape[-1]))
    return _linear(tower, "attnpool.c_proj", pooled[:, 0])
