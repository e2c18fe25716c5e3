"""Changes to a trained model that keep what it knows.

    python -m hfclip.conversion.surgery resize clip-b32 clip-b32-336 --image-size 336      # another resolution, baked in
    python -m hfclip.conversion.surgery stretch clip-b32 clip-b32-long --length 248        # longer texts (Long-CLIP)
    python -m hfclip.conversion.surgery activation clip-b32 clip-b32-gelu --to gelu        # changes the embeddings

`resize` interpolates the position embeddings of a ViT, or of a ResNet's attention pool, as the model itself does at run
time for images of another size: the same embeddings, with no interpolation left to do, and an image processor to match.
`stretch` keeps the first positions of the text tower and interpolates the others (arXiv:2403.15378, section 3.1); texts
within the kept positions keep their embeddings, longer ones want fine-tuning. `activation` prints how far the
embeddings move. Each tensor is stored in the precision that the source stores it in.
"""

import argparse
from pathlib import Path

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "convert")

import torch

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel
from hfclip.errors import UsageError, as_usage_error
from hfclip.foreign.checkpoints import View
from hfclip.foreign.plan import on_meta
from hfclip.foreign.processors import join, open_processor

from .convert import add_paths, open_model, run, say
from .folder import new_folder, require_free
from .proof import compare, compute_features, fixed_inputs
from .safetensors_files import write_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operations = parser.add_subparsers(dest="operation", required=True, metavar="OPERATION")
    by_name = {"resize": "another image resolution", "stretch": "longer texts", "activation": "another activation"}
    resizing, stretching, swapping = (add_paths(operations.add_parser(name, help=by_name[name])) for name in by_name)
    resizing.add_argument("--image-size", type=int, required=True, help="side of the images in pixels")
    resizing.set_defaults(change=lambda model: resize(model, options.image_size))
    stretching.add_argument("--length", type=int, default=248, help="new context length (default: 248)")
    stretching.add_argument("--keep", type=int, default=20, help="first positions to keep as they are (default: 20)")
    stretching.set_defaults(change=lambda model: stretch(model, options.length, options.keep))
    swapping.add_argument("--to", required=True, choices=["quick_gelu", "gelu"], help="the new one")
    swapping.set_defaults(change=lambda model: swap_activation(model, options.to))
    options = parser.parse_args()

    require_free(options.out, options.source, options.overwrite)
    config, weights = open_model(options.source)
    model = HFCLIPModel.from_pretrained(options.source, dtype=torch.float64).eval()
    changed = options.change(model)
    with new_folder(options.out, options.source, options.overwrite) as folder:
        save_model(changed, folder, weights, config.dtype)
        save_fitting_processor(options.source, changed.config, folder)
    say(f"Written: {options.out}")


def save_model(model: HFCLIPModel, folder: Path, source: View, dtype: torch.dtype | None) -> None:
    """Config, code and weights, each tensor in the dtype that it has in the source.

    `dtype` is what the source's config says of all; where it says nothing, it is theirs if they have one.
    """
    dtypes = {name: tensor.dtype for name, tensor in source.on_meta().items()}
    used = {found for found in dtypes.values() if found.is_floating_point}
    tensors = model.state_dict()
    layout = {name: torch.empty_like(tensor, dtype=dtypes[name], device="meta") for name, tensor in tensors.items()}
    if dtype is None and len(used) == 1:
        (dtype,) = used
    on_meta(HFCLIPModel, model.config, dtype).save_pretrained(folder, state_dict={})
    write_weights(folder, layout, tensors.items())


