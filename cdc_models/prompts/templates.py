"""Hand-crafted templates, and filling class names into them."""

from __future__ import annotations

from collections.abc import Sequence

from cdc_models.clip.classes import check_template, words_of

GENERIC = "a photo of a {}."

HAND_CRAFTED: dict[str, str] = {
    "ImageNet": GENERIC,
    "Caltech101": GENERIC,
    "OxfordPets": "a photo of a {}, a type of pet.",
    "StanfordCars": GENERIC,
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "Food101": "a photo of {}, a type of food.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "SUN397": GENERIC,
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "UCF101": "a photo of a person doing {}.",
    "ImageNetV2": GENERIC,
    "ImageNetSketch": GENERIC,
    "ImageNetA": GENERIC,
    "ImageNetR": GENERIC,
}
"""Data set -> the template that CoOp and MaPLe use for it."""

ENSEMBLE: tuple[str, ...] = (
    GENERIC,
    "a picture of the {}.",
    "a close view of a {}.",
    "a small {}.",
    "a drawing of a {}.",
    "a {} seen from afar.",
    "{}.",
)
"""A few general templates of our own choosing; averaging their features is a stronger zero-shot classifier."""


def fill_templates(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Every name in every template: one list of texts per template.

    Underscores in names count as spaces, as in `tokenize_classes`.

    Raises ValueError if there is no template or no name, or a template has not exactly one "{}".

    Example:
        >>> fill_templates(["a photo of a {}."], ["cat", "fire_engine"])
        [['a photo of a cat.', 'a photo of a fire engine.']]
    """
    for argument, values in (("templates", templates), ("names", names)):
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
            raise ValueError(f"{argument}: expected a non-empty sequence of strings, got {values!r:.80}")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"names: expected a non-empty sequence of strings, got {wrong[0]!r:.80} among them")
    for template in templates:
        check_template("templates", template)
    texts = [words_of(name) for name in names]
    return [[template.replace("{}", text) for text in texts] for template in templates]
