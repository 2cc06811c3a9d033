# SPDX-License-Identifier: GPL-2.0-or-later
"""The completion for bash, by bash-completion's helpers."""

from collections.abc import Sequence

from shells.verbs import HEAD, VOLUMES, Verb


def bash(verbs: Sequence[Verb]) -> str:
    """The whole file."""
    options = {name: option for verb in verbs for option in verb.options for name in option.names}
    kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, option in options.items():
        if option.kind != "flag":
            kinds.setdefault((option.kind, option.words), []).append(name)
    takers = "|".join(name for names in kinds.values() for name in names)
    by_kind = "\n".join(
        f"        {'|'.join(names)})\n{_bash_line(_bash_offer(kind, words))}            return\n            ;;"
        for (kind, words), names in kinds.items()
    )
    tops = dict.fromkeys(verb.name.partition(" ")[0] for verb in verbs if verb.name)
    nested = {top: [v.name.partition(" ")[2] for v in verbs if v.name.startswith(f"{top} ")] for top in tops}
    actions = "\n".join(f"            {top}) words='{' '.join(found)}' ;;" for top, found in nested.items() if found)
    groups = "|".join(top for top, found in nested.items() if found)
    return f"""{HEAD}
# shellcheck shell=bash disable=SC2207  # no word that is offered has a space in it

_luksrotctl_volumes() {{
    {VOLUMES}
}}

# A volume, or an image.
_luksrotctl_device() {{
    _filedir
    COMPREPLY+=($(compgen -W "$(_luksrotctl_volumes)" -- "$cur"))
    __ltrim_colon_completions "$cur"
}}

# A file behind an @, which for readline is no part of the word.
_luksrotctl_data() {{
    [[ $cur == @* ]] || return
    cur=${{cur#@}}
    _filedir
    [[ $COMP_WORDBREAKS == *@* ]] || COMPREPLY=("${{COMPREPLY[@]/#/@}}")
}}

_luksrotctl() {{
    local cur prev words cword split verb='' operands=0 index word offered
    # Words are not to end at these in paths, nor at the @ of --data.
    _init_completion -s -n :@ || return

    case $prev in
{by_kind}
    esac
    $split && return

    for ((index = 1; index < cword; index++)); do
        word=${{words[index]}}
        case $word in
            {takers}) ((index++)) ;;
            -*) ;;
            *)
                case $verb in
                    '') verb=$word ;;
                    {groups}) verb="$verb $word" ;;
                    *) ((operands++)) ;;
                esac
                ;;
        esac
    done

    if [[ $cur == -* ]]; then
        case $verb in
{_bash_options(verbs)}
            *) return ;;
        esac
        COMPREPLY=($(compgen -W "$offered" -- "$cur"))
        return
    fi
    words=''
    case $verb in
        '') words='{" ".join(tops)}' ;;
{actions.replace("            ", "        ", 1)}
    esac
    if [[ $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
        return
    fi
    case "$verb $operands" in
{_bash_operands(verbs)}
    esac
}} &&
    complete -F _luksrotctl luksrotctl
"""


def _bash_line(command: str) -> str:
    return f"            {command}\n" if command else ""


def _bash_options(verbs: Sequence[Verb]) -> str:
    return "\n".join(
        f"            '{verb.name}') offered='{' '.join(name for option in verb.options for name in option.names)}' ;;"
        for verb in verbs
    )


def _bash_operands(verbs: Sequence[Verb]) -> str:
    """Which operand may come, by the verb and how many there are."""
    patterns: dict[str, list[str]] = {}
    for verb in verbs:
        for number, operand in enumerate(verb.operands):
            pattern = f"'{verb.name} '*" if operand.many else f"'{verb.name} {number}'"
            patterns.setdefault(_bash_offer(operand.kind, operand.words), []).append(pattern)
    return "\n".join(
        f"        {' | '.join(found)})\n            {offer}\n            ;;" for offer, found in patterns.items()
    )


def _bash_offer(kind: str, words: Sequence[str]) -> str:
    if kind == "words":
        return f"COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$cur\"))"
    return {
        "": "",
        "file": '_filedir\n            __ltrim_colon_completions "$cur"',
        "command": 'COMPREPLY=($(compgen -c -- "$cur"))',
        # Behind the @ of a file.
        "data": "_luksrotctl_data",
        # An image, too.
        "device": "_luksrotctl_device",
    }[kind]
