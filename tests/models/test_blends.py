"""LLaVA-OneVision pools a video's frames behind the projector: notes that are taken in the tower follow."""

from __future__ import annotations

import pytest
import torch

import vtprune
from vtprune.core.types import Selection, TokenView, UnsupportedError
from vtprune.methods.base import Cut
from vtprune.methods.fastvid import FastVID
from vtprune.methods.hiprune import HiPrune

VIDEO = 4  # the placeholder of videos


def seen_by(
    model, inputs, name: str, cls: type, monkeypatch, **options
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What ``cls`` noted of each pass of the tower, and found again behind the projector."""
    told, found = [], []
    note, select = cls.note, cls.select

    def noting(self, view: TokenView, cut: Cut) -> torch.Tensor:
        told.append(note(self, view, cut))
        return told[-1]

    def selecting(self, view: TokenView, cut: Cut) -> Selection | None:
        found.append(view.noted(next(s for s in view.sources if s.startswith("note "))[5:]))
        return select(self, view, cut)

    monkeypatch.setattr(cls, "note", noting)
    monkeypatch.setattr(cls, "select", selecting)
    with vtprune.attach(model, name, keep=0.5, **options), torch.no_grad():
        model(**inputs)
    return told, found


def test_notes_are_pooled_like_the_frames(tiny, monkeypatch):
    model, inputs = tiny("llava-onevision", "video")
    told, found = seen_by(model, inputs, "fastvid", FastVID, monkeypatch)
    (frames,) = (t for t in told if len(t) == 3)  # the image has five tiles
    want = model.model.apply_pooling(frames[..., None])[..., 0].flatten()
    (got,) = found
    torch.testing.assert_close(got[0, :-1], want)
    assert got[0, -1].isnan()  # the new-line token


def test_odd_sides_weigh_unequally(tiny):
    model, _ = tiny("llava-onevision", "video")
    from vtprune.core.planning import bind

    adapter = bind(model)
    tokens, weight = adapter.pooled
    assert weight.sum(1).allclose(torch.ones(len(weight)).double()) and tokens.shape == weight.shape == (4, 4)
    model.config.vision_config.image_size = 24  # 3 x 3 patches become 2 x 2
    adapter = bind(model)
    tokens, weight = adapter.pooled
    x = torch.randn(1, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((x[0][tokens] * weight[..., None]).sum(1), model.model.apply_pooling(x)[0])


def test_images_beside_a_video_have_their_own(tiny, monkeypatch):
    """Passes are counted over images and videos in the prompt's order."""
    model, inputs = tiny("llava-onevision", "video")
    ids = inputs["input_ids"]
    video = ids[:1, (ids[0] == VIDEO).nonzero()[0, 0] - 2 :]  # two words, a video, words
    image = ids[1:, (ids[1] != 0).nonzero()[0, 0] :]
    both = torch.cat([image, video], 1)  # the image first
    joined = {**inputs, "input_ids": both, "attention_mask": torch.ones_like(both)}
    told, found = seen_by(model, joined, "hiprune", HiPrune, monkeypatch, site="projector")
    frames = next(t for t in told if len(t) == 3)
    tiles = next(t for t in told if len(t) == 5)
    pooled = model.model.apply_pooling(frames[..., None])
    values = torch.cat([f.flatten() for f in found])
    values = values[~values.isnan()]
    for want in (pooled.flatten(), tiles[0].flatten()):
        assert float((want[:, None] - values).abs().amin(1).max()) < 1e-6


@pytest.mark.parametrize("name", ["flowcut", "tome", "visionzip"])
def test_what_is_dropped_in_the_tower_has_no_place(name, tiny):
    model, inputs = tiny("llava-onevision", "video")
    with vtprune.attach(model, name, keep=0.5), torch.no_grad():
        with pytest.raises(UnsupportedError, match="interpolates videos behind the projector"):
            model(**inputs)
