"""What the decoder reads of packed rows, by hand, and the way to the lanes and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.lanes import Lanes, PackedInputs

# Two prompts of three tokens at most, and two completions of each, of 3, 2, 1 and 3 tokens.
PROMPT_PQ = np.array([[5, 6, 0], [7, 8, 9]], np.int32)
LENGTH_P = np.array([2, 3], np.int32)
COMPLETION_PGC = np.array([[[10, 11, 12], [13, 14, 0]], [[15, 0, 0], [16, 17, 18]]], np.int32)
# All in one row: entries predict tokens 1 and 2 of the first completion, 1 of the second, none of
# the third, 1 and 2 of the fourth; the sixth is empty. A lane for each prompt, four places wide.
LAYOUT = (
    np.array([[1, 2, 3 + 1, 9 + 1, 9 + 2, -1]], np.int32),
    np.array([[[0, 1, 2, -1]], [[3, 4, -1, -1]]], np.int32),
)


def test_a_packed_row_by_hand():
    inputs = PackedInputs.of(PROMPT_PQ, LENGTH_P, COMPLETION_PGC, LAYOUT)

    # An entry reads the token before the one that it predicts, at its place after the prompt.
    ids = [5, 6, 0, 7, 8, 9, 10, 11, 13, 16, 17]
    np.testing.assert_array_equal(inputs.ids_BT[:, :-1], [ids])
    positions = [0, 1, 2, 0, 1, 2, 2 + 0, 2 + 1, 2 + 0, 3 + 0, 3 + 1]
    np.testing.assert_array_equal(inputs.position_BT[:, :-1], [positions])
    np.testing.assert_array_equal(inputs.segment_PWT, [[[1, 1, 2, 0]], [[4, 4, 0, 0]]])
    np.testing.assert_array_equal(inputs.position_PWT, [[[0, 1, 0, 0]], [[0, 1, 0, 0]]])
    assert inputs.num_entries == 6


def test_which_states_predict_the_tokens_of_a_packed_row():
    inputs = PackedInputs.of(PROMPT_PQ, LENGTH_P, COMPLETION_PGC, LAYOUT)
    x_BTD = jnp.arange(12.0).reshape(1, 12, 1)

    predictors = inputs.predictors(x_BTD)

    # The last token of each prompt, twice, since it has two completions; then the entries.
    np.testing.assert_array_equal(predictors[0, :, 0], [1, 1, 5, 5, 6, 7, 8, 9, 10, 11])
    np.testing.assert_array_equal(inputs.prompts(x_BTD)[..., 0], [[0, 1, 2], [3, 4, 5]])
    again = inputs.rows(inputs.prompts(x_BTD), inputs.entries(x_BTD))
    np.testing.assert_array_equal(again, x_BTD)


def test_the_identity_layout_by_hand():
    """A row for each prompt and a lane for each completion, padding included."""
    inputs = PackedInputs.of(PROMPT_PQ, LENGTH_P, COMPLETION_PGC)

    np.testing.assert_array_equal(
        inputs.ids_BT, [[5, 6, 0, 10, 11, 13, 14], [7, 8, 9, 15, 0, 16, 17]]
    )
    np.testing.assert_array_equal(
        inputs.position_BT, [[0, 1, 2, 2, 3, 2, 3], [0, 1, 2, 3, 4, 3, 4]]
    )
    np.testing.assert_array_equal(inputs.segment_PWT, [[[1, 1], [2, 2]]] * 2)
    np.testing.assert_array_equal(inputs.position_PWT, [[[0, 1], [0, 1]]] * 2)
    states = inputs.predictors(jnp.arange(14.0).reshape(2, 7, 1))
    np.testing.assert_array_equal(
        inputs.by_completion(states)[..., 0],
        [[[1, 3, 4], [1, 5, 6]], [[9, 10, 11], [9, 12, 13]]],
    )


def test_completions_of_one_token_have_no_entries():
    inputs = PackedInputs.of(PROMPT_PQ, LENGTH_P, COMPLETION_PGC[..., :1])

    assert inputs.num_entries == 0
    np.testing.assert_array_equal(inputs.ids_BT, PROMPT_PQ)
    states = inputs.predictors(jnp.arange(6.0).reshape(2, 3, 1))
    np.testing.assert_array_equal(inputs.by_completion(states)[..., 0], [[[1], [1]], [[5], [5]]])


def test_states_go_to_the_lanes_and_back_and_so_do_their_gradients():
    lanes = Lanes.of(LAYOUT[1], 1, 6)
    x_BXD = jnp.arange(1.0, 7.0).reshape(1, 6, 1)

    spread, back = jax.vjp(lanes.spread, x_BXD)

    np.testing.assert_array_equal(spread[..., 0], [[[1, 2, 3, 0]], [[4, 5, 0, 0]]])
    np.testing.assert_array_equal(lanes.gather(spread)[0, :, 0], [1, 2, 3, 4, 5, 0])
    (by_x,) = back(jnp.full_like(spread, 2.0))
    np.testing.assert_array_equal(by_x[0, :, 0], [2, 2, 2, 2, 2, 0])


def test_what_a_token_sees_of_a_row_without_lanes_by_hand():
    """Six places of prompts, then entries 6 to 11 of completions that begin at 6, 8, 9 and 9."""
    layout = LAYOUT[0], np.zeros((2, 0, 4), np.int32)
    inputs = PackedInputs.of(PROMPT_PQ, LENGTH_P, COMPLETION_PGC, layout)
    assert inputs.lanes is None

    seen = inputs.seen(None)
    np.testing.assert_array_equal(seen.begin_BT, [[0, 0, 0, 3, 3, 3, 6, 6, 8, 9, 9, 11]])
    np.testing.assert_array_equal(seen.prompt_begin_BT[0, 6:11], [0, 0, 0, 3, 3])
    np.testing.assert_array_equal(seen.prompt_end_BT, [[0] * 6 + [2, 2, 2, 6, 6, 0]])

    # Of two keys: itself and the one before, which of a completion's first token is the prompt's
    # last.
    seen = inputs.seen(2)
    np.testing.assert_array_equal(seen.begin_BT[0, :11], [0, 0, 1, 3, 3, 4, 6, 6, 8, 9, 9])
    np.testing.assert_array_equal(seen.prompt_begin_BT[0, 6:11], [1, 2, 1, 5, 6])
