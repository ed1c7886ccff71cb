"""The examples of docs/documents.md hold."""

import re
from pathlib import Path

import pytest

from galvatron_jax.errors import DocumentError
from galvatron_jax.spec import Plan
from galvatron_jax.spec.plan_checks import check_plan
from galvatron_jax.spec.strategy import SequenceParallel
from tests.spec import samples

PAGE = (Path(__file__).parents[2] / "docs" / "documents.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(EXAMPLE)
    return path


def test_the_plan_written_by_hand_fits_its_model(path):
    plan = Plan.load(path)
    check_plan(plan, samples.model_spec(6, name="gpt2"), 8)
    assert plan.strategies[0].dp == ("a", "b", "c")
    assert plan.strategies[1].sp_kind is SequenceParallel.MEGATRON


def test_its_faults_read_as_the_page_says(path, monkeypatch):
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    text = (
        path.read_text().replace('remat = "full"', 'remat = "ful"').replace("global_batch = 64", 'globalbatch = "64"')
    )
    path.write_text(text)
    monkeypatch.chdir(path.parent)
    with pytest.raises(DocumentError) as caught:
        Plan.load("plan.toml")
    assert str(caught.value) == shown.strip()
