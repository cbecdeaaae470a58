import pytest

from vtprune import testing

CASES = testing.contract("loudest", families=("llava", "qwen2-vl")) + testing.contract("loudest-then-fastv", ["llava"])


@pytest.mark.parametrize("case", CASES)
def test_contract(case):
    testing.check(case)
