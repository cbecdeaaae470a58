"""PyramidDrop (arXiv 2410.17247) against the slow transcription: kept sets, hidden states, training."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracles as O
import vtprune

CUTS, RATIOS = (1, 3, 4), (0.7, 0.4, 0.15)
PROMPTS = [[4, 9], [7, 12], [3, 5]]


def check(
    model: nn.Module, inputs: dict[str, Tensor], layers: tuple[int, ...], ratios: tuple[float, ...], positions: str
) -> None:
    """Kept sets and final hidden states of every sample equal the transcription's, run alone and without padding."""
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "pyramiddrop", positions=positions, layers=layers, ratios=ratios) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    assert [s.site for s in report.stages] == [f"llm.{i}" for i in layers]
    for b in range(len(x)):
        at = B.visual_positions(inputs, b)
        want = O.pyramiddrop_oracle(
            model.model.language_model,
            x[b][None],
            None,
            at,
            layers,
            ratios,
            [len(x[b]) - 1],
            renumber=positions == "compact",
        )
        for stage, kept in zip(report.stages, want["kept"], strict=True):
            assert at[stage.kept[b]].tolist() == kept.tolist()
        present = torch.ones(len(x[b]), dtype=torch.bool)
        present[at] = False
        present[want["kept"][-1]] = True
        B.close(hidden[b][present], want["hidden"][0])
        assert not hidden[b][~present].any()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("left", [True, False])
def test_equals_the_transcription(text: str, positions: str, left: bool) -> None:
    check(B.llava(text=text), B.prompts(PROMPTS, left=left), CUTS, RATIOS, positions)


@pytest.mark.parametrize("ratios", [(0.9, 0.5, 0.25), (0.5, 0.25, 0.125), (0.1, 0.1, 0.03), (1.0, 0.6, 0.6)])
def test_several_budgets(ratios: tuple[float, ...]) -> None:
    check(B.llava(text="qwen2"), B.prompts(PROMPTS[:2]), (0, 2, 5), ratios, "original")


def test_two_images_compete_each_for_itself() -> None:
    """Two images in one prompt: each keeps its own budget (the official code knows one image per sample); scores come
    from the one last row."""
    model, inputs = B.llava(text="mistral"), B.prompts([[3, 2, 7], [4, 6]])
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "pyramiddrop", layers=(2,), ratios=(0.25,)) as handle:
        hidden, (stage,) = B.final(model, inputs), handle.report().stages
    lm, first = model.model.language_model, x[0]
    h = first
    with torch.no_grad():
        for i in range(2):
            h = O._run_lm_layer(lm, i, h, list(range(len(first))))
        row = O.lm_attention_row(lm, 2, h, list(range(len(first))), len(first) - 1)
    at = B.visual_positions(inputs, 0)
    want = [
        i for half in (range(B.N), range(B.N, 2 * B.N)) for i in sorted(sorted(half, key=lambda j: -row[at[j]])[:9])
    ]
    assert stage.kept[0].tolist() == want and stage.tokens_out == [18, 9]
    dropped = torch.ones(len(at), dtype=torch.bool)
    dropped[want] = False
    assert not hidden[0][at[dropped]].any()


def test_budget_gives_a_geometric_schedule() -> None:
    """lambda = (K / N) ** (1 / S); the default fractions 1/2, 1/4, 1/8 of 576 tokens are 288, 144, 72."""
    model, inputs = B.llava(), B.prompts([[3, 5]])
    with vtprune.attach(model, "pyramiddrop", keep=5) as handle:
        B.final(model, inputs)
        got = [s.tokens_out[0] for s in handle.report().stages]
    assert got == [math.floor(36 * (5 / 36) ** (1 / 3)), math.floor(36 * (5 / 36) ** (2 / 3)), 5]
    from vtprune.core.types import Geometry
    from vtprune.methods.base import make

    geometry = Geometry("llava", "clip", 576, (24, 24), 1, 23, 24, 32, {"llm": frozenset({"query_attention"})})
    assert [(c.layer, c.keep) for c in make("pyramiddrop", {}).plan(geometry, 72)] == [(8, 288), (16, 144), (24, 72)]


# --------------------------------------------------------------------------------------------------------------------
# options


