"""The page that introduces an adapter in a model hub repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cdc_models.clip import ClipBackbone
from cdc_models.methods.base import Method
from cdc_models.provenance import library_version

__all__ = ["model_card", "name_of_weights"]

LISTED = 100


def name_of_weights(backbone: ClipBackbone) -> str | None:
    """The tag or the file name of a backbone's weights: a path of this machine means nothing to others, or too much."""
    return None if backbone.pretrained is None else Path(backbone.pretrained).name


def _code(text: str | None) -> str:
    """Text in a cell of a Markdown table, whatever it holds."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if "`" in text else ""
    return f"{fence}{room}{text}{room}{fence}".replace("|", r"\|")


def model_card(model: Method, address: str, summary: dict[str, Any] | None = None) -> str:
    """A README.md: what was learned on which backbone, over which classes, and how to load it.

    Args:
        model: a trained method.
        address: as `load_adapter` takes it.
        summary: of the training, as for `save_adapter`.
    """
    backbone, names = model.backbone, model.class_names
    weights = name_of_weights(backbone)
    loading = ", ".join(json.dumps(part) for part in (backbone.name, weights) if part is not None)
    listed = f"The first {LISTED} of {len(names)}:" if len(names) > LISTED else f"All {len(names)}:"
    learned = sum(p.numel() for p in model.learned_parameters().values())
    return f"""---
library_name: cdc-ops
pipeline_tag: zero-shot-image-classification
tags:
- clip
- prompt-learning
- {model.name}
---

# An adapter for CLIP: {model.name}

What the method `{model.name}` learned from labelled images: {learned:,} numbers, and nothing of the backbone. It fits
the backbone that it was trained on and no other, which is checked by the hash of the weights when it is loaded.

| | |
| --- | --- |
| method | `{model.name}` |
| backbone | {_code(backbone.name)}, weights {_code(weights)} |
| hash of the weights | `{backbone.fingerprint[:16]}` |
| written by | cdc-ops {library_version()} |

## How to load it

```python
from cdc_models import load_adapter, load_clip

model = load_adapter({json.dumps(address)}, load_clip({loading}))
prediction = model.predict(images)
others = model.with_classes(["spoon", "fork"])  # the same prompts over other classes
```

    cdc predict --images new_photos --adapter {address} --out answers

## Classes

{listed}

    {json.dumps(names[:LISTED])}

## Options

    {json.dumps(model.options)}

## Training

    {json.dumps(summary or {})}
"""
