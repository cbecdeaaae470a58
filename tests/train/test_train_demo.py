"""The trainer computes what the stock model computes, and growing it changes nothing."""

from __future__ import annotations

import os

import pytest
import torch

import vtprune
from vtprune.data import scenes
from vtprune.train import demo_features, demo_model, demo_packing, demo_trainee


@pytest.fixture(scope="module")
def small():
    tokenizer = demo_model.processor_and_tokenizer().tokenizer
    torch.manual_seed(0)
    model = demo_model.build_model(tokenizer, 2).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim > 1 else 0.2))
    return tokenizer, model


def _packed(tokenizer):
    data = demo_packing.Packed([], tokenizer, 0, room=64)
    s = scenes.scene(5, "train")
    pairs = []
    for q in s.questions[:5]:
        pairs.append(data._pair(q.ability, q.text.split(), q.answer, {}))
    features = torch.randn(demo_model.TOKENS, 384, generator=torch.Generator().manual_seed(1))
    return data.batch([(features, pairs, None)], shuffle=False), pairs, features


def test_shards_run_no_code(small, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    tokenizer, _ = small
    good = {
        "features": torch.ones(1, demo_model.TOKENS, 384, dtype=torch.bfloat16),
        "rows": [[("text", "what ?", "red")]],
        "dense": torch.zeros(1, 2, demo_model.TOKENS),
    }
    torch.save(good, tmp_path / "val-000000.pt")
    data = demo_packing.Packed([tmp_path / "val-000000.pt"], tokenizer, 0)
    assert len(data.items) == 1 and data.batch(data.items)["features"].shape == (1, demo_model.TOKENS, 384)
    torch.save({**good, "rows": Runs()}, tmp_path / "val-000001.pt")
    (tmp_path / "val-000002.pt").write_bytes(b"junk")
    torch.save([1], tmp_path / "val-000003.pt")
    for number in (1, 2, 3):
        with pytest.raises(vtprune.VtpruneError, match="no shard of features"):
            demo_packing.Packed([tmp_path / f"val-00000{number}.pt"], tokenizer, 0)
    assert not (tmp_path / "ran").exists()


def test_packed_training_equals_the_stock_model(small):
    """Each packed pair gets the logits that the stock model gives it alone behind the image."""
    tokenizer, model = small
    batch, pairs, features = _packed(tokenizer)
    net = demo_trainee.Trainee(model, dtype=torch.float32)
    with torch.no_grad():
        logits, *_ = net(batch["features"], batch["ids"], batch["position"], batch["mask"])
        image = model.model.multi_modal_projector(features[None])
        placed = 0
        for k, pair in enumerate(pairs, 1):
            q, a = pair.ids, pair.answer
            where = (batch["group"][0, demo_model.PREFIX :] == k).nonzero()[:, 0]
            if not len(where):
                continue
            placed += 1
            words = model.get_input_embeddings()(torch.tensor([tokenizer("<s> user :").input_ids + q + a]))
            embeds = torch.cat([words[:, :3], image, words[:, 3:]], dim=1)
            want = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)[
                0, demo_model.PREFIX :
            ]
            assert torch.allclose(logits[0, where + 1], want, atol=2e-4 * float(want.abs().max()))
    assert placed >= 3


def test_growing_preserves_the_function(small):
    tokenizer, model = small
    batch, *_ = _packed(tokenizer)
    grown = demo_model.grow(model, tokenizer)
    assert grown.config.text_config.num_hidden_layers == demo_model.LAYERS
    with torch.no_grad():
        args = (batch["features"], batch["ids"], batch["position"], batch["mask"])
        want = demo_trainee.Trainee(model, dtype=torch.float32)(*args)[0]
        got = demo_trainee.Trainee(grown, dtype=torch.float32)(*args)[0]
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def test_mentions_and_sides_are_true(small):
    tokenizer, _ = small
    data, places = demo_packing.Packed([], tokenizer, 0), demo_packing._places(5)
    scene = scenes.scene(5, "train")
    for item in scene.items:
        if item.kind != "sign":
            number = demo_packing.cell_number(*places[(item.color, item.kind)])
            assert f"{'abcd'[number % 4]}{number // 4 + 1}" == item.cell
    for q in scene.questions:
        if q.ability == "relation":
            words = q.text.split()
            pair = data._pair(q.ability, words, q.answer, places)
            (at,) = [i for i, v in enumerate(pair.dx) if v >= 0]
            word = next(w for w in words if w in demo_packing.TURNED)
            side = {
                "left": pair.dx[at] == 0,
                "right": pair.dx[at] == 2,
                "above": pair.dy[at] == 0,
                "below": pair.dy[at] == 2,
            }[word]
            assert side == (q.answer == "yes")
            assert demo_packing.turned(demo_packing.turned(words)) == words


def test_dense_labels_mark_the_items():
    s = scenes.scene(2, "train")
    kind, color = demo_features._dense_labels(s).reshape(2, 12, 12)
    for item in s.items:
        if item.kind != "sign":
            x, y = item.center
            assert scenes.SHAPES[kind[int(y // 14), int(x // 14)] - 1] == item.kind
            assert list(scenes.COLORS)[color[int(y // 14), int(x // 14)] - 1] == item.color
