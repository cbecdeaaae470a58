"""What people read in a shell and in the log: a line or a few, with the numbers of the report."""

from __future__ import annotations

import logging

import pytest
from transformers import pipeline

import vtprune
from fake import picture, tiny
from vtprune.core.log import LOG, shown
from vtprune.inputs.chats import prepare


@pytest.fixture(scope="module")
def asked():
    model, processor = tiny()
    return model, prepare(processor, [picture(), picture()], ["what", "what is it"])


def test_a_handle_says_what_is_attached_where(asked):
    model, inputs = asked
    with vtprune.attach(model, "pyramiddrop", keep=4, layers=[2]) as handle:
        start = "<Handle pyramiddrop(keep=4, layers=[2]) to LlavaForConditionalGeneration (family llava)"
        assert repr(handle) == start + ">"
        model(**inputs)
        told, report = repr(handle), handle.report()
        ratio = report.flops / report.dense_flops
        assert told.startswith(start + "; last prefill [16, 16] -> [4, 4] visual tokens, 8.0 effective")
        assert f"FLOPs {ratio:.2f} of dense" in told and len(told) < 250 and "\n" not in told
    assert "taken out" in repr(handle) and "4, layers" in repr(handle)


def test_a_report_is_no_page_of_tensors(asked):
    model, inputs = asked
    with vtprune.attach(model, "pyramiddrop", keep=4, layers=[2]) as handle:
        model(**inputs)
        report = handle.report()
    assert repr(report.stages[0]) == "<StageReport llm.2 pyramiddrop [16, 16] -> [4, 4]>"
    assert repr(report).startswith(
        f"<Report {report.recipe}: [16, 16] -> [4, 4] visual tokens, 8.0 effective, FLOPs 0."
    )
    assert repr(report).endswith("; llm.2 pyramiddrop [16, 16] -> [4, 4]>") and len(repr(report)) < 250


def test_many_stages_and_samples_stay_one_line():
    model, processor = tiny()
    inputs = prepare(processor, [picture()] * 6, ["what"] * 6)
    with vtprune.attach(
        model, "pyramiddrop", layers=[0, 1, 2, 3, 4, 5], ratios=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    ) as handle:
        model(**inputs)
    told = repr(handle.report())
    assert "96 -> 36 visual tokens in 6 samples" in told and "2 more, llm.5" in told and len(told) < 400


@pytest.mark.parametrize("name", vtprune.methods())
def test_facts_of_a_method_are_three_lines(name):
    info = vtprune.describe(name)
    told = repr(info).splitlines()
    assert len(told) == 3 and told[0] == f"<MethodInfo {name} ({info.paper}): {info.idea}"
    assert all(option in told[2] for option in info.options) and "<class" not in repr(info)


def test_the_log_says_what_is_attached_refused_and_kept(asked, caplog):
    model, inputs = asked
    caplog.set_level(logging.DEBUG, logger="vtprune")
    with vtprune.attach(model, "fastv", keep=4) as handle:
        model(**inputs)
        with pytest.raises(vtprune.VtpruneError):
            vtprune.attach(model, "tome")
    handle.remove()
    told = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "vtprune"]
    assert [level for level, _ in told] == ["INFO", "DEBUG", "INFO", "INFO"]
    attached, prefill, refused, out = (text for _, text in told)
    assert attached == "vtprune: attached fastv(keep=4) to LlavaForConditionalGeneration (family llava)"
    assert "[16, 16] -> [4, 4]" in prefill and "llm.2 fastv" in prefill and "FLOPs" in prefill
    assert refused.startswith("vtprune: refused for LlavaForConditionalGeneration: this model is attached already")
    assert out.startswith("vtprune: took out fastv(keep=4)")


def test_nothing_is_counted_for_a_log_that_nobody_reads(asked, caplog, monkeypatch):
    model, inputs = asked
    caplog.set_level(logging.INFO, logger="vtprune")
    with vtprune.attach(model, "fastv", keep=4) as handle:
        monkeypatch.setattr(handle, "report", lambda: pytest.fail("the report was made"))
        model(**inputs)
    assert all(r.levelname == "INFO" for r in caplog.records)


def test_there_is_one_tree_and_it_is_left_as_it_was(capsys):
    before = (LOG.level, list(LOG.handlers))
    with shown():
        logging.getLogger("vtprune.core.backbone").debug("vtprune: below")
    assert capsys.readouterr().err == "vtprune: below\n" and (LOG.level, LOG.handlers) == before
    LOG.debug("vtprune: nobody reads this")
    assert capsys.readouterr().err == ""


def test_a_pipeline_is_taken_as_its_model():
    model, processor = vtprune.load_demo_model()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "what color is it ?"}]
    with vtprune.attach(pipe, "uniform", keep=4) as handle:
        pipe(text=[{"role": "user", "content": parts}], max_new_tokens=2)
        assert handle.report().stages[0].tokens_out == [4]
        with pytest.raises(vtprune.VtpruneError, match="attached already"):
            vtprune.attach(model, "uniform")
    with pytest.raises(vtprune.UnsupportedError, match=r"a model is a torch\.nn\.Module"):
        vtprune.attach(type("Pipeline", (), {"model": model})(), "uniform")