@pytest.mark.parametrize(
    "score_layer, keys, rope",
    [("previous", "all", True), ("next", "visual", True), ("next", "all", False), ("previous", "visual", False)],
)
def test_score_options(score_layer: str, keys: str, rope: bool) -> None:
    """Each option, written out for the last row: whose projections, softmax over which keys, with or without rotary
    positions."""
    model, inputs = B.llava(text="qwen2"), B.prompts([[4, 9]])
    with vtprune.attach(
        model, "pyramiddrop", layers=(3,), ratios=(0.3,), score_layer=score_layer, keys=keys, rope=rope
    ) as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0).tolist()
    assert stage.kept[0].tolist() == O._top(
        B.scores(model.model.language_model, x, 3, at, score_layer, [len(x) - 1], keys, rope), 10
    )


def test_score_options_matter() -> None:
    model, inputs = B.llava(text="qwen2"), B.prompts([[4, 9]])
    found = set()
    for options in ({}, {"score_layer": "previous"}, {"keys": "visual", "rope": False}, {"rope": False}):
        with vtprune.attach(model, "pyramiddrop", layers=(3,), ratios=(0.3,), **options) as handle:
            B.final(model, inputs)
            found.add(tuple(handle.report().stages[0].kept[0].tolist()))
    assert len(found) >= 3  # keys="visual" alone rescales one row per head and may agree


# --------------------------------------------------------------------------------------------------------------------
# training


