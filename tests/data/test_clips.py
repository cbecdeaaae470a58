"""The generated video questions: deterministic, balanced, and their answers true by an independent reading of the
tracks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from vtprune.data import clips, scenes
from vtprune.inputs import demo_model
from vtprune.measure.samples import clips_samples, scenes_samples
from vtprune.train import demo_clips

FROZEN = "dc011bcb6428e972"


def _asked(index: int, split: str = "val", per_ability: int = 2) -> tuple[tuple[clips.Track, ...], list]:
    """Tracks and questions without a picture."""
    tracks = clips.clip_tracks(index, split)
    return tracks, clips.questions(np.random.RandomState(index), tracks, per_ability)


def test_a_clip_is_frozen():
    c, again = clips.clip(0, "test"), clips.clip(0, "test")
    assert np.array_equal(c.frames, again.frames) and c.questions == again.questions and c.tracks == again.tracks
    assert c.frames.shape == (clips.FRAMES, scenes.SIZE, scenes.SIZE, 3) and c.frames.dtype == np.uint8
    assert c.tracks == clips.clip_tracks(0, "test")
    text = repr([(t.name, t.seen) for t in c.tracks]) + repr([(q.text, q.answer) for q in c.questions])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == FROZEN


def test_splits_differ_and_bad_arguments_raise():
    assert clips.clip_tracks(0, "train") != clips.clip_tracks(0, "test")
    with pytest.raises(ValueError, match="unknown split"):
        clips.clip(0, "dev")
    with pytest.raises(ValueError, match=">= 0"):
        clips.clip(-1)
    with pytest.raises(ValueError, match="3 to 6 frames"):
        clips.clip(0, frames=2)
    with pytest.raises(ValueError, match="at least 3"):
        clips.clip(0, max_items=2)


def _truth(words: list[str], tracks: tuple[clips.Track, ...]) -> str:
    """Answers a question from the boxes alone, frame by frame, written apart from the generator."""
    frames = range(len(tracks[0].boxes))

    def one(color: str, kind: str) -> clips.Track:
        (found,) = [t for t in tracks if (t.color, t.kind) == (color, kind)]
        return found

    if words[:3] == ["is", "there", "a"]:
        a, b = one(*words[6:8]), one(*words[11:13])
        alone = [f for f in frames if a.boxes[f] is not None and b.boxes[f] is None]
        first = [min(f for f in frames if t.boxes[f] is not None) for t in (a, b)]
        assert first[0] != first[1] and bool(alone) == (first[0] < first[1])  # the words say what "before" says
        return "yes" if alone else "no"
    if words[0] == "how":
        frame = int(words[8]) - 1
        return str(len([t for t in tracks if t.boxes[frame] is None]))
    if words[:3] == ["in", "what", "image"]:
        t, there = one(*words[5:7]), words[7] != "not"
        (frame,) = [f for f in frames if (t.boxes[f] is not None) == there]
        return str(frame + 1)
    if words[:2] == ["in", "image"]:
        t = one(*words[5:7])
        new, old = t.boxes[int(words[2]) - 1], t.boxes[int(words[-2]) - 1]
        assert new is not None and old is not None
        gone = {"left": old[0] - new[0], "right": new[2] - old[2], "above": old[1] - new[1], "below": new[3] - old[3]}
        (found,) = [w for w, way in gone.items() if way > 20]
        return found
    asked = [int(w) - 1 for w in words if w.isdigit()]
    assert asked == list(frames)
    if words[0] == "is":
        return "yes" if all(one(*words[2:4]).boxes[f] is not None for f in asked) else "no"
    (found_track,) = [t for t in tracks if all(t.boxes[f] is not None for f in asked)]
    return found_track.color if words[1] == "color" else found_track.kind


@pytest.mark.parametrize("shuffled", [False, True])
def test_answers_are_true(shuffled):
    """Also with the frames in another order, as in training."""
    seen = set()
    for i in range(100):
        tracks, questions = _asked(i, per_ability=4)
        if shuffled:
            rng = np.random.RandomState(i)
            tracks = clips.reorder(tracks, rng.permutation(clips.FRAMES))
            questions = clips.questions(rng, tracks, 4)
        assert len({t.name for t in tracks}) == len(tracks) >= 3
        for q in questions:
            seen.add(q.ability)
            assert q.answer == _truth(q.text.split(), tracks), q
            assert len({f for f, _ in q.boxes}) > 1 or q.ability in ("when", "order"), q
            for frame, box in q.boxes:
                assert box in [t.boxes[frame] for t in tracks]
                assert 0 <= box[0] < box[2] <= scenes.SIZE and 0 <= box[1] < box[3] <= scenes.SIZE
    assert seen == set(clips.ABILITIES)


def test_nothing_overlaps():
    for i in range(100):
        for frame in zip(*(t.boxes for t in clips.clip_tracks(i)), strict=True):
            boxes = [b for b in frame if b is not None]
            for k, a in enumerate(boxes):
                for b in boxes[:k]:
                    assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_words_alone_do_not_tell_the_answer():
    """Neither the ability nor the form of the question, without names, makes an answer likely; every word is one that
    the bundled tokenizer knows."""
    text = (demo_model.FOLDER / "tokenizer.json").read_text(encoding="utf-8")
    known = set(json.loads(text)["model"]["vocab"])
    answers: dict[str, Counter] = {}
    forms: dict[str, Counter] = {}
    for i in range(500):
        for q in _asked(i)[1]:
            assert {*q.text.split(), q.answer} <= known
            answers.setdefault(q.ability, Counter())[q.answer] += 1
            form = " ".join(w for w in q.text.split() if w not in scenes.COLORS and w not in scenes.SHAPES)
            forms.setdefault(form, Counter())[q.answer] += 1
    share = {a: c.most_common(1)[0][1] / c.total() for a, c in answers.items()}
    assert share["order"] < 0.56 and share["counting"] < 0.38 and share["direction"] < 0.3
    assert share["when"] < 0.3 and share["constant"] < 0.32
    for form, c in forms.items():
        bound = 0.56 if set(c) == {"yes", "no"} else 0.42
        assert c.most_common(1)[0][1] / c.total() < bound, (form, c)


def test_no_single_frame_tells_when_or_the_order():
    """Whoever sees one frame only, and guesses the likeliest answer for whether the named things are in it, stays
    behind the whole clip, which tells every answer."""
    seen: dict[tuple, Counter] = {}
    for i in range(400):
        tracks, questions = _asked(i)
        by_name = {t.name: t for t in tracks}
        for q in questions:
            if q.ability not in ("when", "order"):
                continue
            w = q.text.split()
            named = [f"{a} {b}" for a, b in zip(w, w[1:], strict=False) if f"{a} {b}" in by_name]
            for f in range(clips.FRAMES):
                shown = tuple(by_name[n].boxes[f] is not None for n in named)
                seen.setdefault((q.ability, f, "not" in w, shown), Counter())[q.answer] += 1
    for ability in ("when", "order"):
        for f in range(clips.FRAMES):
            cases = [c for key, c in seen.items() if key[:2] == (ability, f)]
            right = sum(c.most_common(1)[0][1] for c in cases) / sum(c.total() for c in cases)
            assert right < {"when": 0.55, "order": 0.9}[ability], (ability, f, right)


def test_shapes_are_drawn_where_the_tracks_are():
    c = clips.clip(2, "test")
    checked = 0
    for t in c.tracks:
        if t.kind != "ring":
            for f, box in enumerate(t.boxes):
                if box is not None:
                    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    pixel = c.frames[f, int(y), int(x)].astype(int)
                    assert min(scenes.COLORS, key=lambda n: np.abs(pixel - scenes.COLORS[n]).sum()) == t.color
                    checked += 1
    assert checked


def test_packed_clips_equal_the_stock_model():
    """Each pair behind the shared frames gets the logits that the stock model gives it alone, in the processor's own
    prompt."""
    model, processor = vtprune.load_demo_model()
    c = clips.clip(0, "val", per_ability=1)
    content = [*({"type": "image"} for _ in c.frames), {"type": "text", "text": c.questions[-1].text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == f"<s> user : {'<image> ' * clips.FRAMES}{c.questions[-1].text} assistant :"
    inputs = processor(
        images=[Image.fromarray(f) for f in c.frames],
        text=f"{prompt} {c.questions[-1].answer}",
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(**inputs).logits[0, -2:]
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        batch = demo_clips.pack([(features, c.questions, {}, torch.arange(len(features)))], processor.tokenizer, 192)
        got = demo_clips.ClipTrainee(model)(batch)[0][0, :-1]
    last = (batch["labels"][0] != -100) & (batch["group"][0] == len(c.questions))
    torch.testing.assert_close(got[last], expected, atol=2e-3, rtol=1e-3)


def test_places_of_named_objects_are_what_the_heads_learn():
    tracks, questions = _asked(1, "train")
    _, processor = vtprune.load_demo_model()
    features = torch.zeros(clips.FRAMES * demo_clips.TOKENS, 192)
    row = (features, questions, demo_clips._places(tracks), torch.arange(len(features)))
    batch = demo_clips.pack([row], processor.tokenizer, 256)
    prefix = 3 + clips.FRAMES * demo_clips.TOKENS
    words = processor.tokenizer.convert_ids_to_tokens(batch["ids"][0, prefix:])
    named = [i for i in range(256) if (batch["mention"][0, i] != -100).all()]
    assert named
    for i in named:
        (track,) = [t for t in tracks if (t.color, t.kind) == (words[i - 1], words[i])]
        for f, box in enumerate(track.boxes):
            cell = "abcd".index(track.item(f).cell[0]) + 4 * (int(track.item(f).cell[1]) - 1) if box else 16
            assert batch["mention"][0, i, f] == cell


def test_missing_and_damaged_weights_are_said(tmp_path: Path):
    from safetensors.torch import save_file

    with pytest.raises(vtprune.VtpruneError, match="is missing"):
        demo_model.load(clips=True, folder=tmp_path)
    (tmp_path / demo_model.CLIPS).write_bytes(b"junk")
    with pytest.raises(vtprune.VtpruneError, match="cannot be read"):
        demo_model.load(clips=True, folder=tmp_path)
    save_file({"other.weight": torch.zeros(2)}, tmp_path / demo_model.CLIPS)
    with pytest.raises(vtprune.VtpruneError, match="has not: other.weight"):
        demo_model.load(clips=True, folder=tmp_path)


def test_bench_shows_all_frames():
    samples = clips_samples(2)
    assert {s.set for s in samples} == {"clips"} and {s.source for s in samples} == {"clips/0", "clips/1"}
    c = clips.clip(0, "test")
    assert [(s.question, s.answer) for s in samples if s.source == "clips/0"] == [
        (q.text, q.answer) for q in c.questions
    ]
    assert all(np.array_equal(a, b) for a, b in zip(samples[0].shown(), c.frames, strict=True))
    (scene, *_) = scenes_samples(1)
    assert scene.shown() == [scene.picture()]
    with pytest.raises(vtprune.VtpruneError, match="at least 1"):
        clips_samples(0)