def resize(model: HFCLIPModel, image_size: int) -> HFCLIPModel:
    """The model, in float64, with the position embeddings of another resolution."""
    vision = model.config.vision_config
    fields = {**vision.to_dict(), "image_size": image_size}
    if vision.model_type == "hfclip_vit":
        name, side = "vision_model.embeddings.position_embedding.weight", vision.patch_size
    elif vision.model_type == "hfclip_resnet":
        name, side = "vision_model.attnpool.positional_embedding", 32
    else:
        raise UsageError(f"resize: found an image tower {vision.model_type}, expected hfclip_vit or hfclip_resnet.")
    with as_usage_error("resize"):
        config = with_tower(model.config, vision_config=type(vision)(**fields))
    holder = model.vision_model.get_submodule(name.split(".")[1])
    with torch.no_grad():
        positions = holder.positions(image_size // side, image_size // side)
    changed = rebuilt(model, config, {name: positions})
    pixel_values, _ = fixed_inputs(config)
    compare(
        *(compute_features(m, pixel_values, None) for m in (changed, model))
    )  # the old one interpolates at run time
    return changed


def stretch(model: HFCLIPModel, length: int, keep: int) -> HFCLIPModel:
    """The model, in float64, with a longer text context: `keep` positions as they are, the others interpolated linearly."""
    text = model.config.text_config
    if text.model_type != "hfclip_text" or text.reads_padding:
        raise UsageError("stretch: expected a causal hfclip_text tower that is pooled at the end of a text.")
    old = text.max_position_embeddings
    if not 0 < keep < old - 1 or length <= old:
        raise UsageError(
            f"stretch: found --keep {keep} and --length {length} for a context of {old}, expected 1 to {old - 2} "
            f"positions to keep and more than {old} in all."
        )
    weight = model.text_model.embeddings.position_embedding.weight.detach()
    positions = stretched(weight, length, keep)
    with as_usage_error("stretch"):
        longer = type(text)(**{**text.to_dict(), "max_position_embeddings": length})
    config = with_tower(model.config, text_config=longer)
    changed = rebuilt(model, config, {"text_model.embeddings.position_embedding.weight": positions})
    _, input_ids = fixed_inputs(model.config)
    within = input_ids[:, :keep].clone()
    within[:, -1] = text.eos_token_id
    compare(*(compute_features(m, None, within) for m in (changed, model)))
    return changed


def stretched(positions: torch.Tensor, length: int, keep: int) -> torch.Tensor:
    """(context, hidden) -> (length, hidden): the first `keep` rows, then the others at evenly spaced places.

    Places beyond the last row continue the line through the last two, as in Long-CLIP.
    """
    old = len(positions)
    places = keep + torch.arange(length - keep, dtype=torch.float64) * (old - keep) / (length - keep)
    left = places.floor().long().clamp(max=old - 2)
    share = (places - left)[:, None]
    between = positions[left] * (1 - share) + positions[left + 1] * share
    return torch.cat([positions[:keep], between])


def swap_activation(model: HFCLIPModel, activation: str) -> HFCLIPModel:
    """The model, in float64, with another activation in both towers. Prints how far the embeddings move."""
    config, towers = HFCLIPConfig.from_dict(model.config.to_dict()), []
    for part in ("text_config", "vision_config"):
        tower = getattr(config, part)
        if getattr(tower, "hidden_act", activation) != activation:
            towers.append(f"{part}: {tower.hidden_act} -> {activation}")
            tower.hidden_act = activation
    if not towers:
        raise UsageError(f"activation: both towers have {activation} already; nothing to change.")
    changed = rebuilt(model, config, {})
    inputs = fixed_inputs(config)
    before, after = (compute_features(m, *inputs) for m in (model, changed))
    say(f"WARNING: {'; '.join(towers)}. The weights were trained with the old one; embeddings move:")
    for name in before:
        cosine = torch.cosine_similarity(before[name], after[name]).min().item()
        say(f"  {name:<16} cosine with the old ones at least {cosine:.4f}")
    return changed


def with_tower(config: HFCLIPConfig, **towers) -> HFCLIPConfig:
    return HFCLIPConfig.from_dict({**config.to_dict(), **{name: tower.to_dict() for name, tower in towers.items()}})


def rebuilt(model: HFCLIPModel, config: HFCLIPConfig, replaced: dict[str, torch.Tensor]) -> HFCLIPModel:
    """A model of `config` with the weights of `model`, some of them replaced."""
    changed = HFCLIPModel(config).double().eval()
    changed.load_state_dict({**model.state_dict(), **replaced})
    return changed


def save_fitting_processor(source: Path, config: HFCLIPConfig, folder: Path) -> None:
    """Tokenizer and image processor of `source`, fitted to the changed model."""
    image_processor, tokenizer = open_processor(source)
    if image_processor is not None:
        squash = "shortest_edge" not in image_processor.size
        size = {"height": config.image_size, "width": config.image_size} if squash else config.image_size
        image_processor = HFCLIPImageProcessor.from_pretrained(source, size=size, crop_size=config.image_size)
    if tokenizer is not None:
        tokenizer.model_max_length = config.text_config.max_position_embeddings
    if (processor := join(image_processor, tokenizer)) is not None:
        processor.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
