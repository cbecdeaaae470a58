"""What the demo's page does with requests that no browser makes, and with a model's process that has ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vtprune.types import VtpruneError

gr = pytest.importorskip("gradio")


def test_a_picture_is_read_only_from_the_folder_of_uploads(tmp_path):
    from vtprune.demos.app import own_upload

    image = SimpleNamespace(GRADIO_CACHE=str(tmp_path / "uploads"))
    mine = tmp_path / "uploads" / "a" / "cat.png"
    assert own_upload(image, SimpleNamespace(path=str(mine))) == str(mine)
    assert own_upload(image, None) is None and own_upload(image, SimpleNamespace(path=None)) is None
    for path in ("/etc/passwd", str(tmp_path / "other.png"), str(tmp_path / "uploads" / ".." / "other.png")):
        with pytest.raises(gr.Error, match="not uploaded"):
            own_upload(image, SimpleNamespace(path=path))


def test_the_page_s_picture_has_that_check(tmp_path):
    from vtprune.demos import app

    page = app.build(SimpleNamespace(), tmp_path)
    (image,) = [b for b in page.blocks.values() if getattr(b, "elem_id", None) == "picture"]
    with pytest.raises(gr.Error, match="not uploaded"):
        image.preprocess(SimpleNamespace(path="/etc/passwd"))


def test_messages_name_files_without_their_folder():
    from vtprune.demos.app import served

    def updates():
        raise VtpruneError("/tmp/up/abc/cat.png is not an image")

    assert list(served(updates, "/tmp/up/abc/cat.png")) == [{"message": "cat.png is not an image"}]


def test_a_model_s_process_that_has_ended_is_told():
    from vtprune.demos import app

    class Gone:
        @property
        def desk(self):
            raise ConnectionRefusedError

    assert app.stopped(Gone(), SimpleNamespace(session_hash="x")) == app.GONE
    assert "has ended; start" in app._welcome(Gone())[0]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"layer": ' + "9" * 5000 + "}", "{"])
def test_options_that_json_cannot_take_are_refused(text):
    from vtprune.demos.worker import _json

    with pytest.raises(VtpruneError, match="the options: not JSON"):
        _json(text, "the options")


def test_sample_pictures_lie_in_the_given_folder(tmp_path):
    from vtprune.demos.samples import saved

    assert all(Path(path).parent == tmp_path for path, *_ in saved(2, tmp_path))