def double_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The library's shifted cross-entropy without its cast to float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def turns(inputs: dict[str, Tensor], *spans: tuple[int, int]) -> Tensor:
    """Labels of an unpadded single sample that answer in ``spans``."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for a, b in spans:
        labels[0, a:b] = inputs["input_ids"][0, a:b]
    return labels


def by_hand(model: nn.Module, hidden: Tensor, rows: list[int], labels: Tensor) -> Tensor:
    """Mean cross-entropy of every label whose row in front survived."""
    losses = [
        F.cross_entropy(model.lm_head(hidden[i]), labels[0, position + 1])
        for i, position in enumerate(rows)
        if position + 1 < labels.shape[1] and labels[0, position + 1] != -100
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_training_ranks_by_the_rows_before_each_answer(text: str) -> None:
    """Two answer turns: query rows are the two positions in front of them, and the loss is that of the compacted
    sequence."""
    model, inputs = B.llava(text=text), B.prompts([[4, 16]])
    model.loss_function = double_loss
    labels = turns(inputs, (44, 48), (51, 56))
    (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0)
    want = O.pyramiddrop_oracle(model.model.language_model, x[None], None, at, CUTS, RATIOS, [43, 50])
    with vtprune.attach(model, "pyramiddrop", layers=CUTS, ratios=RATIOS) as handle:
        out = model(**inputs, labels=labels)
        report = handle.report()
    assert [at[s.kept[0]].tolist() for s in report.stages] == [k.tolist() for k in want["kept"]]
    other = O.pyramiddrop_oracle(model.model.language_model, x[None], None, at, CUTS, RATIOS, [len(x) - 1])
    assert [k.tolist() for k in want["kept"]] != [
        k.tolist() for k in other["kept"]
    ]  # the last row would have chosen others
    rows = sorted({*range(len(x))} - {*at.tolist()} | {*want["kept"][-1].tolist()})
    B.close(out.loss, by_hand(model, want["hidden"][0], rows, labels))


def test_training_in_a_padded_batch() -> None:
    """Right-padded samples with different turns choose as if alone."""
    model, inputs = B.llava(), B.prompts([[4, 16], [2, 9]], left=False)
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, spans in enumerate([((44, 48), (51, 56)), ((40, 47),)]):
        for a, e in spans:
            labels[b, a:e] = inputs["input_ids"][b, a:e]
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "pyramiddrop", layers=(1, 4), ratios=(0.5, 0.2)) as handle:
        model(**inputs, labels=labels)
        report = handle.report()
    for b, queries in enumerate([[43, 50], [39]]):
        at = B.visual_positions(inputs, b)
        want = O.pyramiddrop_oracle(model.model.language_model, x[b][None], None, at, (1, 4), (0.5, 0.2), queries)
        assert [at[s.kept[b]].tolist() for s in report.stages] == [k.tolist() for k in want["kept"]]


def test_predictions_of_dropped_rows_leave_the_loss() -> None:
    """The label right behind the image is predicted by the last visual token, which therefore stays, whatever its rank;
    other answers count as they do."""
    model = B.llava()
    model.loss_function = double_loss
    for seed in range(4):
        inputs = B.prompts([[4, 9]], seed=seed)
        labels = turns(inputs, (1, 4), (40, 49))
        (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0)
        want = O.pyramiddrop_oracle(model.model.language_model, x[None], None, at, (2,), (0.6,), [0, 39], stays=[39])
        with vtprune.attach(model, "pyramiddrop", layers=(2,), ratios=(0.6,)) as handle:
            given = labels.clone()
            out = model(**inputs, labels=given)
            assert at[handle.report().stages[0].kept[0]].tolist() == want["kept"][0].tolist()
        assert torch.equal(given, labels)
        rows = sorted({*range(len(x))} - {*at.tolist()} | {*want["kept"][0].tolist()})
        B.close(out.loss, by_hand(model, want["hidden"][0], rows, labels))
        assert 39 in rows


def test_without_an_answer_nothing_is_pruned_in_training() -> None:
    """Labels that answer nowhere give no query row, and the sample stays whole (official code); its neighbour in the
    batch is cut."""
    model, inputs = B.llava(), B.prompts([[4, 9], [4, 9]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[1, 42:46] = inputs["input_ids"][1, 42:46]
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "pyramiddrop", layers=(1, 4), ratios=(0.5, 0.2)) as handle:
        seen: list[Tensor] = []
        hook = model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        with torch.no_grad():
            model(**inputs, labels=labels)
        hook.remove()
        report = handle.report()
    assert [s.tokens_out for s in report.stages] == [[36, 18], [36, 7]]
    for b, queries in enumerate([[], [41]]):
        at = B.visual_positions(inputs, b)
        want = O.pyramiddrop_oracle(model.model.language_model, x[b][None], None, at, (1, 4), (0.5, 0.2), queries)
        assert [at[s.kept[b]].tolist() for s in report.stages] == [k.tolist() for k in want["kept"]]
        B.close(seen[0][b][seen[0][b].any(1)], want["hidden"][0])


def projected(model: nn.Module, keep: list[Tensor]) -> Any:
    """A hook that collects the projector's output with its gradient."""

    def collect(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.retain_grad()
        keep.append(output)

    return model.model.multi_modal_projector.register_forward_hook(collect)


def test_gradient_equals_the_dense_model_with_the_equivalent_mask() -> None:
    """Selection is hard and carries no gradient: what is left is a dense decoder in which rows dropped before layer L
    are no keys from L on."""
    model, inputs = B.llava(text="mistral"), B.prompts([[4, 16]])
    model.loss_function = double_loss
    labels, lm = turns(inputs, (44, 48), (51, 56)), model.model.language_model
    found: list[Tensor] = []
    hook = projected(model, found)
    with vtprune.attach(model, "pyramiddrop", layers=(1, 4), ratios=(0.5, 0.2)) as handle:
        model(**inputs, labels=labels).loss.backward()
        kept = [s.kept[0] + 4 for s in handle.report().stages]
    hook.remove()
    weight = model.model.multi_modal_projector.linear_1.weight
    got, got_weight = found[0].grad[0], weight.grad.clone()
    model.zero_grad()

    (x,) = B.embeddings(model, inputs)
    n = len(x)
    found.clear()
    hook = projected(model, found)
    model.get_image_features(inputs["pixel_values"], return_dict=True)
    hook.remove()
    h = torch.cat([x[:4], found[0][0], x[40:]])[None]
    ids = torch.arange(n)[None]
    rope = lm.rotary_emb(h, ids)
    gone = torch.zeros(n, dtype=torch.bool)
    for index, layer in enumerate(lm.layers):
        if index in (1, 4):
            gone[4:40] = True
            gone[kept[(1, 4).index(index)]] = False
        mask = torch.ones(n, n, dtype=torch.bool).tril() & ~(gone[None] & ~torch.eye(n, dtype=torch.bool))
        h = layer(h, attention_mask=mask[None, None], position_ids=ids, position_embeddings=rope)
    double_loss(model.lm_head(lm.norm(h)), labels, 64).backward()
    B.close(got, found[0].grad[0])
    B.close(got_weight, weight.grad)
    assert bool((got.abs().sum(1) > 0).all())  # rows dropped at layer 1 or 4 still act through the layers before


def test_no_gradient_reaches_tokens_dropped_before_the_first_layer() -> None:
    model, inputs = B.llava(), B.prompts([[4, 16]])
    labels = turns(inputs, (44, 48), (51, 56))
    found: list[Tensor] = []
    hook = projected(model, found)
    with vtprune.attach(model, "pyramiddrop", layers=(0, 3), ratios=(0.5, 0.5)) as handle:
        model(**inputs, labels=labels).loss.backward()
        kept = set(handle.report().stages[0].kept[0].tolist())
    hook.remove()
    size = found[0].grad[0].abs().sum(1)
    assert {i for i in range(B.N) if size[i] > 0} == kept and len(kept) == 18
