"""Train the demo model: first its eyes, patch by patch, then everything that it says.

    python tools/demo_vlm/train.py RUN_FOLDER [--vision-minutes 8] [--minutes 75]

Start it again with the same folder to go on from the last checkpoint. Two CPU cores are enough;
a GPU is used where there is one.

1. Vision alone, supervised densely: each patch names what covers it, its color, and its neighbours
   in four directions. End to end, without this, nothing is learnt in the time that this takes.
2. Projector and decoder over the frozen vision, on answers alone, with dozens of questions a
   conversation. Two more losses, on the pictures' tokens in the middle of the decoder, teach what
   all questions need: which image a token belongs to, and what the image before shows there.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import (
    CLASSES,
    DENSE,
    Batch,
    Shown,
    batch,
    colors_alone,
    dense_labels,
    pictures,
    scrambled,
    tinted,
)
from model import TEXT, VISION, DemoVLM
from tokens import EOS, IDS, TOKENS
from torch import nn

from csp_edge.eval.suite import SKILLS, STEPS, album

N_IMAGES_MAX = 16
N_MIDDLE = 3
# pictures a step that are seen by their shapes alone and by their colors alone too: else a shape in
# a color that it never had is taken for another shape, or its color for another color
N_HALF = 16
# of what covers the patches around each, the decoder is asked again
AROUND = [*STEPS, *(f"color {step}" for step in STEPS)]
# these blocks' first heads are shown where to look, less and less, until this share of the time
LOOKING = (3, 4)
GUIDED = 0.95
# images in a conversation: tokens, conversations in a batch
SHAPES = {
    1: (256, 16),
    2: (384, 12),
    3: (448, 10),
    4: (576, 8),
    6: (768, 6),
    8: (960, 5),
    12: (1216, 3),
    16: (1536, 3),
}
# from this share of the time on: images to draw from
CURRICULUM = {
    0.0: [1, 2],
    0.06: [1, 2, 3, 4],
    0.3: [1, 2, 3, 4, 6, 8],
    0.5: [1, 2, 4, 6, 8, 12, 16],
    0.8: [1, 2, 4, 8, 12, 16],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Heads(nn.Module):
    """What training alone asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.ModuleDict(
            {name.replace(" ", "_"): nn.Linear(VISION["n_embd"], n) for name, n in DENSE.items()}
        )
        self.around = nn.ModuleDict(
            {
                name.replace(" ", "_"): nn.Linear(TEXT["n_embd"], n)
                for name, n in DENSE.items()
                if name in AROUND
            }
        )
        self.image = nn.Linear(TEXT["n_embd"], N_IMAGES_MAX)
        self.before = nn.ModuleList(
            nn.Linear(TEXT["n_embd"], n) for n in (len(CLASSES), DENSE["color"])
        )
        self.changed = nn.Linear(TEXT["n_embd"], 2)


