"""Trains the bundled VLM: a stock ``LlavaForConditionalGeneration`` with a frozen DINOv2 tower, on easy-VQA and
:mod:`vtprune.data.scenes`.

    python -m vtprune.train.demo_vlm cache --out work/features      # tower features, once
    python -m vtprune.train.demo_vlm fit --features work/features --out work/demo_vlm

The tower's features are computed once and kept in bfloat16. Many question-answer pairs share one image in one sequence:
the pairs see the image and themselves (block mask) and their positions restart after the image, so each pair is exactly
what the model meets at inference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .demo_features import cache
from .demo_fit import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    c = sub.add_parser("cache", help="compute the tower's features")
    c.add_argument("--out", type=Path, required=True)
    c.add_argument("--split", default="train")
    c.add_argument("--start", type=int, default=0)
    c.add_argument("--stop", type=int, default=18000)
    f = sub.add_parser("fit", help="train projector and language model")
    f.add_argument("--features", type=Path, required=True)
    f.add_argument("--out", type=Path, required=True)
    f.add_argument("--minutes", type=float, nargs=2, default=(35.0, 30.0), help="wall clock of the two phases")
    f.add_argument("--batch", type=int, default=16)
    f.add_argument("--lr", type=float, default=2e-3)
    f.add_argument("--seed", type=int, default=0)
    f.add_argument("--start-from", type=Path, help="skip the first phase: a folder it has saved")
    f.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    if a.what == "cache":
        cache(a.out, a.start, a.stop, a.split)
    else:
        fit(
            a.features,
            a.out,
            minutes=tuple(a.minutes),
            batch=a.batch,
            lr=a.lr,
            seed=a.seed,
            threads=a.threads,
            start_from=a.start_from,
        )


if __name__ == "__main__":
    main()
