"""Releases that were not tested: they prove themselves at the first attachment, or are refused by name."""

import json

import pytest
import torch
from vtprune.models.base import ADAPTERS
from vtprune.models.engine import host, prefill

import vtprune
from vtprune.check import prove, versions


@pytest.fixture
def future(monkeypatch, tmp_path):
    """transformers says that it is a release nobody has tested; nothing has been proved yet."""
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda package: "99.1.0" if package == "transformers" else real(package))
    monkeypatch.setenv("VTPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(prove, "_proved", set())
    return tmp_path / "proofs.json"


def run(family="llava"):
    model, inputs = next(iter(ADAPTERS.get(family).tiny.values()))()
    with torch.no_grad(), vtprune.attach(model, "random", keep=3) as handle:
        model(**inputs)
        return handle.report().layer_tokens[0][-1]


def test_a_new_release_proves_itself_once(future, monkeypatch):
    assert run() == 3
    (line,) = json.loads(future.read_text())
    assert "transformers 99.1.0: llava" in line
    monkeypatch.setattr(prove, "_proved", set())
    monkeypatch.setattr(prove, "verified", lambda *given: pytest.fail("it is remembered on disk"))
    assert run() == 3
    future.write_text("[1, {")  # damaged: proved again
    monkeypatch.setattr(prove, "_proved", set())
    with pytest.raises(pytest.fail.Exception):
        run()


def test_a_release_that_computes_otherwise_is_refused_by_name(future, monkeypatch):
    real = prefill.put
    monkeypatch.setattr(prefill, "put", lambda x, rows, values: real(x, rows, 1.1 * values))
    model, _ = ADAPTERS.get("internvl").tiny["qwen3"]()
    with pytest.raises(
        vtprune.UnsupportedError, match=r"transformers 99\.1\.0 is newer than .* internvl does not come out exact"
    ):
        vtprune.attach(model, "random", keep=3)
    assert not future.exists()
    monkeypatch.setenv(prove.SKIP, "1")
    vtprune.attach(model, "random", keep=3).remove()


def test_a_renamed_cache_is_refused_not_guessed(future, monkeypatch):
    monkeypatch.setattr(host, "CACHES", ("kv_store",))
    host._cache_name.cache_clear()
    try:
        with pytest.raises(vtprune.UnsupportedError, match="kv_store|none of the"):
            run()
    finally:
        host._cache_name.cache_clear()


def test_tested_releases_prove_nothing(monkeypatch):
    monkeypatch.setattr(prove, "verified", lambda *given: pytest.fail("tested releases need no proof"))
    assert versions.find("transformers").status == "tested"
    assert run() == 3
