"""What a cut inside a packed, folded tower costs: Qwen2.5-VL's vision tower at its real width, one picture of 1,024
visual tokens (4,096 patches), half-way cut to 256.

``python benchmarks/tower.py [--rounds N] [--cpu-time] [--device cpu] [--dtype float32] [--save FILE]``

The limit runs the tower's own blocks on exactly what is left: all patches up to the cut, behind it the first 1,024 rows
in windows as large as they are on average, then the merger on the whole raster; no scores, no selection, no books.
Dense, limit, pruned and limit take turns; an overhead is the pruned time over the mean of its two limits, the second
limit over the first tells the noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from vtprune.measure.environment import environment, in_words
from vtprune.measure.timing import rounds, use_cpu_time

SIDE, KEEP, FOLD = 64, 256, 4  # patches along a side, tokens left, patches of a token


def model(depth: int) -> Any:
    """Qwen2.5-VL with its own tower (width 1280, 16 heads, MLP 3420) and a language model of nothing."""
    import transformers as hf
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

    torch.manual_seed(0)
    vision = Qwen2_5_VLVisionConfig(
        depth=depth,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=64,
        fullatt_block_indexes=[i for i in range(depth) if i % 8 == 7],
    )
    text = Qwen2_5_VLTextConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    )
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=3, video_token_id=4
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config).eval()


class Limit(nn.Module):
    """The tower ``visual`` cut behind block ``behind`` to its first ``KEEP`` tokens."""

    def __init__(self, visual: Any, behind: int):
        super().__init__()
        self.visual, self.behind = visual, behind

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        v, left = self.visual, KEEP * FOLD
        x = v.patch_embed(pixels)
        place = torch.arange(len(x), device=x.device)
        table = v.rotary_pos_emb(x, torch.stack([place // SIDE, place % SIDE], -1))
        windows, whole = (torch.arange(0, len(x) + 1, n, device=x.device) for n in (64, len(x)))
        for i, block in enumerate(v.blocks):
            full = i in v.fullatt_block_indexes
            x = block(x, cu_seqlens=whole if full else windows, position_embeddings=table)
            if i == self.behind:
                n = len(x)
                x, table = x[:left], tuple(t[:left] for t in table)
                windows, whole = (torch.arange(0, left + 1, m, device=x.device) for m in (64 * left // n, left))
        return v.merger(torch.cat([x, x.new_zeros(SIDE * SIDE - len(x), x.shape[1])]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread's CPU time, on a machine that others use")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count (default %(default)s)")
    parser.add_argument("--methods", default="random,uniform", help="(default %(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="blocks (default %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    device, behind = torch.device(args.device), args.depth // 2 - 1
    if args.cpu_time:
        use_cpu_time(device)
    whole = model(args.depth).to(device, getattr(torch, args.dtype))
    visual = whole.model.visual
    pixels = torch.randn(SIDE * SIDE, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    pixels, grid = pixels.to(visual.patch_embed.proj.weight), torch.tensor([[1, SIDE, SIDE]], device=device)
    alone = copy.deepcopy(visual)  # nobody attaches to it
    limit = Limit(alone, behind)
    sides: dict[str, Callable[[], Any]] = {
        "dense": lambda: alone(pixels, grid_thw=grid),
        "limit": lambda: limit(pixels, grid),
        "pruned": lambda: whole.model.get_image_features(pixels, grid),
        "again": lambda: limit(pixels, grid),
    }
    rows = []
    for name in args.methods.split(","):
        with torch.no_grad(), vtprune.attach(whole, name, keep=KEEP, site=f"vision.{behind}"):
            rows.append({"method": name, "ms": rounds(sides, args.rounds, device, warmup=args.warmup)})
        print(json.dumps(rows[-1]), flush=True)
    command = " ".join(["benchmarks/tower.py", *sys.argv[1:]])
    told = {"command": command, "behind": behind, "environment": environment(whole), "rows": rows}
    if args.save:
        args.save.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        args.save.with_suffix(".md").write_text(table(told), encoding="utf-8")
    return 0


def table(told: dict[str, Any]) -> str:
    lines = [
        f"`{told['command']}`: {in_words(told['environment'])}",
        "",
        "| method | pruned over limit: median, least, most | limit over limit | dense over limit | pruned, s |",
        "|---|--:|--:|--:|--:|",
    ]
    for r in told["rows"]:
        each = list(zip(*(r["ms"][side] for side in ("dense", "limit", "pruned", "again")), strict=True))
        over = [2 * pruned / (first + second) for _, first, pruned, second in each]
        noise = [second / first for _, first, _, second in each]
        dense = median(2 * d / (first + second) for d, first, _, second in each)
        lines.append(
            f"| `{r['method']}` behind block {told['behind']} | {median(over):.3f}, {min(over):.3f}, {max(over):.3f} "
            f"| {min(noise):.3f} to {max(noise):.3f} | {dense:.2f} | {median(r['ms']['pruned']) / 1000:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
