"""From the engine's books of one prefill to its :class:`Report`: who is whose, FLOPs, cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vtprune.models.engine.books import by_sample, per_image, tower_record

from . import cost
from .composition import Planned
from .report import Report, StageReport
from .types import Action, Geometry, UnsupportedError

if TYPE_CHECKING:
    from vtprune.models.engine.record import Record
    from vtprune.models.engine.request import Request
    from vtprune.models.engine.run import Run


def passes_of(request: Request) -> list[tuple[Run, int]]:
    """The tower's passes ``(run, row)`` behind a prefill, in the prompt's order; empty without stages in the tower."""
    return [found for rows in request.vision or [] for found in rows]


class Accounts:
    """What the reports of one attachment are made from, besides the books of a prefill.

    Args:
        geometry, shapes: of the adapter.
        key: of the recipe.
        stages: as planned.
        branches: by number of the stage, the side branch of a routing method.
    """

    def __init__(
        self, geometry: Geometry, shapes: Any, key: str, stages: Sequence[Planned], branches: Mapping[int, Any]
    ):
        self.geometry, self.shapes, self.key, self.branches = geometry, shapes, key, branches
        skipped = sorted({c.layer for *_, cuts in stages for c in cuts if c.action is Action.SKIP})
        if unknown := [i for i in skipped if shapes.layers[i].mlp is None]:
            raise UnsupportedError(
                f"what of layer {unknown[0]} is its attention and what its MLP could not be counted, so that what "
                "leaving one of them out saves could not be told"
            )
        self.methods = [stage.method for stage, *_ in stages]
        # stage and site of the cuts that decide raster by raster
        self.apart = {
            (n, cut.site)
            for n, (_, method, cuts) in enumerate(stages)
            for cut in cuts
            if method.info.raster and not cut.joint
        }
        self.inside = any(cut.inside for *_, cuts in stages for cut in cuts)
        # which layer side branches are copies of
        self.splits = {
            n: cut.layer for n, (*_, cuts) in enumerate(stages) for cut in cuts if cut.action is Action.STASH
        }

    def of_run(self, run: Run) -> Report:
        """The report of a bare tower."""
        s, n = self.shapes, run.tokens
        per = list(zip(*run.layer_tokens, strict=True))  # per image, per block
        return Report(
            visual_tokens=[n] * run.images,
            stages=tuple(self._stage(per_image(r, n)) for r in run.records),
            layer_tokens=[list(row) for row in per],
            flops=sum(self._tower(run, g, row, float(run.valid[g].sum())) for g, row in enumerate(per)),
            dense_flops=run.images * cost.vision(s, 1, n, [n] * s.vdepth),
            kv_bytes=0,
            dense_kv_bytes=0,
            recipe=self.key,
            grids=[[run.grid or self.geometry.grid]] * run.images,
        )

    def of_request(self, request: Request) -> Report:
        """The report of a prefill of the language model."""
        s = self.shapes
        samples = range(len(request.parts))
        layers = [list(row) for row in zip(*request.layer_tokens, strict=True)]  # per sample, per layer
        total = [sum(len(p.columns) for p in parts) for parts in request.parts]
        text = request.text_tokens
        dense = [[total[b] + text[b]] * s.depth for b in samples]
        held = [[c + text[b] for c in layers[b]] for b in samples]  # whose keys and values the layer holds
        only = [[request.keys_only.get(i, [0] * len(samples))[b] for i in range(len(held[b]))] for b in samples]
        passing = [[h - o for h, o in zip(held[b], only[b], strict=True)] for b in samples]  # that go through it
        gone, idle = request.evicted, [key for key in request.skipped if request.idle(*key)]
        left = [[gone[i][b] + text[b] if i in gone else n for i, n in enumerate(held[b])] for b in samples]
        for i in (i for i, half in idle if half == "attention"):
            left = [[*row[:i], 0, *row[i + 1 :]] for row in left]
        dense_vision, vision = self._vision(request)
        dense_flops, spared = self._onward(request, dense)
        return Report(
            visual_tokens=total,
            stages=tuple(self._stages(request)),
            layer_tokens=layers,
            flops=vision
            + self._side_branches(request)
            + sum(int(work.sum()) for work in request.work)
            + sum(
                cost.decoder_layer(s, i, n)
                for first, end, counts in request.ahead
                for i in range(first, end)
                for n in counts
            )
            + sum(cost.prefill(s, p, h) for p, h in zip(passing, held, strict=True))
            - sum(cost.half(s, i, half, passing[b][i]) for i, half in idle for b in samples)
            - spared,
            dense_flops=dense_vision + dense_flops,
            kv_bytes=sum(cost.kv_bytes(s, row) for row in left),
            dense_kv_bytes=sum(cost.kv_bytes(s, row) for row in dense),
            recipe=self.key,
            shelved_bytes=0 if request.shelf is None else request.shelf.bytes,
            grids=[[p.grid for p in parts] for parts in request.parts],
            skipped=[
                [f"llm.{i}.{half}" for (i, half), left in sorted(request.skipped.items()) if left[b]] for b in samples
            ],
            skipped_online=[
                [
                    f"llm.{i}.mlp"
                    for i, shown in sorted(request.shown.items())
                    if any(left and b == who for left, who in zip(shown.left, request.origin, strict=True))
                ]
                for b in samples
            ],
        )

    def _onward(self, request: Request, dense: Sequence[Sequence[int]]) -> tuple[int, int]:
        """FLOPs of the dense model, of which each layer holds ``dense`` tokens (by sample), and what of a new prompt's
        a turn that chooses again is spared. The dense model goes on with its cache there."""
        s = self.shapes
        whole = sum(cost.prefill(s, row) for row in dense)
        if request.resumed == 0:
            return whole, 0
        new = request.real[:, request.resumed :].sum(1).tolist()
        held = [row[0] for row in dense]
        spared = [
            sum(cost.decoder_layer(s, i, h) - cost.onward(s, i, n, h) for n, h in zip(new, held, strict=True))
            for i in range(s.depth)
        ]
        return whole - sum(spared), sum(spared[: request.front])

    def _stages(self, request: Request) -> list[StageReport]:
        tower = [run.records for run, _ in passes_of(request)]
        stages = [self._stage(tower_record(request, i)) for i in range(len(tower[0]) if tower else 0)]
        behind = (*(request.entry.records if request.entry else ()), *request.records)
        return stages + [self._stage(by_sample(request, r, (r.stage, r.site) in self.apart)) for r in behind]

    def _stage(self, record: Record) -> StageReport:
        r = record
        method = self.methods[r.stage]
        return StageReport(r.site, method, r.tokens_in, r.tokens_out, r.kept, r.assignment, r.scores, r.units)

    def _vision(self, request: Request) -> tuple[int, int]:
        """FLOPs of tower and projector, dense and as they ran."""
        s = self.shapes
        every = [p for parts in (request.parts if request.pictures is None else request.pictures) for p in parts]
        new = [p for p in every if int(p.columns[0]) >= request.resumed] if request.resumed else every
        sizes = [n for p in new for n in p.passes]  # tokens of each pass of the tower
        dense = sum(cost.vision(s, 1, n, [n] * s.vdepth) for n in sizes)
        if request.vision is None:
            return dense, dense
        spent = 0
        lengths = {id(run): run.layer_tokens for run, _ in passes_of(request)}  # read once: they may lie on the device
        for run, g in passes_of(request):
            cuts = [r for r in run.records if r.site.startswith(("vision", "pixels"))]
            # what is folded behind the tower is folded from the whole raster
            whole = not cuts or self.geometry.fold > 1
            projected = float(run.handed_over(g) if whole else cuts[-1].tokens_out[g])
            spent += self._tower(run, g, [row[g] for row in lengths[id(run)]], projected)
        return dense, spent

    def _tower(self, run: Run, g: int, layer_tokens: Sequence[int], projected: float) -> int:
        """FLOPs of image ``g`` in the tower and of ``projected`` tokens in the projector."""
        # (of a tower that folds, every patch is embedded)
        reduced = run.records and run.records[0].site == "pixels" and self.geometry.fold == 1
        patches = run.records[0].tokens_out[0] if reduced else run.handed_over(g)  # that are embedded
        fed = run.fed_tokens(g) or None
        whole = cost.vision(self.shapes, 1, patches, layer_tokens, self.inside, projected, run.seen_by(g), fed)
        exchanged = sum(cost.exchange(self.shapes, m, seen[g]) for m, seen in run.exchanged)
        return whole - 2 * run.spared + exchanged + sum(int(work[g]) for work in run.work)

    def _side_branches(self, request: Request) -> int:
        """FLOPs of the methods' own layers."""
        flops = 0
        for stage, counts in request.branched.items():
            flops += sum(
                len(self.branches.get(stage, ())) * cost.decoder_layer(self.shapes, self.splits[stage], n)
                for n in counts
            )
        flops += sum(cost.decoder_layer(self.shapes, i, n) for i, counts in request.fused for n in counts)
        return flops
