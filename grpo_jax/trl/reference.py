"""The table of docs/from_trl.md: `python -m grpo_jax.trl.reference` prints it."""

from __future__ import annotations

from grpo_jax.trl.fields import FIELDS
from grpo_jax.trl.given_fields import GIVEN_FIELDS

_LIKE_DPO = ("KTOConfig", "ORPOConfig", "CPOConfig")


def table() -> str:
    """One row for each argument of TRL's GRPOConfig, in Markdown, and for others of the rest.

    Arguments of the other configs stand there if they differ from GRPOConfig's, and those of
    KTOConfig, ORPOConfig and CPOConfig if they differ from DPOConfig's too.
    """
    lines = ["| TRL's argument | its default | here |", "| --- | --- | --- |"]
    lines += [f"| `{n}` | `{f.default!r}` | {f.told()} |" for n, f in FIELDS.items()]
    for of, fields in GIVEN_FIELDS.items():
        known = GIVEN_FIELDS["DPOConfig"] if of in _LIKE_DPO else {}
        for name, f in fields.items():
            if f not in (FIELDS.get(name), known.get(name)):
                lines.append(f"| `{of}.{name}` | `{f.default!r}` | {f.told()} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
