"""Small synthetic datasets in the published layouts; the images are one grey pixel in size."""

import json

from PIL import Image

from cdc_models.data import BASE_TO_NEW, IMAGENET_VARIANTS

SPLIT_FILES = [d for d in BASE_TO_NEW if hasattr(d.layout, "file")]
SYNSETS = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark", "n02007558": "flamingo"}


def picture(path, colour=(120, 60, 200), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def split_file_tree(root, dataset, classes=3, images=6, pictures=True):
    """Images 0 to 3 of each class in train, then one in val and the rest in test; labels in falling order."""
    folder = root / dataset.folder
    split = {"train": [], "val": [], "test": []}
    for label in reversed(range(classes)):
        for i in range(images):
            part = "train" if i < images - 2 else "val" if i == images - 2 else "test"
            path = f"class_{label}/{i}.png"
            split[part].append([path, label, f"thing_{label}"])
            if pictures:
                picture(folder / dataset.layout.images / path)
    for name in (dataset.layout.images, *dataset.layout.folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / dataset.layout.file).write_text(json.dumps(split))
    return split


def aircraft_tree(root):
    folder = root / "fgvc_aircraft"
    variants = ["707-320", "A300B4", "Falcon 900", "Yak-42"]
    (folder / "images").mkdir(parents=True)
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in variants))
    for part, count in (("train", 3), ("val", 2), ("test", 2)):
        lines = [f"{part[:2]}{label}{i} {name}" for label, name in enumerate(variants) for i in range(count)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            picture(folder / "images" / f"{line.split()[0]}.jpg")
    return variants


def classnames(folder, names=SYNSETS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in names.items()))


def imagenet_tree(root, names=SYNSETS):
    folder = root / "imagenet"
    classnames(folder, names)
    for wnid in names:
        for i in range(3):
            picture(folder / "images/train" / wnid / f"{wnid}_{i}.JPEG")
        picture(folder / "images/val" / wnid / "ILSVRC2012_val_1.JPEG")
        (folder / "images/val" / wnid / ".hidden").write_text("")


def variant_tree(root, name, folders):
    dataset = next(d for d in IMAGENET_VARIANTS if d.name == name)
    folder = root / dataset.folder
    for wnid in folders:
        picture(folder / dataset.layout.test / wnid / "0.jpg")
    (folder / dataset.layout.test / "README.txt").write_text("not a class")
    return folder
