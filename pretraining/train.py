"""Pre-train the bundled CLIP on rendered artwork (what made `cdc_models/bundled/clip/model.safetensors`).

    python pretraining/train.py --artwork artwork/ --run runs/bundled            # again: goes on where it stopped
    python pretraining/train.py --artwork artwork/ --run runs/bundled --export cdc_models/bundled/clip/model.safetensors

Symmetric InfoNCE on batches of distinct concepts, each in a random style under a random scene and with a random
caption. Every step draws from a generator seeded by (seed, step), so a run that was stopped goes on as if it had
not been. The learning rate falls along a cosine in every cycle and starts anew in the next (SGDR, Loshchilov and
Hutter, ICLR 2017), so a finished run can be taken further. HELD_OUT artists are never seen; their zero-shot accuracy
is logged and steers nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from prepare import STYLES
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdc_models.clip.tokenizer import cut_tokenizer
from cdc_models.data.scenes import compose_scenes

HELD_OUT = ("twemoji", "fxemoji", "streamline-emojis")
CONFIG = Path(__file__).parents[1] / "cdc_models/bundled/clip/config.json"
TEXT_LENGTHS = (12, 18, 24)  # a batch is cut to one of these, drawn: few compiled shapes

BATCH, PEAK_LR, WARM_UP, WEIGHT_DECAY, CLIP_NORM = 256, 2e-3, 150, 0.1, 1.0
FULL_HARDNESS_AT = 0.6  # of the first cycle


class Artwork:
    """Sprites by concept and style, and captions for them."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "sprites.json").read_text())
        self.sprites = torch.from_numpy(np.load(folder / "sprites.npy")).permute(0, 3, 1, 2).contiguous()
        self.concepts: list[dict[str, Any]] = index["concepts"]
        self.of_concept: dict[int, list[tuple[int, str]]] = defaultdict(list)
        self.of_style: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row, sprite in enumerate(index["sprites"]):
            self.of_style[sprite["style"]].append((sprite["concept"], row))
            if sprite["style"] not in HELD_OUT:
                self.of_concept[sprite["concept"]].append((row, sprite["style"]))

    def caption(self, concept: int, style: str, rng: random.Random) -> str:
        about = self.concepts[concept]
        label, tags = about["label"], about["tags"] or [about["label"]]
        word, kind = rng.choice(STYLES[style]), rng.choice([about["subgroup"], about["group"]])
        forms = (
            label,
            f"{label}.",
            f"a photo of a {label}.",
            f"a picture of a {label}.",
            f"an image of the {label}.",
            f"a drawing of a {label}.",
            f"{label} emoji",
            f"a {word} drawing of a {label}.",
            f"{label}, {word} style.",
            f"a photo of a {label}, a type of {kind}.",
            f"{label}, {rng.choice(tags)}",
            f"{rng.choice(tags)} {label}.",
            " ".join(rng.sample(tags, min(len(tags), 3))),
        )
        return rng.choice(forms)


def scale_and_shift(mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)


def text_features(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """open_clip's encode_text over the first columns only: a causal tower that reads the end of text needs no more."""
    length = tokens.shape[1]
    hidden = model.token_embedding(tokens) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    last = model.ln_final(hidden)[torch.arange(len(tokens)), tokens.argmax(-1)]
    return F.normalize(last @ model.text_projection, dim=-1)


def contrastive_loss(model: open_clip.CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text_features(model, tokens).T
    target = torch.arange(len(images))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def learning_rate(step: int, cycles: list[int]) -> float:
    """Warm-up, then a cosine to zero, in every cycle."""
    for length in cycles:
        if step < length:
            return PEAK_LR * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / length))
        step -= length
    return 0.0


