"""The metrics of a run: names, units and meanings."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Metric(NamedTuple):
    unit: str  # "": a plain number
    meaning: str


# NAME stands for the name of a reward, K for a number of samples per problem.
METRICS: dict[str, Metric] = {
    "reward": Metric("", "mean over completions of the weighted sum of the rewards"),
    "reward_std": Metric(
        "", "standard deviation of the weighted sum over all completions of the step"
    ),
    "reward/NAME": Metric("", "mean of one reward over the completions that have it"),
    "rewards/failed/NAME": Metric(
        "completions",
        "completions for which one reward failed in the step; rewards.on_failure says what that "
        "counts as",
    ),
    "rewards/failed_by_timeout": Metric("completions", "rewards that took too long"),
    "rewards/failed_by_error": Metric("completions", "rewards that raised"),
    "rewards/failed_by_values": Metric("completions", "rewards that returned no fitting numbers"),
    "rewards/failed_by_memory": Metric("completions", "rewards that asked for too much memory"),
    "rewards/failed_by_died": Metric("completions", "rewards whose process ended"),
    "rewards/failed_by_invalid": Metric(
        "completions", "completions whose episode could not be judged at all"
    ),
    "rewards/unknown_share": Metric(
        "share",
        "completions without a reward since one failed; they leave their groups and the loss",
    ),
    "rewards/unscored": Metric(
        "completions",
        "completions to which every reward function gave None; they have no advantage",
    ),
    "rewards/failed_by_member": Metric(
        "completions", "ensembles without a value since one of their members failed"
    ),
    "ensemble/correlation/NAME/NAME": Metric(
        "", "correlation of two members of ensembles over the step's completions"
    ),
    "ensemble/length_correlation/NAME": Metric(
        "", "correlation of a member of an ensemble with the length of the completions"
    ),
    "ensemble/low_share/NAME": Metric(
        "share", "completions at the least value that a member of an ensemble gave in the step"
    ),
    "ensemble/high_share/NAME": Metric(
        "share", "completions at the largest value that a member of an ensemble gave in the step"
    ),
    "reward_log/NAME": Metric(
        "", "value that a reward function logged by log_metric, mean over calls"
    ),
    "reward/NAME_std": Metric(
        "", "standard deviation of one reward over the completions that have it"
    ),
    "judge/calls": Metric("calls", "calls of LLM judges in the step, repeated ones included"),
    "judge/cached_share": Metric(
        "share", "judgements that needed no call: the run had them already, or two texts are equal"
    ),
    "judge/retries": Metric("calls", "calls among them that repeated a failed one"),
    "judge/seconds": Metric("s", "mean time of a call, without waiting for its turn"),
    "judge/prompt_tokens": Metric("tokens", "tokens that judges read in the step"),
    "judge/completion_tokens": Metric("tokens", "tokens that judges wrote in the step"),
    "judge/flip_share/NAME": Metric(
        "share",
        "pairs for which a judge preferred the other answer once their order was changed; ties",
    ),
    "judge/length_correlation/NAME": Metric(
        "", "correlation of a judge's numbers with the completions' lengths in tokens"
    ),
    **{
        f"judge/failed_by_{kind}": Metric("judgements", f"judgements that {what}")
        for kind, what in {
            "timeout": "took too long",
            "connection": "lost their connection, or got none",
            "status": "the server refused",
            "redirect": "were redirected, which is not followed",
            "size": "got too long a response",
            "garbage": "got a response that cannot be read",
            "verdict": "got no verdict, or one that cannot be read",
            "budget": "were beyond the run's budget",
        }.items()
    },
    "accuracy": Metric(
        "share",
        "completions with a 1 from the reward rewards.accuracy, among those to which it applies",
    ),
    "groups/equal_share": Metric(
        "share",
        "groups of the updates whose rewards are all equal, which give no policy gradient where "
        "algorithm.baseline compares them",
    ),
    "groups/draws": Metric("draws", "draws of prompts in the step, until its batch was full"),
    "groups/drawn": Metric("groups", "groups sampled in the step, learned from or not"),
    "groups/dropped": Metric("groups", "groups among them without a policy gradient"),
    "groups/given_up": Metric(
        "groups", "groups that prompts.oversample has begun, and that were not finished in time"
    ),
    "tokens/given_up_share": Metric("share", "sampled tokens of the step that are of such groups"),
    "prompts/unseen_share": Metric("share", "training problems that were never asked"),
    "prompts/easy_share": Metric(
        "share", "training problems whose pass rate is above prompts.high_rate"
    ),
    "prompts/hard_share": Metric(
        "share", "training problems whose pass rate is below prompts.low_rate"
    ),
    "prompts/replayed_share": Metric(
        "share", "prompts of the step whose pass rate was above prompts.high_rate before"
    ),
    "completion/length": Metric("tokens", "mean length, stop token included"),
    "completion/length_min": Metric("tokens", "shortest completion"),
    "completion/length_max": Metric("tokens", "longest completion"),
    "completion/stopped_length": Metric(
        "tokens", "mean length of completions that ended with a stop token"
    ),
    "completion/truncated_share": Metric("share", "completions cut at the token limit"),
    "environment/turns": Metric("turns", "turns of the policy in an episode, mean"),
    "environment/calls": Metric("calls", "calls of tools in an episode, mean"),
    "environment/valid_calls": Metric("share", "calls that were carried out without a failure"),
    "environment/observation_tokens": Metric(
        "tokens", "tokens of the environment in an episode, mean"
    ),
    "environment/seconds_p50": Metric("s", "time of an episode in its environment, median"),
    "environment/seconds_p95": Metric("s", "the same, exceeded by a twentieth of the episodes"),
    "environment/seconds_max": Metric("s", "the same, longest"),
    "environment/idle_s": Metric("s", "time in which the devices waited for environments"),
    "environment/read_again": Metric(
        "", "tokens of prefixes that were computed again for later turns, for each token drawn"
    ),
    "environment/forks": Metric(
        "parts", "parts of an episode after its first, which a rewritten history makes, mean"
    ),
    "environment/rewritten_tokens": Metric(
        "tokens", "tokens in which these parts repeat the conversation, of an episode, mean"
    ),
    "environment/processes": Metric("processes", "live processes of environments"),
    "environment/restarts": Metric("processes", "those that were lost and replaced, in the run"),
    "environment/ended/NAME": Metric(
        "share", "episodes that ended in this way (docs/environments.md)"
    ),
    "environment/failed_calls/NAME": Metric("calls", "calls that failed in this way"),
    "policy/loss": Metric(
        "",
        "the negated objective; it does not measure progress, since advantages of a group sum to 0",
    ),
    "policy/entropy": Metric("nats/token", "mean entropy of the policy at the tokens it chose"),
    "policy/kl": Metric("nats/token", "mean divergence from the reference (k3)"),
    "policy/kl_coef": Metric("", "weight of the KL in the step's updates, if it is adaptive"),
    "policy/entropy_coef": Metric(
        "",
        "weight of the entropy bonus in the step's updates, if it is adaptive; 0 after a step "
        "whose entropy was above algorithm.entropy_target",
    ),
    "policy/clip_low_share": Metric("share", "tokens whose ratio was clipped from below"),
    "policy/clip_high_share": Metric("share", "tokens whose ratio was clipped from above"),
    "policy/ratio_max": Metric("", "largest ratio of policy to old policy at a token"),
    "policy/grad_norm": Metric("", "global norm of the gradient, before clipping"),
    "policy/learning_rate": Metric("", "learning rate of the last update that was made"),
    "policy/drift_mean": Metric(
        "nats",
        "mean absolute change of log-probabilities by earlier updates on the same rollout",
    ),
    "policy/drift_max": Metric(
        "nats", "largest change of a log-probability by earlier updates on the same rollout"
    ),
    "policy/sampler_gap_mean": Metric(
        "nats",
        "mean absolute difference of log-probabilities between the sampler and the scorer, for "
        "the policy before the step's updates",
    ),
    "policy/sampler_gap_max": Metric(
        "nats", "largest difference of a log-probability between the sampler and the scorer"
    ),
    "policy/importance_mean": Metric(
        "", "mean weight that corrects for the sampler's distribution; 1 without a correction"
    ),
    "policy/importance_capped_share": Metric(
        "share",
        "tokens whose ratio of policy to sampler was above rollout_correction.cap, "
        "or below rollout_correction.floor",
    ),
    "policy/off_policy_share": Metric(
        "share", "tokens of completions that algorithm.max_sequence_drift leaves out"
    ),
    "hybrid/loss": Metric("", "policy loss and nll as hybrid.method sums them: what is minimized"),
    "hybrid/nll": Metric(
        "nats/token", "mean negative log-likelihood of the tokens that hybrid.method imitates"
    ),
    "hybrid/nll_tokens": Metric("tokens", "tokens that are imitated in an update"),
    "hybrid/mix": Metric("share", "share of the nll in the loss of the step's updates (CHORD)"),
    "hybrid/given_reward": Metric(
        "", "mean reward of the step's demonstrations, which no other metric of rewards counts"
    ),
    "hybrid/hint_tokens": Metric("tokens", "mean length of the step's hints (UFT)"),
    "distill/total": Metric(
        "", "policy loss plus distill.coef times the divergence: what is minimized"
    ),
    "distill/loss": Metric(
        "nats/token", "mean divergence from the teacher, as distill.beta says, over all tokens"
    ),
    "distill/kl": Metric(
        "nats/token",
        'mean KL(policy || teacher): over the vocabulary, or with distill.loss "reward" by the '
        "tokens that were drawn",
    ),
    "policy/skipped_updates": Metric(
        "updates", "updates skipped so far, because not finite or by a guard"
    ),
    "guards/roll_backs": Metric("", "number of times that a guard went back to a checkpoint"),
    "time/rollout_s": Metric("s", "sampling the completions"),
    "time/reward_s": Metric("s", "waiting for rewards after the last completion"),
    "time/update_s": Metric("s", "updating the policy"),
    "time/evaluation_s": Metric("s", "evaluating on held-out problems"),
    "time/checkpoint_s": Metric("s", "writing a checkpoint"),
    "time/step_s": Metric("s", "the whole step, with the evaluation after it"),
    "memory/device_gib": Metric(
        "GiB", "memory in use on the fullest device after the step's updates"
    ),
    "memory/device_peak_gib": Metric("GiB", "most memory in use on it since the program's start"),
    "memory/process_gib": Metric("GiB", "main memory of the process (resident)"),
    "time/compile_s": Metric("s", "compiling programs in the step, or reading them from the cache"),
    "programs": Metric("", "compiled programs since the program's start"),
    "throughput/generated_tokens_per_s": Metric(
        "tokens/s", "tokens sampled, over the rollout's time"
    ),
    "throughput/step_tokens_per_s": Metric(
        "tokens/s", "tokens sampled, over the whole step's time"
    ),
    "throughput/learned_tokens_per_s": Metric(
        "tokens/s",
        "prompts and completions trained on, over the time from the last completion to the last "
        "update",
    ),
    "throughput/mfu": Metric(
        "share", "model FLOPs of the step, as a share of the devices' published peak (bfloat16)"
    ),
    "roofline/rollout_share": Metric(
        "share", "least possible time of sampling on these devices, over its actual time"
    ),
    "roofline/learning_share": Metric(
        "share",
        "least possible time of reference and updates, over the time after the last completion",
    ),
    "roofline/step_share": Metric(
        "share", "least possible time of sampling, reference and updates, over the step's time"
    ),
    "tokens/generated": Metric("tokens", "tokens sampled since the run's start"),
    "eval/accuracy": Metric("share", "accuracy of one greedy completion of each held-out problem"),
    "eval/reward": Metric("", "mean over greedy completions of the weighted sum of the rewards"),
    "eval/reward/NAME": Metric("", "mean over greedy completions of one reward"),
    "eval/answer_found_share": Metric("share", "greedy completions in which an answer was found"),
    "eval/truncated_share": Metric("share", "greedy completions cut at the token limit"),
    "eval/length": Metric("tokens", "mean length of greedy completions"),
    "eval/failed_rewards": Metric(
        "completions",
        "rewards that failed: wrong for accuracy; for eval/reward as rewards.on_failure says",
    ),
    "eval/pass@K": Metric("share", "held-out problems that at least one of K samples solves"),
    "eval/pass^K": Metric("share", "held-out problems that each of K samples solves: reliability"),
    "eval/maj@K": Metric("share", "held-out problems that the commonest answer of K solves"),
    "eval/mean@K": Metric("share", "mean accuracy of K samples per held-out problem"),
    "sft/loss": Metric(
        "nats/token",
        'mean cross-entropy of the completions, weighted by probability if sft.loss is "dft"',
    ),
    "sft/nll": Metric("nats/token", "mean cross-entropy of the completions, where sft/loss is not"),
    "sft/entropy": Metric(
        "nats/token",
        "mean entropy of the policy at the tokens trained on, with logging.token_metrics",
    ),
    "sft/token_accuracy": Metric(
        "share", "tokens trained on that are the policy's likeliest, with logging.token_metrics"
    ),
    "sft/eval_loss": Metric("nats/token", "mean cross-entropy of the held-out rows' completions"),
    "sft/tokens_per_s": Metric("tokens/s", "tokens trained on, without prompts and padding"),
    "value/loss": Metric("", "the critic's loss: half of the larger of two squares, weighted"),
    "value/explained_variance": Metric(
        "share",
        "share of the variance of the returns that the critic's values explain, at most 1; 0 for "
        "a constant value",
    ),
    "value/clip_share": Metric("share", "tokens at which critic.clip made the loss larger"),
    "value/mean": Metric("", "mean of the critic's values"),
    "value/return_mean": Metric("", "mean of the returns that the critic learns"),
    "value/grad_norm": Metric("", "global norm of the critic's gradient, before clipping"),
    "reward_model/loss": Metric(
        "nats", "mean loss of the pairs: -log of the probability of the preference, and centring"
    ),
    "reward_model/accuracy": Metric("share", "pairs whose chosen text has the higher reward"),
    "reward_model/margin": Metric("", "mean reward of the chosen minus that of the rejected"),
    "reward_model/mean": Metric("", "mean reward of all texts of the pairs"),
    "reward_model/std": Metric("", "standard deviation of these rewards"),
    "reward_model/tokens_per_s": Metric(
        "tokens/s", "tokens of pairs after what both begin with, over a step's time"
    ),
    **{
        f"reward_model/eval_{name}": Metric(unit, f"reward_model/{name} of the held-out pairs")
        for name, unit in (
            ("loss", "nats"),
            ("accuracy", "share"),
            ("margin", ""),
            ("mean", ""),
            ("std", ""),
        )
    },
    "reward_model/eval_calibration_error": Metric(
        "share",
        "mean distance between the probability that the model gives to held-out preferences and "
        "the share that holds, over ten bins",
    ),
    "preference/loss": Metric(
        "", "mean loss of the pairs, or labelled completions, of the update: preference.loss"
    ),
    "preference/reward_chosen": Metric(
        "", "mean implicit reward of chosen or desirable completions, beta times their log-ratio"
    ),
    "preference/reward_rejected": Metric("", "the same of rejected or undesirable ones"),
    "preference/reward_margin": Metric("", "the first minus the second"),
    "preference/reward_accuracy": Metric(
        "share",
        "pairs whose chosen completion has the larger implicit reward; of labelled completions, "
        "those whose log-ratio is on the side of preference/kl that their label says",
    ),
    "preference/logp_chosen": Metric(
        "nats", "mean log-probability of chosen or desirable completions, summed over their tokens"
    ),
    "preference/logp_rejected": Metric("nats", "the same of rejected or undesirable ones"),
    "preference/nll": Metric("nats/token", "mean cross-entropy of chosen or desirable completions"),
    "preference/log_odds_ratio": Metric(
        "nats", 'mean log-odds of the chosen minus that of the rejected completions, of "orpo"'
    ),
    "preference/kl": Metric(
        "nats",
        'divergence from the reference by mismatched completions, at least 0, of "kto"',
    ),
    "preference/entropy": Metric(
        "nats/token", "mean entropy of the policy at completions, with logging.token_metrics"
    ),
    "preference/tokens_per_s": Metric("tokens/s", "tokens of completions, over a step's time"),
    "preference/eval_loss": Metric("", "preference/loss of the held-out rows"),
    **{
        f"preference/eval_{name}": Metric(unit, f"preference/{name} of the held-out rows")
        for name, unit in {
            "reward_chosen": "",
            "reward_rejected": "",
            "reward_margin": "",
            "reward_accuracy": "share",
            "logp_chosen": "nats",
            "logp_rejected": "nats",
            "nll": "nats/token",
            "log_odds_ratio": "nats",
            "kl": "nats",
        }.items()
    },
}


def _pattern(name: str) -> str:
    pattern = re.escape(name).replace("NAME", r"[\w.:\-]+")
    return pattern.replace("@K", "@[0-9]+").replace(r"\^K", r"\^[0-9]+")


_KNOWN = re.compile("|".join(_pattern(name) for name in METRICS))


def is_known(name: str) -> bool:
    """Whether METRICS describes a metric of this name."""
    return _KNOWN.fullmatch(name) is not None


@functools.cache
def describe(name: str) -> str:
    """Meaning and unit of a metric, in one line; "" if METRICS does not describe it."""
    known = [n for n in METRICS if re.fullmatch(_pattern(n), name)]
    if not known:
        return ""
    metric = METRICS[max(known, key=len)]  # reward/NAME_std before reward/NAME
    return metric.meaning + (f" [{metric.unit}]" if metric.unit else "")
