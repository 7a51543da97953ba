"""The options of LLM judges: section `judge`, a part of `options.TABLE`. docs/judges.md."""

from __future__ import annotations

from grpo_jax.config.schema import COUNT, NOT_NEGATIVE, POSITIVE, number, text

# fmt: off
JUDGE = (
    text("judge.base_url", "$JUDGE_BASE_URL", "address",
         "OpenAI-compatible server of the judges, up to /v1; after $ stands the name of an "
         "environment variable. A rubric may name another", free=True),
    text("judge.model", "$JUDGE_MODEL", "model, or $VARIABLE",
         "Model that judges; a rubric may name another"),
    text("judge.key_env", "JUDGE_API_KEY", "environment variable",
         "Variable with the server's key; no key is sent if it is not set. A key itself stands in "
         "no option and in no file", special={"": "no key"}, free=True),
    number("judge.concurrency", 32, COUNT, "calls", "Calls at once, of each host", free=True),
    number("judge.timeout_s", 60.0, POSITIVE, "s", "For one call", free=True),
    number("judge.deadline_s", 300.0, POSITIVE, "s",
           "For a judgement with its waiting and repeated calls, from the end of its group; a step "
           "waits no longer. Then it has failed", free=True),
    number("judge.retries", 4, NOT_NEGATIVE, "calls",
           "Repeated calls after a broken connection, a timeout, or the status 408, 429 or 5xx",
           free=True),
    number("judge.max_calls", 0, COUNT, "calls",
           "Budget of a run, of each host; judgements beyond it fail", special={0: "no limit"},
           free=True),
    number("judge.max_tokens", 0, COUNT, "tokens",
           "The same of tokens, read and written", special={0: "no limit"}, free=True),
    number("judge.max_response_kib", 1024, COUNT, "KiB", "Limit of a response", free=True),
)
# fmt: on
