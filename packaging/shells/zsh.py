# SPDX-License-Identifier: GPL-2.0-or-later
"""The completion for zsh, by _arguments."""

from collections.abc import Sequence

from shells.verbs import HEAD, VOLUMES, Argument, Verb, group_texts, quoted


def zsh(verbs: Sequence[Verb]) -> str:
    """The whole file."""
    top = verbs[0]
    tops = {verb.name: verb.text for verb in verbs if verb.name and " " not in verb.name}
    groups = {verb.name.partition(" ")[0]: "" for verb in verbs if " " in verb.name}
    described = "\n".join(
        f"                {quoted(f'{name}:{text}')}" for name, text in (tops | group_texts(verbs)).items()
    )
    cases = "\n".join(_zsh_case(verb) for verb in verbs[1:] if " " not in verb.name)
    cases += "\n" + "\n".join(_zsh_group(name, verbs) for name in groups)
    return f"""#compdef luksrotctl
{HEAD}

_luksrotctl_device() {{
    local -a volumes
    volumes=(${{(f)"$({VOLUMES})"}})
    _alternative 'volumes:LUKS2 volume:compadd -a volumes' 'images:image file:_files'
}}

_luksrotctl_data() {{
    compset -P @ && _files
}}

_luksrotctl() {{
    local context state state_descr line
    typeset -A opt_args
    local -a verbs
    local -i ret=1

    _arguments -C -S -A '-*' \\
{_zsh_arguments(top, 8)} \\
        '1:verb:->verb' \\
        '*::argument:->arguments' && ret=0
    case $state in
        verb)
            verbs=(
{described}
            )
            _describe verb verbs && ret=0
            ;;
        arguments)
            case $words[1] in
{cases}
            esac
            ;;
    esac
    return ret
}}

_luksrotctl "$@"
"""


def _zsh_case(verb: Verb, indent: int = 16) -> str:
    pad = " " * indent
    name = verb.name.rpartition(" ")[2]
    arguments = _zsh_arguments(verb, indent + 8)
    return f"{pad}{name})\n{pad}    _arguments -S \\\n{arguments} && ret=0\n{pad}    ;;"


def _zsh_group(name: str, verbs: Sequence[Verb]) -> str:
    mine = [verb for verb in verbs if verb.name.startswith(f"{name} ")]
    actions = [quoted(f"{verb.name.partition(' ')[2]}:{verb.text}") for verb in mine]
    texts = "\n".join(" " * 28 + action for action in actions)
    cases = "\n".join(_zsh_case(verb, 24) for verb in mine)
    return f"""                {name})
                    if ((CURRENT == 2)); then
                        verbs=(
{texts}
                        )
                        _describe action verbs && ret=0
                        return ret
                    fi
                    shift words
                    ((CURRENT--))
                    case $words[1] in
{cases}
                    esac
                    ;;"""


def _zsh_arguments(verb: Verb, indent: int) -> str:
    lines = [_zsh_option(option) for option in verb.options]
    for number, operand in enumerate(verb.operands, 1):
        place = "*" if operand.many else str(number)
        lines.append(quoted(f"{place}:{operand.kind}:{_zsh_offer(operand)}"))
    return " \\\n".join(" " * indent + line for line in lines)


def _zsh_option(option: Argument) -> str:
    away = (
        "(- *)" if {"--help", "--version"} & set(option.names) else f"({' '.join((*option.names, *option.excludes))})"
    )
    text = option.text.replace("[", "(").replace("]", ")").replace(":", "\\:")
    takes = "" if option.kind == "flag" else f":{option.kind or 'value'}:{_zsh_offer(option)}"
    if len(option.names) == 1:
        sign = "=" if takes else ""
        return quoted(f"{away}{option.names[0]}{sign}[{text}]{takes}")
    names = ",".join(name + ("=" if takes and name.startswith("--") else "") for name in option.names)
    return f"{quoted(away)}{{{names}}}{quoted(f'[{text}]{takes}')}"


def _zsh_offer(argument: Argument) -> str:
    if argument.kind == "words":
        return f"({' '.join(argument.words)})"
    offers = {"": " ", "file": "_files", "command": "_command_names -e"}
    return offers.get(argument.kind, f"_luksrotctl_{argument.kind}")
