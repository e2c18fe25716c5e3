"""ModifiedResNet, the convolutional image tower of CLIP (paper section 2.4), with OpenAI's parameter names.

It departs from a textbook ResNet in three ways: a stem of three convolutions and an average pool, average pooling in
front of every strided convolution (anti-aliasing), and attention pooling in place of the global average.

    pixel_values -> stem -> layer1..layer4 (spatial maps, exposed) -> attention pool -> joint space
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention
from transformers.utils.generic import can_return_tuple

from .configuration_hfclip import HFCLIPResNetConfig
from .layers_hfclip import check_pixel_values, initialize_leaf, with_init_std


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of every BatchNorm in `module` as they are, whatever is computed meanwhile."""
    norms = [norm for norm in module.modules() if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)


class Bottleneck(GradientCheckpointingLayer):
    """1x1, 3x3, 1x1 convolutions; a stride is an average pool after the second one, and in the shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, zero_init: bool):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.bn3.initial_gain = 0.0 if zero_init else 1.0
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            # The pool has no parameters; the names "0" and "1" are those of OpenAI's checkpoints.
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride) if stride > 1 else nn.Identity())
            self.downsample.add_module("0", nn.Conv2d(in_channels, out_channels, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(out_channels))

    def forward(self, hidden_states: torch.Tensor, past_calls: list | None = None) -> torch.Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, height / stride, width / stride)

        `past_calls` is a list of this call's own. Gradient checkpointing makes the call once more in the backward pass,
        with the same list, and BatchNorm must not count the batch again.
        """
        if past_calls:
            with frozen_statistics(self):
                return self._compute(hidden_states)
        if past_calls is not None:
            past_calls.append(True)
        return self._compute(hidden_states)

    def _compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shortcut = hidden_states if self.downsample is None else self.downsample(hidden_states)
        hidden_states = F.relu(self.bn1(self.conv1(hidden_states)), inplace=True)
        hidden_states = F.relu(self.bn2(self.conv2(hidden_states)), inplace=True)
        hidden_states = self.bn3(self.conv3(self.avgpool(hidden_states)))
        return F.relu(hidden_states + shortcut, inplace=True)


