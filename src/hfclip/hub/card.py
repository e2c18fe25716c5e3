"""Model cards: the README.md of a repository on the Hugging Face Hub.

    config (+ provenance, results) -> metadata for the Hub's search, architecture, snippets that run, tables

A card says what its caller knows, and nothing else.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..configuration_hfclip import HFCLIPConfig
from ..modeling_hfclip import HFCLIPModel


# The line of the snippets that names the model.
_NAME_LINE = re.compile(r'^name = ".*"  # this (repository|folder)$', flags=re.MULTILINE)
_CARD = """# {title}

A CLIP model (Radford et al., [2103.00020](https://arxiv.org/abs/2103.00020)): images and texts are embedded in one
space of {projection_dim} dimensions, and images are classified by comparing them with texts.

| Part | Architecture | Parameters |
|---|---|---|
| Image tower | {vision} | {vision_parameters} |
| Text tower | {text} | {text_parameters} |
| Whole model | joint space of {projection_dim} dimensions | {parameters} |

## Use

{snippets}
The code is in this repository, which is what `trust_remote_code=True` allows. After `import hfclip` the installed code
is used instead.
"""

_WITH_PROCESSOR = """```python
from transformers import pipeline

{name_line}
classify = pipeline("zero-shot-image-classification", name, trust_remote_code=True)
classify("picture.jpg", candidate_labels=["cat", "dog"])
```

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

{name_line}
model = AutoModel.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
captions = ["a photo of a cat", "a photo of a dog"]
inputs = processor(text=captions, images=Image.open("picture.jpg"), return_tensors="pt", padding=True)
with torch.no_grad():
    probabilities = model(**inputs).logits_per_image.softmax(dim=-1)
```
"""

_WITHOUT_PROCESSOR = """```python
import torch
from transformers import AutoModel

{name_line}
model = AutoModel.from_pretrained(name, trust_remote_code=True)
pixel_values = torch.zeros(1, {channels}, {image_size}, {image_size})  # images, resized and normalised
with torch.no_grad():
    image_embeds = model.encode_image(pixel_values)  # (1, {projection_dim}), unit length
```

Tokenizer and image processor are not both in this repository, and pipelines need both.
"""

_TOWER_CARD = """# {title}

A tower of a CLIP model (Radford et al., [2103.00020](https://arxiv.org/abs/2103.00020)): {tower}.

## Use

```python
from hfclip import {architecture}

{name_line}
tower = {architecture}.from_pretrained(name)
```
"""


def model_card(
    config: HFCLIPConfig | PreTrainedConfig,
    *,
    name: str,
    title: str | None = None,
    provenance: dict[str, Any],
    results: list[EvalResult],
    license: str | None = None,
    base_model: str | None = None,
    has_processor: bool = True,
) -> str:
    """README.md of a dual encoder, or of a lone tower: metadata, architecture, snippets that run, provenance and results.

    Says only what `config` tells and what is given.

    Args:
        name: what the snippets open, a repository or a folder; `push` puts the repository's name in its place. "." is
            the folder where the card lies, from which the snippets then have to be run.
        title: headline, by default the last part of `name`.
        provenance: how the model came to be, in the order of the dict (source, SHA-256, versions, settings). Inner
            dicts become `outer.inner`; None is left out.
        results: huggingface_hub's `EvalResult`s (task_type, dataset_type, dataset_name, metric_type, metric_value ...).
        license: identifier of the Hub, e.g. `"apache-2.0"`.
        base_model: repository that the weights started from.
        has_processor: whether tokenizer and image processor lie beside a dual encoder. Pipelines need both.
    """
    title = title or name.rstrip("/").split("/")[-1]
    is_dual_encoder = isinstance(config, HFCLIPConfig)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if is_dual_encoder and has_processor else None,
        tags=["clip", "hfclip", "custom_code"],
        license=license,
        base_model=base_model,
        model_name=title if results else None,
        eval_results=results or None,
    )
    words = {"title": title, "name_line": _name_line(name)}
    body = _dual_encoder(config, has_processor, **words) if is_dual_encoder else _tower(config, **words)
    if rows := list(_flattened(provenance)):
        body += "\n## Where it comes from\n\n" + _table(("", ""), rows)
    if results:
        rows = [(r.dataset_name, r.metric_name or r.metric_type, r.metric_value) for r in results]
        body += "\n## Evaluation\n\n" + _table(("Data", "Metric", "Value"), rows)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _tower(config: Any, title: str, name_line: str) -> str:
    architecture = (config.architectures or ["AutoModel"])[0]
    return _TOWER_CARD.format(tower=describe(config), architecture=architecture, title=title, name_line=name_line)


def _dual_encoder(config: Any, has_processor: bool, title: str, name_line: str) -> str:
    with torch.device("meta"):  # shapes only
        model = HFCLIPModel(config)
    if has_processor:
        snippets = _WITH_PROCESSOR.format(name_line=name_line)
    else:
        shape = {"channels": getattr(config.vision_config, "num_channels", 3), "image_size": config.image_size}
        snippets = _WITHOUT_PROCESSOR.format(name_line=name_line, projection_dim=config.projection_dim, **shape)
    return _CARD.format(
        title=title,
        projection_dim=config.projection_dim,
        vision=describe(config.vision_config),
        text=describe(config.text_config),
        vision_parameters=_parameters(model.vision_model),
        text_parameters=_parameters(model.text_model),
        parameters=_parameters(model),
        snippets=snippets,
    )


def with_name(card: str, name: str) -> str:
    """The card with `name` in the snippets; one that has no such line stays as it is."""
    return _NAME_LINE.sub(lambda _: _name_line(name), card)


def _name_line(name: str) -> str:
    return f"name = {json.dumps(name, ensure_ascii=False)}  # this {'folder' if name == '.' else 'repository'}"


def describe(config: Any) -> str:
    """One line about a tower, or about both of a dual encoder, from what its config has."""
    if isinstance(config, HFCLIPConfig):
        return f"{describe(config.vision_config)}; {describe(config.text_config)}"
    facts = {
        "patch_size": "patches of {0} x {0} pixels",
        "image_size": "images of {0} x {0} pixels",
        "depths": "blocks {0}",
        "stem_width": "stem of {0} channels",
        "num_hidden_layers": "{0} layers",
        "hidden_size": "width {0}",
        "num_attention_heads": "{0} heads",
        "max_position_embeddings": "{0} tokens",
        "vocab_size": "vocabulary of {0:,}",
    }
    # Towers of AutoModel have no `kind`, and may have some of these fields as lists, or not at all.
    values = {field: getattr(config, field, None) for field in getattr(config, "facts", facts)}
    said = [text.format(values[field]) for field, text in facts.items() if isinstance(values.get(field), (int, list))]
    return ", ".join([getattr(config, "kind", config.model_type), *said])


def _parameters(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def _flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
