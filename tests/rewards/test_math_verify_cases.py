"""Math-Verify's own test cases: nothing is paid that it refuses.

They are read from a checkout of https://github.com/huggingface/Math-Verify that
GRPO_JAX_MATH_VERIFY names; the project holds none of them.
"""

import ast
import os
from pathlib import Path

import pytest

from grpo_jax.rewards.answers import extract_answer
from grpo_jax.rewards.math_answer import math_answer

FOLDER = os.environ.get("GRPO_JAX_MATH_VERIFY", "")


def cases(folder):
    """Gold, prediction and verdict of each case that is written out, with the file it stands in."""
    for file in sorted(Path(folder).glob("tests/test_*.py")):
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        for call in calls:
            if not ast.unparse(call.func).endswith("parametrize"):
                continue
            try:
                names, rows = map(ast.literal_eval, call.args)
            except ValueError:  # computed
                continue
            names = [name.strip() for name in names.split(",")]
            if names[:2] != ["gold", "pred"]:
                continue
            for row in rows:
                values = dict(zip(names, row))
                if values.get("allow_set_relation_comp", True):
                    expected = values.get("expected", values.get("result"))
                    yield file.name, values["gold"], values["pred"], bool(expected)


def verdict(gold, prediction):
    """Whether the prediction is paid; one that states no answer is put into a box."""
    if extract_answer(prediction) is None:
        prediction = f"\\boxed{{{prediction.strip().strip('$')}}}"
    try:
        return math_answer([""], [prediction], [gold]) == [1.0]
    except ValueError:  # a gold text that states no answer
        return False


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="needs GRPO_JAX_MATH_VERIFY, a checkout of Math-Verify")
def test_nothing_is_paid_that_math_verify_refuses():
    rows = list(cases(FOLDER))
    assert len(rows) > 200 and {expected for *_, expected in rows} == {False, True}
    paid = [row for row in rows if verdict(*row[1:3])]
    assert [row for row in paid if not row[3]] == []
    assert len(paid) > 0.5 * sum(expected for *_, expected in rows)
