"""The table of docs/from_trl.md: `python -m grpo_jax.trl.reference` prints it."""

from __future__ import annotations

from grpo_jax.trl.fields import FIELDS


def table() -> str:
    """One row for each argument of TRL's GRPOConfig, in Markdown."""
    lines = ["| TRL's argument | its default | here |", "| --- | --- | --- |"]
    lines += [f"| `{n}` | `{f.default!r}` | {f.told()} |" for n, f in FIELDS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
