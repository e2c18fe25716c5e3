"""What the towers share: how weights are drawn, which images are taken, and when values may be read."""

import torch
from torch import nn
from transformers import initialization as init


def with_init_std(module: nn.Module, std: float) -> nn.Module:
    """Tells a module the standard deviation that its own weights are drawn with; see `initialize_leaf`."""
    module.init_std = std
    return module


def initialize_leaf(module: nn.Module, factor: float) -> None:
    """Initialises a leaf module: weights from `init_std`, zero biases, unit gains.

    Every weight is drawn where it lives: transformers skips modules of custom code that own no parameter, so an
    initialisation written at their parent would silently not happen.
    """
    if hasattr(module, "init_std"):
        for name in ("weight", "class_embedding", "query"):
            # Quantised layers keep their weight elsewhere.
            if getattr(module, name, None) is not None:
                init.normal_(getattr(module, name), std=module.init_std * factor)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        init.constant_(module.weight, getattr(module, "initial_gain", 1.0))
        init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
    elif isinstance(module, nn.Conv2d):
        init.kaiming_uniform_(module.weight, a=5**0.5)


def check_pixel_values(pixel_values: torch.Tensor, config, interpolate: bool | None) -> None:
    """Raises ValueError, saying what was found and expected, for images that the tower cannot take."""
    if not isinstance(pixel_values, torch.Tensor):
        found = "nothing" if pixel_values is None else f"a {type(pixel_values).__name__}"
        raise ValueError(
            f"You have to specify pixel_values, a (batch, channels, height, width) tensor of images; found {found}. "
            "The image processor makes one with return_tensors='pt'."
        )
    if pixel_values.dim() != 4 or not pixel_values.shape[0] or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values: found shape {tuple(pixel_values.shape)}, expected (batch, {config.num_channels}, height, "
            "width), not empty. The image processor makes such tensors."
        )
    height, width = pixel_values.shape[-2:]
    if height % config.stride or width % config.stride or not height or not width:
        raise ValueError(
            f"pixel_values: found images of {height}x{width}, expected a height and width that are multiples of "
            f"{config.stride}. Resize or crop them, for instance with the image processor."
        )
    if interpolate is False and (height, width) != (config.image_size, config.image_size):
        raise ValueError(
            f"Input image size ({height}*{width}) doesn't match model ({config.image_size}*{config.image_size}), and "
            "interpolate_pos_encoding=False forbids interpolating the positions. Leave it out, or resize the images."
        )


def is_exporting() -> bool:
    """Whether a graph is being recorded (ONNX, TorchScript) that has to serve every value of its inputs."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether values can be read without waiting for a device, and without fixing them in a graph."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or is_exporting())
