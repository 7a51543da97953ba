"""The arguments of each program, by which help is shown before anything takes long to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from grpo_jax.config import arguments, options

PLANNED = ("train", "sft", "dpo", "reward_model")
SPLITS = {"eval": "held-out", "train": "training"}


def _new(name: str, description: str, **more: object) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=arguments.prog(name), description=description, allow_abbrev=False, **more
    )


def generate() -> argparse.ArgumentParser:
    parser = _new("generate", "Completes a prompt.")
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID",
        help="Hugging Face folder or hub id, or a run's folder")  # fmt: skip
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what the model completes; without any "
        "and with --chat, a conversation: a line of input for each message",
    )
    asked.add_argument("--prompts", metavar="FILE", help="a prompt a line; - reads standard input")
    add("--chat", action="store_true", help="a prompt is a message of a user")
    add("--environment", action="append", default=[], metavar="MODULE:CLASS",
        help="talk to this environment, tools included")  # fmt: skip
    add("--tool", action="append", default=[], metavar="MODULE:FUNCTION",
        help="a function that the model may call; may be repeated")  # fmt: skip
    add("--history", choices=("append", "fork"), default="append",
        help="of a conversation with an environment, as environment.history")  # fmt: skip
    add("--max-tokens", type=int, default=256, metavar="N", help="of a completion; default 256")
    add(
        "--temperature", type=float, default=0.0, metavar="T", help="default 0: the likeliest token"
    )
    add("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    add("--top-k", type=int, default=0, metavar="K", help="default 0: all tokens")
    add("--num-samples", type=int, default=1, metavar="K", help="of each prompt; default 1")
    add("--seed", type=int, default=0, metavar="S", help="of the samples; default 0")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of weights and sums; default float32")  # fmt: skip
    add("--json", action="store_true", help="one JSON object per completion")
    return parser


def evaluate() -> argparse.ArgumentParser:
    parser = _new(
        "evaluate",
        "Evaluates models on the problems of a config, side by side.",
        epilog="Any option of the config can be changed by --config.NAME=VALUE.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a file as in configs/")
    parser.add_argument(
        "--model", required=True, nargs="+", action="extend", metavar="DIR_OR_ID", dest="models",
        help="Hugging Face folder or hub id, or a run's folder; several are compared",
    )  # fmt: skip
    add = parser.add_argument
    add("--split", choices=list(SPLITS), default="eval", help="held-out or training problems")
    add("--num-problems", type=int, metavar="N",
        help="at most, from the first; default evaluation.num_problems")  # fmt: skip
    add("--num-samples", type=int, metavar="K",
        help="per problem, besides the greedy one; default evaluation.num_samples")  # fmt: skip
    add("--temperature", type=float, metavar="T",
        help="of the samples; default evaluation.temperature")  # fmt: skip
    add("--top-p", type=float, metavar="P", help="default rollout.top_p")
    add("--top-k", type=int, metavar="K", help="0: all tokens; default rollout.top_k")
    add("--max-tokens", type=int, metavar="N", help="default rollout.max_tokens")
    add("--seed", type=int, metavar="S", help="of the samples, not the problems; default seed")
    add("--dtype", choices=("float32", "bfloat16"), help="default model.dtype")
    add("--out", metavar="DIR", help="every completion; default evaluations/NAME_OF_CONFIG")
    add("--json", metavar="FILE", help="all values and intervals")
    arguments.add_processes(parser)
    return parser


def score() -> argparse.ArgumentParser:
    parser = _new("score", "Tries rewards on a dataset.")
    parser.add_argument("--config", metavar="FILE", help="a file as in configs/")
    parser.add_argument(
        "--list",
        action="store_true",
        dest="lists",
        help="every reward that can be named, with its arguments, and end",
    )
    parser.add_argument("--split", choices=("train", "eval"), default="train",
                        help="training or held-out problems of the config")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--completion-column", metavar="NAME",
                        help="column scored in place of completions; default answer, or of a task "
                             "its worked solutions")  # fmt: skip
    source.add_argument("--completions", metavar="FILE",
                        help='JSON lines with a text "completion", one per problem')  # fmt: skip
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="first N rows; 0: all")
    parser.add_argument("--batch", type=int, default=1, metavar="N",
                        help="completions given to a function at once")  # fmt: skip
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="rows to show")
    parser.add_argument(
        "--human",
        metavar="NAME",
        default="",
        help="column with people's labels, good or not: agreement by kappa",
    )
    parser.add_argument(
        "--picture",
        metavar="FILE",
        default="",
        help="draw distributions and correlations here, as .png or .svg",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--out", metavar="FILE", help="write every row with its rewards here")
    return parser


def label() -> argparse.ArgumentParser:
    parser = _new(
        "label",
        "Draws completions of a dataset's prompts, compares them by rewards, and writes rows.",
        epilog="Any option of the config can be changed by --config.NAME=VALUE.",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a file as in configs/: data and rewards")
    add("--model", required=True, metavar="DIR_OR_ID",
        help="Hugging Face folder or hub id, or a run's folder, that draws")  # fmt: skip
    add("--out", required=True, metavar="FILE", help="the rows, as .jsonl or .parquet")
    add("--kind", choices=("pairs", "scores", "labels"), default="pairs",
        help="pairs of best and worst (default), every score, or labels good and not")  # fmt: skip
    add("--split", choices=list(SPLITS), default="train", help="held-out or training problems")
    add("--num-problems", type=int, default=0, metavar="N", help="first N; default 0: all")
    add("--num-samples", type=int, default=4, metavar="G", help="completions of each; default 4")
    add("--margin", type=float, default=0.0, metavar="M",
        help="rewards of a pair differ by more; default 0")  # fmt: skip
    add("--threshold", type=float, default=0.5, metavar="T",
        help="least reward of a good label; default 0.5")  # fmt: skip
    add("--batch", type=int, default=32, metavar="N",
        help="prompts of a part, which a killed program loses at most; default 32")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="default rollout.temperature")
    add("--top-p", type=float, metavar="P", help="default rollout.top_p")
    add("--top-k", type=int, metavar="K", help="0: all tokens; default rollout.top_k")
    add("--max-tokens", type=int, metavar="N", help="default rollout.max_tokens")
    add("--seed", type=int, metavar="S", help="of the completions; default seed")
    add("--dtype", choices=("float32", "bfloat16"), help="default model.dtype")
    return parser


def export() -> argparse.ArgumentParser:
    parser = _new("export", "Writes a checkpoint of a run as a Hugging Face folder.")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder of the run")
    parser.add_argument(
        "--step",
        default="newest",
        metavar="N",
        help="after which step; or best, by its evaluations; or newest (default)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where to write it; default WORKDIR/exports/step_N"
    )
    choices = options.BY_NAME["checkpoint.export_dtype"].choices
    parser.add_argument(
        "--dtype", choices=choices, help="of the weights; default: checkpoint.export_dtype"
    )
    return parser


def plan() -> argparse.ArgumentParser:
    parser = _new("plan", "Plans a run on devices that are not there.")
    parser.add_argument("--config", required=True, metavar="FILE", help="a file as in configs/")
    parser.add_argument(
        "--program", choices=PLANNED, default="train",
        help="what is planned: a step of GRPO, or an update on given completions; default train",
    )  # fmt: skip
    parser.add_argument(
        "--topology", required=True, help="such as v5e:16x16, v5p:4x4x4, h100:8, b200:1, or cpu:8"
    )
    parser.add_argument(
        "--model-shape",
        metavar="FILE",
        help="a config.json, or a folder with one, as in configs/shapes/; default: the config's",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=0, help="the longest prompt; default: its limit"
    )
    parser.add_argument(
        "--mean-tokens", type=int, default=0, help="mean of a completion; default: all at the limit"
    )
    parser.add_argument(
        "--search", nargs="?", type=int, const=6, default=0, metavar="N", help="ranks N meshes (6)"
    )
    parser.add_argument(
        "--longest", action="store_true", help="looks for the longest completion that fits"
    )
    parser.add_argument("--json", metavar="FILE", help="writes the plan there too")
    parser.usage = arguments.usage(
        f"{parser.prog} --config FILE", "--topology NAME [...]", "[--config.NAME=VALUE ...]"
    )
    return parser


def report() -> argparse.ArgumentParser:
    parser = _new(
        "report", "Draw curves.png from a run's metrics, or one picture that compares runs."
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="folder of a run")
    parser.add_argument("--workdir", action="append", default=[], help="the same")
    parser.add_argument(
        "--out", default="comparison.png", metavar="FILE",
        help="where several runs are drawn to, as .png and .svg; default comparison.png",
    )  # fmt: skip
    parser.add_argument(
        "--html",
        action="store_true",
        help="one run as a page, DIR/report.html: curves, options, completions by step, and what "
        "evaluations changed",
    )
    parser.add_argument("--dark", action="store_true", help="for a dark page; of one run, "
                        "curves_dark.png and .svg")  # fmt: skip
    return parser


def profile() -> argparse.ArgumentParser:
    parser = _new("profile", "The longest operations of a traced run.")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--top", type=int, default=10, help="operations of each phase")
    return parser


BY_PROGRAM: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "train": lambda: arguments.run_parser("train"),
    "sft": lambda: arguments.run_parser("sft"),
    "dpo": lambda: arguments.run_parser("dpo"),
    "reward_model": lambda: arguments.run_parser("reward_model"),
    "generate": generate,
    "evaluate": evaluate,
    "score": score,
    "label": label,
    "export": export,
    "plan": plan,
    "report": report,
    "profile": profile,
}


def help_early(name: str, argv: list[str]) -> None:
    """Ends the program where it is asked for help, before it imports what takes seconds.

    Where it is asked for the options of a config, those; ValueError where that is none.
    """
    if name in arguments.RUNS:
        arguments.answer(argv, name)
    elif {"-h", "--help"} & {*argv}:
        BY_PROGRAM[name]().print_help()
        sys.exit()
