"""Pictures of known classes in every layout that can be opened: pieces of two photographs."""

from __future__ import annotations

import io
import itertools
import json
import tarfile

import numpy as np

# In the order of their labels: numbers count as numbers.
CLASSES = ["petal2", "petal10", "roof", "sky"]
TRAIN, VAL = 7, 5  # of every class


def cut_tiles() -> dict[str, dict[str, list[np.ndarray]]]:
    """Pieces of photographs, all different: {split: {class: [(height, width, 3) uint8]}}."""
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    corners = {"petal2": (flower, 90, 200), "petal10": (flower, 180, 40)}
    corners |= {"roof": (china, 150, 100), "sky": (china, 0, 50)}
    cut = {"train": {}, "val": {}}
    for name, (photograph, top, left) in corners.items():
        pieces = []
        for i in range(TRAIN + VAL):
            y, x = top + 13 * i, left + 29 * i
            pieces.append(photograph[y : y + 40 + 2 * i, x : x + 60 - 2 * i])
        cut["train"][name], cut["val"][name] = pieces[:TRAIN], pieces[TRAIN:]
    return cut


def png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write(root, tiles, layout, val="val"):
    """One of the layouts that can be opened; files are named by their number in the class."""
    for split, classes in tiles.items():
        folder = root / (val if split == "val" else split)
        if layout == "folders":
            for name, pieces in classes.items():
                (folder / name).mkdir(parents=True)
                for i, pixels in enumerate(pieces):
                    (folder / name / f"{i}.png").write_bytes(png(pixels))
        elif layout == "tar":
            root.mkdir(exist_ok=True)
            with tarfile.open(f"{folder}.tar", "w") as archive:
                # Not in the order of their names.
                for i, name in itertools.product(reversed(range(len(classes["sky"]))), classes):
                    add(archive, f"{name}/{i}.png", png(classes[name][i]))
        else:
            folder.mkdir(parents=True)
            for name, pieces in classes.items():
                with tarfile.open(folder / f"{name}.tar", "w") as archive:
                    for i, pixels in enumerate(pieces):
                        add(archive, f"{i}.png", png(pixels))
    return root


def write_shards(root, tiles, shards=4, info=True, broken=()):
    """WebDataset shards, the images dealt out; keys are CLASS-NUMBER."""
    root.mkdir(parents=True, exist_ok=True)
    notes = {"classes": CLASSES, "splits": {}}
    for split, classes in tiles.items():
        dealt = [
            (f"{name}-{i}", pixels, CLASSES.index(name))
            for name, pieces in classes.items()
            for i, pixels in enumerate(pieces)
        ]
        names, lengths = [], []
        for s in range(shards):
            names.append(f"{split}-{s:04d}.tar")
            lengths.append(len(dealt[s::shards]))
            with tarfile.open(root / names[-1], "w") as archive:
                for key, pixels, label in dealt[s::shards]:
                    content = b"nothing" if (split, key) in broken else png(pixels)
                    add(archive, f"{key}.png", content)
                    add(archive, f"{key}.cls", str(label).encode())
        notes["splits"][split] = {
            "name": split,
            "num_samples": len(dealt),
            "filenames": names,
            "shard_lengths": lengths,
        }
    if info:
        (root / "_info.json").write_text(json.dumps(notes))
    return root
