"""model2vec beside benchmarks/static.py: its distillation, and its training by tokenlearn on the same sentences.

In an environment of its own, since model2vec asks for an older transformers:

    pip install 'model2vec[distill]' tokenlearn
    python static_model2vec.py --teacher FOLDER --work runs/static-benchmark [--seeds 0 1 2]

--work has sentences.json and means.npy from benchmarks/static.py, whose part `model2vec` measures the folders.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from model2vec import StaticModel
from model2vec.distill import distill


def main(args: argparse.Namespace) -> None:
    texts = json.loads((args.work / "sentences.json").read_text()) if args.seeds else []
    for dimensions in args.dimensions:
        folder = args.work / f"model2vec-no-text-{dimensions}"
        if not folder.exists():
            began = time.process_time()
            model = distill(str(args.teacher), device="cpu", pca_dims=dimensions, quantize_to="float32")
            model.save_pretrained(str(folder))
            print(f"{folder.name}: {time.process_time() - began:.0f} s of CPU", flush=True)
        for seed in args.seeds:
            from tokenlearn.train import train_model

            model = StaticModel.from_pretrained(str(args.work / f"model2vec-no-text-{dimensions}"))
            folder = args.work / f"model2vec-tokenlearn-{dimensions}-{seed}"
            if folder.exists():
                continue
            rows = sorted(random.Random(seed).sample(range(len(texts)), min(args.sentences, len(texts))))
            random.Random(seed).shuffle(rows)  # the last tenth is held out
            torch.manual_seed(seed)
            began = time.process_time()
            vectors = np.load(args.work / "means.npy", mmap_mode="r")[rows]
            trained = train_model(model, [texts[row] for row in rows], vectors, device="cpu", pca_dims=dimensions)
            trained.save_pretrained(str(folder))
            print(f"{folder.name}: {time.process_time() - began:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/static-benchmark"))
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sentences", type=int, default=20_000)
    main(parser.parse_args())
