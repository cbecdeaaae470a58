"""What the demo's page does with requests that no browser makes, and with a model's process that has ended."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from vtprune.demos.stops import Stops

from vtprune.core.recipe import Recipe
from vtprune.core.types import VtpruneError


@pytest.fixture(scope="module", autouse=True)
def gr():
    """Imported for these tests alone: it takes seconds, in every process."""
    return pytest.importorskip("gradio")


def test_files_are_read_only_from_the_folder_of_uploads(gr, tmp_path):
    from gradio.data_classes import FileData, ListFiles
    from vtprune.demos.parts import own_upload

    field = SimpleNamespace(GRADIO_CACHE=str(tmp_path / "uploads"), file_types=[".json"])
    mine = str(tmp_path / "uploads" / "a" / "cat.json")
    assert own_upload(field, FileData(path=mine)) == mine and own_upload(
        field, ListFiles([FileData(path=mine)] * 2)
    ) == [mine, mine]
    assert own_upload(field, None) is None and own_upload(field, SimpleNamespace(path=None)) is None
    for path in ("/etc/passwd.json", str(tmp_path / "other.json"), str(tmp_path / "uploads" / ".." / "other.json")):
        for payload in (FileData(path=path), ListFiles([FileData(path=mine), FileData(path=path)])):
            with pytest.raises(gr.Error, match="not uploaded"):
                own_upload(field, payload)
    with pytest.raises(gr.Error, match="takes json files"):
        own_upload(field, FileData(path=mine.replace("json", "png")))


def test_every_field_of_the_page_that_takes_files_has_that_check(gr, tmp_path):
    from gradio.data_classes import FileData, ListFiles
    from vtprune.demos import app

    page = app.build(SimpleNamespace(), tmp_path)
    fields = [
        b for b in page.blocks.values() if isinstance(b, gr.Image | gr.File | gr.Video | gr.UploadButton | gr.Gallery)
    ]
    assert len(fields) == 5  # picture, video, two recipe files, result files
    for field in fields:
        for payload in (FileData(path="/etc/passwd"), ListFiles([FileData(path="/etc/hosts.json")])):
            with pytest.raises(gr.Error, match="not uploaded"):
                field.preprocess(payload)


def test_choices_that_do_not_exist_are_not_repeated_as_html(gr, tmp_path):
    from vtprune.demos import app, options

    page = app.build(SimpleNamespace(), tmp_path)
    fields = [b for b in page.blocks.values() if isinstance(b, gr.Dropdown | gr.Radio | gr.CheckboxGroup)]
    assert len(fields) == 6 + 2 * options.most()["choice"] and all(
        field.preprocess("<img src=x>") == "<img src=x>" for field in fields
    )


def test_messages_name_files_without_their_folder():
    from vtprune.demos.messages import served

    def updates():
        raise VtpruneError("/tmp/up/abc/cat.png is not an image")

    page = SimpleNamespace(asking=Stops())
    assert list(served(page, "x", updates, "/tmp/up/abc/cat.png")) == [{"message": "cat.png is not an image"}]
    assert not page.asking.has("x")


def test_what_is_asked_before_the_desk_knows_of_it_can_be_stopped():
    """As when the model is still being loaded."""
    from vtprune.demos.messages import served

    page, closed = SimpleNamespace(asking=Stops()), []

    def updates():
        page.asking.stop("x")
        try:
            yield {"status": "A waits for the model"}
            yield {"status": "never asked for"}
        finally:
            closed.append(True)

    assert list(served(page, "x", updates)) == [{"status": "stopped", "stopped": True}] and closed == [True]


def test_every_message_in_the_corner_is_made_in_one_place():
    """Where it is escaped."""
    made = re.compile(r"gr\.(Warning|Info|Success|Error)\(")
    folder = Path(__file__).parents[2] / "demos"
    found = [path.name for path in sorted(folder.glob("*.py")) if made.search(path.read_text(encoding="utf-8"))]
    assert found == ["messages.py"]


def test_messages_are_text_that_a_stream_can_carry(gr, monkeypatch):
    from vtprune.demos import messages

    assert messages.why(VtpruneError("a\ud800b")).encode() == b"a\\ud800b"
    assert len(messages.why(VtpruneError("x" * 10**6))) < 1100
    shown = []
    monkeypatch.setattr(gr, "Warning", shown.append)
    messages.warn("<img src=x> & 'more'")
    assert shown == ["&lt;img src=x&gt; &amp; &#x27;more&#x27;"]
    assert (
        messages.refusal("<a href=http://evil.example>x</a>").message == "&lt;a href=http://evil.example&gt;x&lt;/a&gt;"
    )


def files(tmp_path, **texts):
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    return tmp_path


def drawn(folder, uploaded=None, cost="tokens"):
    """What the tab of results shows."""
    from vtprune.demos import app

    page = app.build(SimpleNamespace(), folder, results=folder)
    (button,) = [b for b in page.blocks.values() if getattr(b, "elem_id", None) == "draw"]
    (event,) = [f for f in page.fns.values() if (button._id, "click") in f.targets]
    return event.fn(uploaded, 25, cost)


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"type": "vtprune.Bench", "version": 9}', '{"type": "vtprune.Bench", "version": 1}', "[" * 100_000],
)
def test_the_tab_of_results_tells_no_path_of_the_server(gr, tmp_path, monkeypatch, text):
    shown = []
    monkeypatch.setattr(gr, "Warning", shown.append)
    folder = files(tmp_path, mine=text)
    for uploaded in (None, [str(folder / "mine.json")]):
        status, page = drawn(folder, uploaded)
        assert page == "" and "/" not in status.replace("</div>", "").replace("time, ViT", ""), status
        assert "/" not in shown[-1] and shown[-1] in status


@pytest.mark.ci
def test_a_page_of_results_tells_no_path_and_runs_nothing(tmp_path):
    (source,) = (RESULTS / "fastv-layer-1").glob("*.json")
    result = json.loads(source.read_text(encoding="utf-8"))
    result["command"] = "vtprune bench --model /data/models/secret/llava-1.5 --results " + str(tmp_path)
    status, frame = drawn(files(tmp_path, mine=json.dumps(result)))
    assert "done" in status and " sandbox " in frame
    inside = html.unescape(re.search('srcdoc="(.*)"', frame, re.S)[1])
    assert "--model llava-1.5 --results" in inside and "secret" not in inside and str(tmp_path.parent) not in inside
    assert inside.count("<img") == inside.count("data:image/svg+xml;base64,PHN2Zy") >= 2, "pictures stay whole"
    assert "secret" in drawn(tmp_path, [str(tmp_path / "mine.json")])[1], "an uploaded file is the user's own"
    assert "no such cost" in drawn(tmp_path, cost="<b>")[0]


def test_an_empty_recipe_file_is_not_taken_for_none(tmp_path):
    from vtprune.demos.tab_watch import sent

    empty, marked = tmp_path / "a.json", tmp_path / "b.json"
    empty.touch()
    marked.write_text("{}", encoding="utf-8-sig")
    for path, text in ((empty, ""), (marked, "{}"), (None, None)):
        assert sent(["fastv", path and str(path), "own", 25, "", None])["file"] == text


def test_a_model_s_process_that_has_ended_is_told():
    from vtprune.demos import app, messages
    from vtprune.demos.opening import Opening

    class Gone:
        @property
        def desk(self):
            raise ConnectionRefusedError

        def stop(self, token):
            raise EOFError

    assert messages.stopped(Gone(), SimpleNamespace(session_hash="x")) == messages.GONE
    assert "has ended and is being started again" in app._welcome(Gone(), None)[0]
    assert Opening(Gone(), ["a.png", "what?", "it"], None, 0).start().result() == {"message": messages.GONE}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"layer": ' + "9" * 5000 + "}", "{"])
def test_options_that_json_cannot_take_are_refused(text):
    from vtprune.demos.forms import json_object

    with pytest.raises(VtpruneError, match="the options: not JSON"):
        json_object(text, "the options")


@pytest.mark.parametrize("number, says", [(9, "SIGKILL, perhaps for want of memory"), (15, "SIGTERM")])
def test_how_a_model_s_process_ended(number, says):
    from vtprune.demos.worker import Worker

    worker = Worker("no/such/model", "cpu", "float32")
    assert worker.state() == ""
    with pytest.raises(VtpruneError):
        worker.desk.about()
    os.kill(worker.process.pid, number)
    assert worker.wait() == worker.state() == f"the model's process has ended ({says})", "it never worked"
    worker.close()


@pytest.mark.ci
def test_a_model_s_process_that_worked_is_started_again():
    from vtprune.demos.worker import Worker

    worker = Worker(None, "cpu", "float32")
    about, first = worker.desk.about(), worker.process.pid
    os.kill(first, 9)
    assert worker.wait() and worker.state().endswith("it is being started again")
    with pytest.raises((EOFError, ConnectionError)):
        worker.desk.about()
    worker.restart()
    assert worker.state() == "" and worker.process.pid != first and worker.desk.about() == about
    worker.close()


def test_sample_pictures_lie_in_the_given_folder(tmp_path):
    from vtprune.demos.samples import saved

    assert all(Path(path).parent == tmp_path for path, *_ in saved(2, tmp_path))


def test_recipe_files_in_yaml_are_taken(tmp_path):
    from vtprune.demos.tab_watch import sent

    good, bad = tmp_path / "mine.yaml", tmp_path / "other.yml"
    good.write_text("type: vtprune.Recipe\nversion: 1\nname: mine\nstages:\n  - {method: fastv, keep: 0.25}\n")
    bad.write_text("stages: [")
    fields = sent(["fastv", str(good), "own", 25, "", None])
    recipe = Recipe.from_dict(json.loads(fields["file"]))
    assert (recipe.name, recipe.stages[0].method, recipe.stages[0].keep) == ("mine", "fastv", 0.25)
    with pytest.raises(VtpruneError, match="^other.yml is not YAML"):
        sent(["fastv", str(bad), "own", 25, "", None])
