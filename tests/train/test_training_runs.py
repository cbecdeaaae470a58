"""Every training, broken off and gone on with, and in two processes."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from trained import (
    OWN,
    PARTS,
    SHARED,
    Killed,
    fresh,
    made,
    run_two,
    suited,
    trained,
)

import vtprune
from vtprune.core.types import VtpruneError
from vtprune.train import questions


@pytest.fixture(scope="module")
def case():
    return made()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", OWN)
def test_a_run_that_was_broken_off_goes_on(case, tmp_path, method):
    """To the same weights, bit by bit; not with other options, and not over what another run has left."""
    case = suited(case, method)
    how = {"steps": 6, "batch": 3, "save_every": 2, "seed": 5}
    want, told = trained(case, tmp_path / "whole", method, **how)

    def kill(line: str) -> None:
        if line.startswith("step 5 "):
            raise Killed

    flags = [p.requires_grad for p in case[0].parameters()]
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    with pytest.raises(Killed):
        trained(case, tmp_path / "broken", method, **how, say=kill)
    assert numbers == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    assert [p.requires_grad for p in case[0].parameters()] == flags
    got, facts = trained(case, tmp_path / "broken", method, **how, resume=True)
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in got.state_dict().items())
    assert facts["loss"] == told["loss"] and len(facts["loss"]) == 6
    with pytest.raises(VtpruneError, match="of another run: lr was another"):
        trained(case, tmp_path / "broken", method, **how, resume=True, lr=1e-3)
    model, data = case
    others = [dataclasses.replace(r, answer=[19, 2]) for r in data.rows]
    with pytest.raises(VtpruneError, match="of another run: data was another"):
        trained(
            (model, questions.Questions(data.images, data.projected, others)),
            tmp_path / "broken",
            method,
            **how,
            resume=True,
        )
    with pytest.raises(VtpruneError, match="of another run: dtype was another"):
        trained(case, tmp_path / "broken", method, **how, resume=True, dtype=torch.bfloat16)
    (tmp_path / "broken" / "checkpoint-8").mkdir()  # torn while it was written
    again, _ = trained(case, tmp_path / "broken", method, **how, resume=True)
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(VtpruneError, match="holds checkpoints already"):
        trained(case, tmp_path / "broken", method, **how)
    with pytest.raises(VtpruneError, match="no checkpoint to go on from"):
        trained(case, tmp_path / "none", method, **how, resume=True)


SCRIPT = """
part, facts = trained(suited(made(), sys.argv[2]), Path(sys.argv[1]), sys.argv[2], **SHARED[sys.argv[2]])
if torch.distributed.get_rank() == 0:
    torch.save((part.state_dict(), facts), sys.argv[1] + "/out.pt")
torch.distributed.destroy_process_group()
"""


def test_gates_of_the_shared_batches_decide_otherwise(case):
    """Else a price on each process's own share would be as good as one on all."""
    model, data = case
    with vtprune.attach(model, "mindskip", **PARTS["mindskip"], init="random") as handle:
        handle.modules["mindskip"].requires_grad_()
        model(**data.batch(data.rows, torch.device("cpu")), use_cache=False)
        ran = torch.stack(list(handle.gates().values())).detach()
    assert len(set(ran.mean(0).tolist())) > 1 and float(ran.mean()) > 0.2


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", OWN)
def test_two_processes_are_as_one(tmp_path, method):
    """Each reads half of every batch, with answers of other lengths, and gates that decide otherwise."""
    case = suited(made(), method)
    want, told = trained(case, tmp_path / "one", method, **SHARED[method])
    got, facts = torch.load(run_two(tmp_path, SCRIPT, method))
    assert facts["processes"] == 2 and told["processes"] == 1
    assert facts["loss"] == pytest.approx(told["loss"], rel=1e-4)
    start = fresh(case, method)
    for name, p in want.state_dict().items():  # where a gradient is next to nothing, AdamW makes a step of its rounding
        assert float((got[name] - p).abs().mean()) <= 1e-3 * float((p - start[name]).abs().mean()), name