class AttentionPool2d(nn.Module):
    """One attention head set whose only query is the mean of the map (plus its own position embedding)."""

    def __init__(self, config: HFCLIPResNetConfig):
        super().__init__()
        channels = config.hidden_size
        self.grid_size = config.image_size // 32
        self.num_heads = config.num_attention_heads
        self.positional_embedding = nn.Parameter(torch.empty(self.grid_size**2 + 1, channels))
        self.k_proj = with_init_std(nn.Linear(channels, channels), channels**-0.5)
        self.q_proj = with_init_std(nn.Linear(channels, channels), channels**-0.5)
        self.v_proj = with_init_std(nn.Linear(channels, channels), channels**-0.5)
        self.c_proj = with_init_std(nn.Linear(channels, config.projection_dim), channels**-0.5)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """(1 + height * width, channels): the trained grid, bicubically interpolated to another one if needed."""
        if height == width == self.grid_size:
            return self.positional_embedding
        pooled, grid = self.positional_embedding[:1], self.positional_embedding[1:]
        # (grid * grid, channels) -> (1, channels, grid, grid) -> (1, channels, height, width) -> (h * w, channels)
        grid = grid.T.reshape(1, -1, self.grid_size, self.grid_size)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([pooled, grid.flatten(2)[0].T])

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        batch_size, channels, height, width = feature_map.shape
        # (batch, channels, height, width) -> (batch, height * width, channels) -> (batch, 1 + height * width, channels)
        tokens = feature_map.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positions(height, width)
        # (batch, tokens, channels) -> (batch, heads, tokens, channels / heads)
        heads = (batch_size, -1, self.num_heads, channels // self.num_heads)
        query = self.q_proj(tokens[:, :1]).view(heads).transpose(1, 2)
        key = self.k_proj(tokens).view(heads).transpose(1, 2)
        value = self.v_proj(tokens).view(heads).transpose(1, 2)
        pooled = F.scaled_dot_product_attention(query, key, value)
        # (batch, heads, 1, channels / heads) -> (batch, channels) -> (batch, projection_dim)
        return self.c_proj(pooled.transpose(1, 2).reshape(batch_size, channels))


class HFCLIPResNetModel(PreTrainedModel):
    """ModifiedResNet image tower. Its pooled output lies in the joint space already and is not normalised."""

    config_class = HFCLIPResNetConfig
    config: HFCLIPResNetConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _auto_class = "AutoModel"
    _input_embed_layer = "conv1"
    _no_split_modules = ["Bottleneck", "AttentionPool2d"]
    # The attention pool has a single query and serves every `attn_implementation` with torch's kernel.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HFCLIPResNetConfig):
        super().__init__(config)
        width = config.stem_width
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        in_channels = width
        for stage, depth in enumerate(config.depths):
            channels = width * 2**stage
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Bottleneck(in_channels, channels, stride, config.zero_init_residual))
                in_channels = channels * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # OpenAI's initialisation (`CLIP.initialize_parameters`); `BatchNorm2d.initial_gain` belongs to it.
        factor = self.config.initializer_factor
        if isinstance(module, AttentionPool2d):
            init.normal_(module.positional_embedding, std=self.config.hidden_size**-0.5 * factor)
        else:
            initialize_leaf(module, factor)

    def set_attn_implementation(self, *args, **kwargs) -> None:
        """Nothing to set: the attention pool has a kernel of its own."""

    def blocks(self) -> list[nn.Module]:
        """What is trained at rates of its own under a layer-wise decay, from the input up: the stages and the pool."""
        return [self.layer1, self.layer2, self.layer3, self.layer4, self.attnpool]

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) -> (batch, stem_width, height / 4, width / 4)"""
        hidden_states = pixel_values
        for number in (1, 2, 3):
            conv, norm = getattr(self, f"conv{number}"), getattr(self, f"bn{number}")
            hidden_states = F.relu(norm(conv(hidden_states)), inplace=True)
        return self.avgpool(hidden_states)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Feature maps and the pooled embedding of images.

        Args:
            pixel_values: (batch, 3, height, width), normalised; height and width multiples of 32. Sizes other than
                the trained one are served by interpolating the pool's positions, unless `interpolate_pos_encoding`
                is False.
            output_hidden_states: also return the stem's map and the map of each stage, or those of the given places,
                with None for the others.

        Returns:
            `last_hidden_state` (batch, 32 * stem_width, height / 32, width / 32), the map before the pool;
            `pooler_output` (batch, projection_dim), not normalised;
            `hidden_states`: stem (stride 4), then layer1 to layer4 (strides 4, 8, 16, 32).

        Raises:
            ValueError: wrong shape, or a size that is no multiple of 32.
        """
        check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # Convolutions are faster with the channels innermost, on CPUs and on GPUs with tensor cores.
        pixel_values = pixel_values.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last)
        hidden_states = self.stem(pixel_values)
        feature_maps = [hidden_states]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            if stage[0].gradient_checkpointing and not torch.compiler.is_compiling():  # graphs count once
                for block in stage:
                    hidden_states = block(hidden_states, past_calls=[])
            else:
                hidden_states = stage(hidden_states)
            feature_maps.append(hidden_states)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states,
            pooler_output=self.attnpool(hidden_states),
            hidden_states=selected_maps(feature_maps, output_hidden_states),
        )

    def features_for_classification(self, outputs: BaseModelOutputWithPoolingAndNoAttention) -> torch.Tensor:
        """(batch, hidden_size): the mean of the last feature map, what a linear classifier reads."""
        return outputs.last_hidden_state.mean(dim=(2, 3))


def selected_maps(maps: list[torch.Tensor], places: bool | int | list[int]) -> tuple | None:
    """All maps (True), none (False), or those of the given places with None for the others, as transformers does."""
    if isinstance(places, bool):
        return tuple(maps) if places else None
    wanted = {place % len(maps) for place in ([places] if isinstance(places, int) else places)}
    return tuple(feature_map if place in wanted else None for place, feature_map in enumerate(maps))
