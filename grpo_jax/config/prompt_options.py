"""The options that say which prompts are trained on, a part of `options.TABLE`."""

from __future__ import annotations

from grpo_jax.config.schema import ANY, COUNT, FRACTION, Range, choice, flag, number, several

# fmt: off
FEW_PROBLEMS = (
    several("data.subset", (), "numbers from 0, and ranges \"FIRST:STOP\" that end before STOP",
            "Problems of GRPO among the training problems, such as (0,) or (\"0:100\", 250); "
            "supervised training has all", special={(): "all"}),
    number("data.repeat", 1, COUNT, "times",
           "How often an epoch asks each training problem, so that few problems fill a step"),
)
PROMPTS = (
    flag("prompts.drop_equal_groups", False,
         "Drop groups whose rewards are all equal, which have no gradient, and draw further "
         "prompts until batch.prompts other groups are there (DAPO's dynamic sampling)"),
    number("prompts.per_draw", 0, COUNT, "prompts",
           "Prompts that are drawn at once; above batch.prompts a first draw may suffice, below "
           "it fewer completions are sampled in vain. Goes with prompts.drop_equal_groups",
           special={0: "batch.prompts"}),
    number("prompts.max_draws", 10, COUNT, "draws", "Draws in a step, at most", free=True),
    choice("prompts.if_short", "stop", {
               "stop": "end the run",
               "fill": "fill the batch with groups of equal rewards, which have no gradient"},
           "What is done when prompts.max_draws draws have too few groups with a gradient",
           free=True),
    number("prompts.oversample", 1.0, Range(at_least=1, at_most=8), "times",
           "A draw begins so many times the prompts that it needs, and ends once enough of their "
           "groups are finished, so that the longest completions do not hold the step; the others "
           "are given up. It favours short completions",
           special={1: "all completions are finished"}, why="1.25 is a good value"),
    number("prompts.outside_weight", 1.0, Range(above=0, at_most=1), "",
           "Weight of a problem outside of the band from prompts.low_rate to prompts.high_rate, "
           "where one inside of it, or never asked, has 1",
           special={1: "every epoch asks each problem equally often"},
           why="with 0 one group would exclude a problem for ever. 0.1 is a good value"),
    number("prompts.replay_share", 0.0, FRACTION, "",
           "Share of a draw that comes from solved problems: those above prompts.high_rate",
           special={0: "no such share"}),
    number("prompts.low_rate", 0.2, ANY, "",
           "Lower end of the band of pass rates: means of a problem's accuracy, or of its reward "
           "if no reward measures accuracy"),
    number("prompts.high_rate", 0.8, ANY, "", "Upper end of the band; see prompts.low_rate"),
    number("prompts.newest_share", 0.5, Range(above=0, at_most=1), "",
           "Share of a problem's newest group in its pass rate; the earlier ones have the rest"),
)