@torch.no_grad()
def held_out_accuracy(model: open_clip.CLIP, art: Artwork, tokenizer: Any, style: str, normalise: Any) -> float:
    """Zero-shot accuracy on one unseen artist, fully hard scenes, averaged over disjoint groups of 50 classes."""
    rows = art.of_style[style].copy()
    random.Random(0).shuffle(rows)
    correct = total = 0
    for start in range(0, len(rows) - 49, 50):
        concepts, sprites = zip(*rows[start : start + 50], strict=True)
        tokens = tokenizer([f"a photo of a {art.concepts[c]['label']}." for c in concepts])
        text = text_features(model, tokens)
        generator = torch.Generator().manual_seed(start)
        scenes = compose_scenes(art.sprites[list(sprites)].repeat(4, 1, 1, 1), size=48, generator=generator)
        guess = (model.encode_image(normalise(scenes), normalize=True) @ text.T).argmax(-1)
        correct += int((guess == torch.arange(50).repeat(4)).sum())
        total += len(guess)
    return correct / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artwork", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--cycles", type=int, nargs="+", default=[3000, 2500], help="steps of each cosine cycle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations and checkpoints")
    parser.add_argument("--export", type=Path, help="write the finished weights in fp16 to this file")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()

    steps = sum(arguments.cycles)
    config = json.loads(CONFIG.read_text())
    torch.manual_seed(arguments.seed)
    model = open_clip.CLIP(**config["model_cfg"])
    tokenizer = cut_tokenizer(config["tokenizer"]["merges"], config["model_cfg"]["text_cfg"]["context_length"])
    mean, std = scale_and_shift(config["preprocess_cfg"]["mean"], config["preprocess_cfg"]["std"])

    def normalise(images: Tensor) -> Tensor:
        return (images - mean) / std

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
        fused=True,
    )
    arguments.run.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.run / "checkpoint.safetensors"
    names = [name for name, _ in model.named_parameters()]
    by_name = dict(model.named_parameters())
    first = 0
    if checkpoint.exists():
        stored = load_file(checkpoint)
        first = int(stored["step"])
        model.load_state_dict({n: stored[f"model.{n}"] for n in names})
        for name in names:
            optimizer.state[by_name[name]] = {
                "step": torch.tensor(float(first)),
                "exp_avg": stored[f"exp_avg.{name}"],
                "exp_avg_sq": stored[f"exp_avg_sq.{name}"],
            }
        print(f"resuming at step {first}")

    art = Artwork(arguments.artwork)
    trainable_concepts = sorted(art.of_concept)
    loss_of = contrastive_loss if arguments.no_compile else torch.compile(contrastive_loss)
    started, running = time.time(), 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("pre-training", total=steps, completed=first)
        for step in range(first, steps):
            rng = random.Random(arguments.seed * 1_000_003 + step)
            generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
            length = rng.choices(TEXT_LENGTHS, (0.7, 0.2, 0.1))[0]
            rows, captions = [], []
            for concept in rng.sample(trainable_concepts, BATCH):
                row, style = rng.choice(art.of_concept[concept])
                caption = art.caption(concept, style, rng)
                fits = len(tokenizer.encode(caption)) <= length - 2
                rows.append(row)
                captions.append(caption if fits else art.concepts[concept]["label"])
            tokens = tokenizer(captions, context_length=length)
            hardness = min(1.0, step / (FULL_HARDNESS_AT * arguments.cycles[0]))
            images = normalise(compose_scenes(art.sprites[rows], size=48, hardness=hardness, generator=generator))

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.cycles)
            loss = loss_of(model, images, tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            running += loss.item()
            progress.update(bar, completed=step + 1)

            if (step + 1) % arguments.every == 0 or step + 1 == steps:
                model.eval()
                accuracy = {s: held_out_accuracy(model, art, tokenizer, s, normalise) for s in HELD_OUT}
                model.train()
                line = {
                    "step": step + 1,
                    "samples": (step + 1) * BATCH,
                    "loss": running / (step % arguments.every + 1),
                    "scale": model.logit_scale.exp().item(),
                    "held_out_accuracy": accuracy,
                    "seconds": round(time.time() - started, 1),
                }
                running = 0.0
                with (arguments.run / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                progress.print(json.dumps(line))
                state = {"step": torch.tensor(step + 1)}
                for name in names:
                    state[f"model.{name}"] = by_name[name].detach()
                    state[f"exp_avg.{name}"] = optimizer.state[by_name[name]]["exp_avg"]
                    state[f"exp_avg_sq.{name}"] = optimizer.state[by_name[name]]["exp_avg_sq"]
                save_file(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)

    if arguments.export:
        weights = {name: by_name[name].detach().to(torch.float16).contiguous() for name in names}
        save_file(weights, arguments.export, metadata={"steps": str(steps), "seed": str(arguments.seed)})
        print(f"wrote {arguments.export}")


if __name__ == "__main__":
    main()
