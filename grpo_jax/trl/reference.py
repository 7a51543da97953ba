"""The table of docs/from_trl.md: `python -m grpo_jax.trl.reference` prints it."""

from __future__ import annotations

from grpo_jax.trl.fields import FIELDS
from grpo_jax.trl.given_fields import DPO_FIELDS, SFT_FIELDS


def table() -> str:
    """One row for each argument of TRL's GRPOConfig, in Markdown, and for others of the rest.

    Arguments of SFTConfig and DPOConfig stand there if they differ from GRPOConfig's.
    """
    lines = ["| TRL's argument | its default | here |", "| --- | --- | --- |"]
    lines += [f"| `{n}` | `{f.default!r}` | {f.told()} |" for n, f in FIELDS.items()]
    for of, fields in (("SFTConfig", SFT_FIELDS), ("DPOConfig", DPO_FIELDS)):
        for name, f in fields.items():
            if f != FIELDS.get(name):
                lines.append(f"| `{of}.{name}` | `{f.default!r}` | {f.told()} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
