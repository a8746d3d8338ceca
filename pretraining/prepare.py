"""Render emoji artwork by several artists into one array of sprites.

Reads the registry packages as they come (no network here): a folder with the archives of
`@iconify-json/<style>` for every style in STYLES and of `emojibase-data`, as `npm pack <name>` leaves them.
Writes `sprites.npy` (uint8 RGBA, [N, 64, 64, 4], straight alpha) and `sprites.json` (concepts and, for every
sprite, its concept and its style) into the output folder; both are read by `train.py` and `benchmark.py`.

    npm pack @iconify-json/noto ...            # see pretraining/README.md for the list
    python pretraining/prepare.py --packages npm/ --out artwork/
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from rich.progress import track

SIZE = 64

# style -> words a caption may use for it
STYLES: dict[str, tuple[str, ...]] = {
    "noto": ("noto", "google"),
    "noto-v1": ("old noto", "blob"),
    "fxemoji": ("firefox",),
    "fluent-emoji": ("glossy", "3d"),
    "fluent-emoji-flat": ("flat",),
    "fluent-emoji-high-contrast": ("black and white", "high contrast"),
    "twemoji": ("twitter",),
    "emojione": ("emojione", "cartoon"),
    "emojione-monotone": ("monochrome", "silhouette"),
    "emojione-v1": ("classic", "shaded"),
    "streamline-emojis": ("streamline",),
    "openmoji": ("outlined", "openmoji"),
}
LEFT_OUT_GROUPS = {"flags", "symbols", "component"}


def read_package(folder: Path, name: str) -> dict[str, Any]:
    """The JSON members of the newest archive of one npm package, by file name without folder."""
    stem = name.removeprefix("@").replace("/", "-")
    archives = sorted(p for p in folder.glob(f"{stem}-*.tgz") if re.fullmatch(rf"{stem}-[0-9][0-9.]*\.tgz", p.name))
    if not archives:
        raise FileNotFoundError(f"no archive {stem}-<version>.tgz in {folder}; run: npm pack {name}")
    with tarfile.open(archives[-1]) as archive:
        members = {m.name.removeprefix("package/"): m for m in archive.getmembers() if m.name.endswith(".json")}
        wanted = ("icons", "chars", "info", "en/")
        return {
            path: json.load(io.TextIOWrapper(archive.extractfile(member), "utf-8"))  # type: ignore[arg-type]
            for path, member in members.items()
            if path.startswith(wanted)
        }


def squash(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def normal_hexcode(code: str) -> str:
    """Code points without the presentation selector, so that every set's spelling agrees."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def read_concepts(emojibase: dict[str, Any]) -> list[dict[str, Any]]:
    """What can be drawn: no flags, symbols, clock faces, skin tones, nor man/woman doubles of a person."""
    messages = emojibase["en/messages.json"]
    groups = {g["order"]: g["message"] for g in messages["groups"]}
    keys = {g["order"]: g["key"] for g in messages["groups"]}
    subgroups = {g["order"]: g["message"] for g in messages["subgroups"]}
    concepts = []
    for entry in emojibase["en/data.json"]:
        group, code, label = entry.get("group"), entry["hexcode"], entry["label"].lower().replace("’", "'")
        if group is None or keys[group] in LEFT_OUT_GROUPS or "2640" in code or "2642" in code:
            continue
        if "o'clock" in label or "thirty" in label:
            continue
        concepts.append(
            {
                "hexcode": code,
                "label": re.sub(r"\s+", " ", re.sub(r"[^a-z0-9'\- ]", " ", label)).strip(),
                "group": groups[group],
                "subgroup": subgroups[entry["subgroup"]],
                "tags": [t for t in entry.get("tags", []) if t.isascii()],
            }
        )
    return concepts


def find_names(concepts: list[dict[str, Any]], sets: dict[str, Any], emojibase: dict[str, Any]) -> dict[str, set[str]]:
    """Every name that any package uses for a code point; sets without code points are matched by name."""
    names: dict[str, set[str]] = defaultdict(set)
    for concept in concepts:
        names[normal_hexcode(concept["hexcode"])].add(squash(concept["label"]))
    for package in sets.values():
        for code, name in package["chars.json"].items():
            names[normal_hexcode(code)].add(squash(name))
    for path, table in emojibase.items():
        if path.startswith("en/shortcodes/"):
            for code, shortcodes in table.items():
                for name in [shortcodes] if isinstance(shortcodes, str) else shortcodes:
                    names[normal_hexcode(code)].add(squash(name))
    return names


def match(concepts: list[dict[str, Any]], package: dict[str, Any], names: dict[str, set[str]]) -> dict[int, str]:
    """Concept index -> icon name in one set; an icon is used once."""
    icons = package["icons.json"]
    by_code = {normal_hexcode(code): name for code, name in package["chars.json"].items()}
    by_name: dict[str, str] = {}
    for name in sorted(set(icons["icons"]) | set(icons.get("aliases", {}))):
        by_name.setdefault(squash(re.sub(r"-\d$", "", name)), name)
    found: dict[int, str] = {}
    used: set[str] = set()
    for index, concept in enumerate(concepts):
        code = normal_hexcode(concept["hexcode"])
        candidates = [by_code[code]] if code in by_code else []
        if not by_code:
            spellings = [squash(concept["label"]), *sorted(names[code])]
            candidates = [by_name[s] for s in spellings if s in by_name]
        for name in candidates:
            if name not in used:
                found[index] = name
                used.add(name)
                break
    return found


def render(package: dict[str, Any], name: str) -> np.ndarray:
    icons = package["icons.json"]
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{SIZE}" height="{SIZE}" color="#222">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the npm archives")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    emojibase = read_package(arguments.packages, "emojibase-data")
    sets = {style: read_package(arguments.packages, f"@iconify-json/{style}") for style in STYLES}
    concepts = read_concepts(emojibase)
    names = find_names(concepts, sets, emojibase)

    sprites, rows = [], []
    for style, package in sets.items():
        found = match(concepts, package, names)
        for concept, name in track(found.items(), description=f"{style:28s}"):
            sprite = render(package, name)
            if (sprite[..., 3] > 127).mean() < 0.02:  # drawn outside its own box, or empty
                continue
            sprites.append(sprite)
            rows.append({"concept": concept, "style": style, "icon": name})
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.save(arguments.out / "sprites.npy", np.stack(sprites))
    (arguments.out / "sprites.json").write_text(json.dumps({"concepts": concepts, "sprites": rows}, indent=0))
    print(f"{len(sprites)} sprites of {len(concepts)} concepts in {len(STYLES)} styles -> {arguments.out}")


if __name__ == "__main__":
    main()