def optimizers(parameters: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else. The eyes learn slower."""

    def groups(is_inside: bool) -> list[dict[str, Any]]:
        chosen = [(n, p) for n, p in parameters if is_inside == (".blocks." in n and p.ndim == 2)]
        eyes = [p for n, p in chosen if ".vision." in n or ".dense." in n]
        rest = [p for n, p in chosen if not (".vision." in n or ".dense." in n)]
        both = [{"params": eyes, "scale": 0.3}, {"params": rest, "scale": 1.0}]
        return [group for group in both if group["params"]]

    return [
        torch.optim.Muon(groups(True), weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups(False), betas=(0.9, 0.98), weight_decay=0.02),
    ]


class Run:
    """A model, its optimizers and clock, kept in a folder."""

    def __init__(self, folder: Path, stage: str, minutes: float, lr: tuple[float, float]) -> None:
        self.file = folder / f"{stage}.pt"
        self.minutes, self.lr = minutes, lr  # of Muon and of AdamW
        self.model, self.heads = DemoVLM(len(TOKENS)).to(DEVICE), Heads().to(DEVICE)
        both = nn.ModuleDict({"model": self.model, "heads": self.heads})
        named = [(f".{n}", p) for n, p in both.named_parameters()]
        if stage == "vision":
            named = [(n, p) for n, p in named if ".vision." in n or ".dense." in n]
        self.parameters = [p for _, p in named]
        self.optimizers = optimizers(named)
        self.elapsed, self.step = 0.0, 0
        self.rng = np.random.default_rng()
        if self.file.exists():
            state = torch.load(self.file, map_location=DEVICE, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.elapsed, self.step = state["elapsed"], state["step"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "elapsed": self.elapsed,
            "step": self.step,
        }
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.file)

    def steps(self) -> Iterator[float]:
        """The share of the time used so far, once a step, until it is over."""
        saved = time.monotonic()
        while self.elapsed < self.minutes:
            t0 = time.monotonic()
            share = self.elapsed / self.minutes
            warmup = min(1.0, (self.step + 1) / 100)
            cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share))
            for optimizer, lr in zip(self.optimizers, self.lr, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * lr * warmup * cosine
            yield share
            self.step += 1
            self.elapsed += (time.monotonic() - t0) / 60
            if time.monotonic() - saved > 120:
                self.save()
                saved = time.monotonic()
        self.save()

    def learn(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def dense_loss(
    heads: nn.ModuleDict, features: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Over labels [n_pictures, len(DENSE), N_PATCHES], and the share right where there is one."""
    loss, rights = torch.zeros((), device=DEVICE), {}
    for i, (name, head) in enumerate(heads.items()):
        guess, label = head(features).flatten(0, 1), labels[:, i].flatten()
        # patches that show something count as much as those that don't
        weight = torch.where(label > 0, 1.0, 0.2)
        loss = loss + (F.cross_entropy(guess, label, reduction="none") * weight).mean()
        if (label > 0).any():
            rights[name] = (guess.argmax(-1) == label)[label > 0].float().mean().item()
    return loss, rights


def train_vision(folder: Path, minutes: float) -> Run:
    run = Run(folder, "vision", minutes, lr=(6e-3, 6e-3))
    vision, dense = run.model.vision, run.heads.dense
    for block in vision.blocks:
        block.compile()
    right: dict[str, list[float]] = {name: [] for name in dense}
    for share in run.steps():
        scenes = [s for _ in range(12) for s in album(run.rng, 8, held_out=False)]
        seen = torch.cat([pictures(scenes[i : i + 8], run.rng) for i in range(0, len(scenes), 8)])
        labels = torch.from_numpy(np.stack([dense_labels(s) for s in scenes])).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            features = vision(seen.to(DEVICE)).float()
        loss, rights = dense_loss(dense, features, labels)
        for name, share_right in rights.items():
            right[name].append(share_right)
        run.learn(loss)
        if run.step % 25 == 0:
            figures = " ".join(f"{n}:{np.mean(r[-25:]):.3f}" for n, r in right.items())
            print(
                f"vision {share:.2f} step {run.step} loss {loss.item():.3f} {figures}", flush=True
            )
    return run


def words_loss(
    model: DemoVLM, seen: torch.Tensor, kind: torch.Tensor, color: torch.Tensor
) -> torch.Tensor:
    """How far the pictures' tokens are from the words for what they show, by cosine."""
    words = F.normalize(model.embedding.weight, dim=-1)
    cosines = F.normalize(seen.float(), dim=-1) @ words.T
    losses = []
    for label in (kind.flatten().to(DEVICE), color.flatten().to(DEVICE)):
        candidates = label[label >= 0].unique()
        if len(candidates) > 1:
            chosen = label >= 0
            losses.append(
                F.cross_entropy(
                    20 * cosines[chosen][:, candidates],
                    torch.searchsorted(candidates, label[chosen]),
                )
            )
    return sum(losses, torch.zeros((), device=DEVICE))


def half_seen_loss(run: "Run", b: Batch, chosen: np.ndarray, are_colors: bool) -> torch.Tensor:
    """Of some of the pictures without their colors, or with nothing but them."""
    seen = (scrambled if are_colors else tinted)(b.pictures[chosen], run.rng)
    with torch.autocast(DEVICE, torch.bfloat16):
        features = run.model.vision(seen.to(DEVICE))
        tokens = run.model.project(features).flatten(0, 1)
    labels = colors_alone(b.dense[chosen], are_colors)
    loss, _ = dense_loss(run.heads.dense, features.float(), labels.to(DEVICE))
    kind, color = b.kind[chosen], b.color[chosen]
    nothing = torch.full_like(kind, -100)
    words = (nothing, color) if are_colors else (kind, nothing)
    return loss + words_loss(run.model, tokens, *words)


def look_loss(
    model: DemoVLM,
    before_block: list[torch.Tensor],
    i: int,
    where: list[Shown],
) -> torch.Tensor:
    """How far the first head of block i is from looking at what shows the answer."""
    t = before_block[i].shape[1]
    rope = model.cos[:t], model.sin[:t]
    losses = []
    for x, shown in zip(before_block[i], where, strict=True):
        rows = torch.tensor([row for row, _ in shown], device=DEVICE)
        is_shown = torch.zeros(len(shown), t, dtype=torch.bool)
        for row, (_, columns) in zip(is_shown, shown, strict=True):
            row[columns] = True
        attention = model.blocks[i].look(x, rope, rows)
        hidden = attention.masked_fill(~is_shown.to(DEVICE), -torch.inf)
        losses.append(-hidden.logsumexp(-1))
    return torch.cat(losses).mean()


def train_all(folder: Path, minutes: float, vision: Run | None) -> None:
    run = Run(folder, "all", minutes, lr=(5e-3, 1.5e-3))
    if vision:
        run.model.vision.load_state_dict(vision.model.vision.state_dict())
        run.heads.load_state_dict(vision.heads.state_dict())
    for block in [*run.model.vision.blocks, *run.model.blocks]:
        block.compile(dynamic=True)
    names = list(SKILLS)
    accuracy = dict.fromkeys(names, 0.0)
    by_size: dict[tuple[int, str], list[float]] = {}
    for share in run.steps():
        sizes = next(s for start, s in reversed(CURRICULUM.items()) if share >= start)
        n_images = int(run.rng.choice(sizes))
        n_tokens, n = SHAPES[n_images]
        weights = np.array([1.03 - accuracy[name] for name in names])
        b = batch(run.rng, n, n_images, n_tokens, weights / weights.sum())
        with torch.autocast(DEVICE, torch.bfloat16):
            features = run.model.vision(b.pictures.to(DEVICE))
            last, before_block = run.model(b.tokens.to(DEVICE), b.is_picture.to(DEVICE), features)
            asked = b.labels >= 0
            guess = run.model.output(last[asked]).float()
            seen = before_block[N_MIDDLE][b.is_picture].unflatten(0, (len(b.image), -1))
            image = run.heads.image(seen).float()
            before = [head(seen).float() for head in run.heads.before]
        answer_loss = F.cross_entropy(guess, b.labels[asked].to(DEVICE))
        image_loss = F.cross_entropy(
            image.flatten(0, 1), b.image[:, None].expand(image.shape[:2]).flatten().to(DEVICE)
        )
        before_loss = torch.zeros((), device=DEVICE)
        if n_images > 1:
            for guesses, shows in zip(before, b.before.unbind(1), strict=True):
                before_loss = before_loss + F.cross_entropy(
                    guesses.flatten(0, 1), shows.flatten().to(DEVICE), ignore_index=-100
                )
        seen_loss, _ = dense_loss(run.heads.dense, features.float(), b.dense.to(DEVICE))
        half = run.rng.permutation(len(b.pictures))[:N_HALF]
        half_loss = half_seen_loss(run, b, half, are_colors=False)
        half_loss = half_loss + half_seen_loss(run, b, half, are_colors=True)
        changed_loss = (
            F.cross_entropy(
                run.heads.changed(before_block[N_MIDDLE + 1][b.is_picture]).float(),
                (b.before != b.dense[:, :2])
                .any(1)
                .long()
                .masked_fill(b.before[:, 0] < 0, -100)
                .flatten()
                .to(DEVICE),
            )
            if n_images > 1
            else torch.zeros((), device=DEVICE)
        )
        around_loss, _ = dense_loss(
            run.heads.around, seen.float(), b.dense[:, -len(AROUND) :].to(DEVICE)
        )
        word_loss = words_loss(run.model, before_block[0][b.is_picture], b.kind, b.color)
        guide = max(0.0, 1 - share / GUIDED)
        guide_loss = (
            sum(
                (
                    look_loss(run.model, before_block, i, shown)
                    for i, shown in zip(LOOKING, (b.via, b.where), strict=True)
                ),
                torch.zeros((), device=DEVICE),
            )
            if guide
            else torch.zeros(())
        )
        hints = (
            0.3 * (image_loss + before_loss + word_loss + seen_loss + around_loss + changed_loss)
            + half_loss
            + guide * guide_loss
        )
        run.learn(answer_loss + hints)

        # of whole answers, each with its end; the last one may have none
        is_end = b.labels[asked] == IDS[EOS]
        answer = is_end.cumsum(0) - is_end.long()
        wrong = torch.zeros(int(answer.max()) + 1).index_add_(
            0, answer, (guess.argmax(-1).cpu() != b.labels[asked]).float()
        )
        right, skills = (wrong == 0)[answer[is_end]].float(), b.skill[asked][is_end]
        for i, name in enumerate(names):
            if (skills == i).any():
                share_right = right[skills == i].mean().item()
                accuracy[name] = 0.95 * accuracy[name] + 0.05 * share_right
                by_size.setdefault((n_images, name), []).append(share_right)
        if run.step % 50 == 0:
            print(
                f"all {share:.3f} step {run.step} {run.elapsed:.1f} min images {n_images} "
                f"loss {answer_loss.item():.3f} {image_loss.item():.3f} {before_loss.item():.3f} "
                f"{word_loss.item():.3f} {seen_loss.item():.3f} {around_loss.item():.3f} "
                f"{half_loss.item():.3f} {changed_loss.item():.3f} {guide_loss.item():.3f}",
                flush=True,
            )
            for size in sizes:
                figures = [
                    f"{name}:{np.mean(by_size[size, name][-20:]):.2f}"
                    for name in names
                    if (size, name) in by_size
                ]
                print(f"    {size:2d} {' '.join(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vision-minutes", type=float, default=8)
    parser.add_argument("--minutes", type=float, default=75)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    vision = None
    if not (arguments.folder / "all.pt").exists():
        vision = train_vision(arguments.folder, arguments.vision_minutes)
    train_all(arguments.folder, arguments.minutes, vision)


if __name__ == "__main__":
    main()
