"""The troubleshooting page has an entry for every message with which the library refuses something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import refusals
from refusals import Refusal

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def test_every_refusal_has_an_entry():
    rooms, homeless = refusals.sorted_into(PAGE)
    assert [f"{r.file}:{r.line}: {r.text}" for r in homeless] == []
    assert sum(map(len, rooms.values())) == len(refusals.collect()) > 700


def test_every_topic_and_every_pattern_takes_a_message():
    known = refusals.topics(PAGE)
    taken = [refusals.taken_by(r, known) for r in refusals.collect()]
    used = {(topic.heading, pattern.written) for pair in taken if pair for topic, pattern in [pair]}
    assert [(t.heading, p.written) for t in known for p in t.patterns if (t.heading, p.written) not in used] == []


def test_every_topic_says_what_to_do():
    for section in PAGE.split("\n## ")[1:]:
        advice = section.partition("\n")[2].split(refusals.OPEN)[0]
        assert len(advice.split()) > 15, section[:60]


def test_messages_are_found_by_reading_the_source():
    """What has no f-string, what is a constant of another module, and both ends of a choice."""
    texts = {r.text for r in refusals.collect()}
    assert "the prompt has to be read at once; generate without prefill_chunk_size" in texts
    assert "unknown … …; …" in texts
    assert any(t.startswith("this tower's blocks call their attention as no module") for t in texts)  # a constant
    raised = 0
    for folder in refusals.FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            raised += len(re.findall(r"raise (?:VtpruneError|UnsupportedError)\(", path.read_text(encoding="utf-8")))
    assert len(texts) > 0.85 * raised  # the same words stand in several places


def test_a_refusal_without_an_entry_fails_the_build(monkeypatch):
    new = Refusal("zzz, of which nobody has heard", "vtprune/core/handle.py", 1)
    monkeypatch.setattr(refusals, "collect", lambda: (new,))
    with pytest.raises(ValueError, match="no entry for 'zzz"):
        refusals.page(PAGE)


def test_the_page_lists_them():
    page = refusals.page(PAGE)
    assert refusals.OPEN not in page
    for r in refusals.collect():
        assert r.text in page
