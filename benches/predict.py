"""How many images a second `cdc predict` does: files and .tar shards, one process and several.

    python benches/predict.py --out benches/results/predict

`--images` JPEG files of `--pixels` pixels a side (800 different ones, from the bundled benchmark, linked again and
again) and the same bytes in ten .tar files. Zero-shot CLIP and an untrained CDC (M templates, each with image features
of its own) on the bundled backbone, over the 50 classes of the benchmark. Each row is one run of the command in fresh
processes; its time is from the first image to the last part, importing PyTorch and loading CLIP not counted. All cores
are shared out among the processes as threads; a process alone is also measured on one thread. That all rows of a method
say the same of every image is checked. "reading" is the part of reading, decoding and transforming in the time of one
process with as many threads that does nothing else but this and the model, measured on files and on .tar files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.transforms.v2.functional import to_pil_image

from cdc_models import CDC, Method, ZeroShot, load_clip, save_adapter
from cdc_models.data import ImageList, ImageLoader, emoji_benchmark, test_transform
from cdc_models.data.tar_shards import TarImages
from cdc_models.provenance import git_commit, versions

TARS = 10
CORES = len(os.sched_getaffinity(0))
#: Images from which the part of reading is measured.
READ = 1000


def make_images(folder: Path, count: int, pixels: int) -> None:
    """files/000000.jpg and so on, and the same ones in tars/s-0.tar to s-9.tar."""
    (folder / "files").mkdir()
    (folder / "tars").mkdir()
    images = emoji_benchmark(0, 1).train.images
    names = [f"{i:06}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        file = folder / "files" / name
        if i < len(images):
            to_pil_image(images[i]).resize((pixels, pixels)).save(file, quality=90)
        else:
            os.link(folder / "files" / names[i % len(images)], file)
    for shard in range(TARS):
        with tarfile.open(folder / f"tars/s-{shard}.tar", "w") as tar:
            for name in names[count * shard // TARS : count * (shard + 1) // TARS]:
                data = folder / "files" / name
                member = tarfile.TarInfo(name)  # not what the file is, or a link would become one
                member.size = data.stat().st_size
                with data.open("rb") as content:
                    tar.addfile(member, content)


def predict(source: str, adapter: Path, out: Path, count: int, processes: int, threads: int, workers: int) -> dict:
    """One run of the command in processes with so many threads each; its report."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    arguments = ["predict", f"--images={source}", f"--adapter={adapter}", f"--out={out}", f"--workers={workers}"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "cdc_models.cli", *arguments, f"--shard_size={-(-count // TARS)}", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return json.loads(done.stdout)


def answers(out: Path) -> dict[str, tuple[str, float]]:
    """Class and probability by the name of the image."""
    columns = ["path", "class", "probability"]
    tables = [pyarrow.parquet.read_table(part, columns=columns).to_pylist() for part in sorted(out.glob("*.parquet"))]
    return {r["path"].replace("::", "/").split("/")[-1]: (r["class"], r["probability"]) for t in tables for r in t}


def assert_same(found: dict[str, tuple[str, float]], expected: dict[str, tuple[str, float]]) -> None:
    assert found.keys() == expected.keys()
    for name, (label, probability) in found.items():
        assert label == expected[name][0] and abs(probability - expected[name][1]) < 1e-4, name


def datasets(folder: Path, model: Method) -> dict[str, Dataset[Any]]:
    """The first images, read as the command reads them from files and from .tar files."""
    transform = test_transform(model.backbone)
    names = sorted(os.listdir(folder / "files"))[:READ]
    tars = ConcatDataset([TarImages(folder / f"tars/s-{shard}.tar", transform) for shard in range(TARS)])
    files = ImageList(folder / "files", [(name, 0) for name in names], [""], transform)
    return {"files": files, ".tar files": Subset(tars, range(len(names)))}


def reading_part(model: Method, images: Dataset[Any], threads: int) -> float:
    """Part of reading in the time of reading and model, in this process."""
    reading = computing = 0.0
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    for batch, _ in ImageLoader(images, 100):
        read = time.perf_counter()
        model.predict(batch)
        ended = time.perf_counter()
        reading, computing, started = reading + read - started, computing + ended - read, ended
    torch.set_num_threads(usual)
    return reading / (reading + computing)


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['images']} JPEG images, {facts['pixels']} pixels a side, {facts['kilobytes']:.0f} kB each on average.",
        "",
        "| method | images in | processes | threads of each | seconds | images a second | of one with all threads "
        "| reading | peak MB a process |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rate = row["rate"]
        same = [r for r in rows if (r["method"], r["form"], r["processes"]) == (row["method"], row["form"], 1)]
        alone = max(same, key=lambda r: r["threads"])
        lines.append(
            f"| {row['method']} | {row['form']} | {row['processes']} | {row['threads']} | {row['seconds']:.1f} "
            f"| {rate:.0f} | {rate / alone['rate']:.2f} | {row['reading']:.0%} | {row['peak'] / 1e6:.0f} |"
        )
    told = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{told}; {facts['cores']} cores; {facts['date']}; commit {facts['commit']}.",
            "",
            f"    {facts['command']}",
            "",
        ]
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, default=0, help="processes that read, for each that computes")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    clip, rows = load_clip("bundled"), []
    shared_out = sorted({(1, 1), *((p, max(1, CORES // p)) for p in (1, *arguments.processes))})
    classes = emoji_benchmark(0, 1).train.classes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, arguments.images, arguments.pixels)
        for model in (ZeroShot(clip, classes), CDC(clip, classes)):
            model.eval()
            adapter = save_adapter(model, folder / f"{model.name}.safetensors")
            expected, read = None, datasets(folder, model)
            for form, source in (("files", folder / "files"), (".tar files", folder / f"tars/s-{{0..{TARS - 1}}}.tar")):
                reading = {threads: reading_part(model, read[form], threads) for threads in {t for _, t in shared_out}}
                for processes, threads in shared_out:
                    out = folder / f"{model.name}-{form}-{processes}-{threads}"
                    said = predict(str(source), adapter, out, arguments.images, processes, threads, arguments.workers)
                    assert said["images"] == arguments.images and not said["skipped"], said
                    found = answers(out)
                    expected = expected or found
                    assert_same(found, expected)
                    seconds = said["seconds_predicting"]
                    rows.append({
                        "method": model.name, "form": form, "processes": processes, "threads": threads,
                        "seconds": seconds, "rate": arguments.images / seconds, "reading": reading[threads],
                        "peak": said["peak_memory_bytes"],
                    })  # fmt: skip
                    print(rows[-1], flush=True)
        size = sum(file.stat().st_size for file in (folder / "files").iterdir())
    facts = {
        "images": arguments.images,
        "pixels": arguments.pixels,
        "kilobytes": size / arguments.images / 1e3,
        "workers": arguments.workers,
        "cores": CORES,
        "versions": versions(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(sys.argv),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table(rows, facts))
    print(table(rows, facts))


if __name__ == "__main__":
    main()
