"""What the tab key completes of the command grpo-jax, as a script for bash or zsh.

Everything it knows stands in the script: programs, their arguments, the names of configs, and the
table of options with what each can be. Nothing is run while one types.
"""

from __future__ import annotations

from collections.abc import Collection

from grpo_jax.config import loading, options, parsers
from grpo_jax.config.schema import Option, written

SHELLS = ("bash", "zsh")


def script(shell: str, programs: Collection[str], lists: Collection[str]) -> str:
    """The script for a shell; `programs` and `lists` are what may stand after grpo-jax."""
    shared = _SHARED.format(
        words=" ".join([*programs, *lists, "--help", "--version"]),
        configs=" ".join(sorted(file.stem for file in loading.SHIPPED.glob("[a-z]*.py"))),
        options=" ".join(f"--config.{name}=" for name in options.BY_NAME),
        flags=_cases({name: flags(name) for name in programs} | _of_lists(lists)),
        values=_cases({name: _values(option) for name, option in options.BY_NAME.items()}),
    )
    return {"bash": _BASH, "zsh": _ZSH}[shell].replace("@SHARED@", shared.strip("\n"))


def flags(program: str) -> list[str]:
    """The long names of a program's arguments, --help among them."""
    actions = parsers.BY_PROGRAM[program]()._actions
    return [name for action in actions for name in action.option_strings if name.startswith("--")]


def _of_lists(lists: Collection[str]) -> dict[str, list[str]]:
    known = {"options": [name for name in options.SECTIONS if name], "completion": [*SHELLS]}
    return {name: known.get(name, []) for name in lists}


def _values(option: Option) -> list[str]:
    """What an option can be, or what it is by default, where that is one word."""
    if option.choices:
        return list(option.choices)
    if isinstance(option.default, bool):
        return ["True", "False"]
    return [written(option.default)] if option.within else []


def _cases(words: dict[str, list[str]]) -> str:
    lines = [
        f'        {name}) echo "{" ".join(found)}" ;;' for name, found in words.items() if found
    ]
    return "\n".join(lines)


_SHARED = """
_grpo_jax_words="{words}"
_grpo_jax_configs="{configs}"
_grpo_jax_options="{options}"
_grpo_jax_flags() {{
    case $1 in
{flags}
    esac
}}
_grpo_jax_values() {{
    case $1 in
{values}
    esac
}}
"""

_BASH = r"""# What the tab key completes of grpo-jax, for bash. Keep it where bash-completion looks:
#   grpo-jax completion bash > ~/.local/share/bash-completion/completions/grpo-jax
# or for this shell alone:  eval "$(grpo-jax completion bash)"
@SHARED@
_grpo_jax() {
    local line="${COMP_LINE:0:COMP_POINT}" word="" before program name list="" cut=""
    local -a words
    read -ra words <<< "$line"  # not COMP_WORDS: bash breaks words at "="
    local count=${#words[@]}
    if [[ $line != *[[:space:]] ]]; then
        count=$((count - 1))
        word=${words[count]}
    fi
    COMPREPLY=()
    program=${words[1]-}
    before=${words[count - 1]-}
    if ((count < 2)); then
        list=$_grpo_jax_words
    elif [[ $word == --config.*=* ]]; then
        name=${word#--config.}
        cut="${word%%=*}="
        list=$(_grpo_jax_values "${name%%=*}")
    elif [[ $word == --config=* ]]; then
        cut="--config="
        list=$_grpo_jax_configs
    elif [[ $before == --config ]]; then
        list=$_grpo_jax_configs
    else
        list=$(_grpo_jax_flags "$program")
        if [[ $word == --config.* && " $list " == *" --config "* ]]; then
            list=$_grpo_jax_options
        elif [[ $word != -* && " $list " == *" --help "* ]]; then
            list=""  # a value: files
        elif [[ " $list " == *" --config "* ]]; then
            list="$list --config."
        fi
    fi
    while IFS= read -r name; do
        COMPREPLY+=("$name")
    done < <(compgen -W "$list" -- "${word#"$cut"}")
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]]; then
        compopt -o nospace 2> /dev/null
    fi
    if [[ -n $cut && $COMP_WORDBREAKS != *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]/#/$cut}")
    fi
}
complete -o default -F _grpo_jax grpo-jax
"""

_ZSH = r"""#compdef grpo-jax
# What the tab key completes of grpo-jax, for zsh. Keep it in a folder of $fpath, as _grpo-jax:
#   grpo-jax completion zsh > "${fpath[1]}/_grpo-jax"
# or for this shell alone, after compinit:  eval "$(grpo-jax completion zsh)"
@SHARED@
_grpo_jax() {
    local word=$PREFIX before=${words[CURRENT - 1]} name
    local -a list
    list=(${=$(_grpo_jax_flags "${words[2]}")})
    if ((CURRENT == 2)); then
        compadd -- ${=_grpo_jax_words}
    elif [[ $word == --config.*=* ]]; then
        name=${word#--config.}
        compset -P '*='
        compadd -- ${=$(_grpo_jax_values "${name%%=*}")}
    elif [[ $word == --config=* || $before == --config ]]; then
        compset -P '--config='
        compadd -- ${=_grpo_jax_configs}
        _files
    elif [[ $word == --config.* ]] && (( ${list[(Ie)--config]} )); then
        compadd -S '' -- ${=_grpo_jax_options}
    elif [[ $word != -* ]] && (( ${list[(Ie)--help]} )); then
        _files
    else
        compadd -- $list
        (( ${list[(Ie)--config]} )) && compadd -S '' -- --config.
    fi
}
if [[ ${funcstack[1]} == _grpo-jax ]]; then
    _grpo_jax "$@"  # found by its name in $fpath
else
    compdef _grpo_jax grpo-jax
fi
"""
