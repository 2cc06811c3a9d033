# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the completions of luksrotctl for bash, zsh and fish out of its parser, into a folder.

    PYTHONPATH=. python3 packaging/shell_completions.py packaging/completions

They are checked in.  Whoever completes runs nothing of luksrotd: no daemon is started, nobody is asked, no key is read
(docs/adr/0027-completions.md).  Volumes are offered as udev knows them.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from luksrotd.ctl.cli import build_parser
from luksrotd.names import DEFAULT_KEY_NAME

SHELLS = ("luksrotctl", "_luksrotctl", "luksrotctl.fish")
HEAD = """\
# SPDX-License-Identifier: GPL-2.0-or-later
# Made by packaging/shell_completions.py from the parser of luksrotctl: do not edit."""
#: Nodes of LUKS2 volumes, one a line.  lsblk(8) asks udev, which needs no right, and opens no device for it.
VOLUMES = (
    "lsblk --noheadings --raw --paths --output NAME,FSTYPE,FSVER 2>/dev/null | sed -n 's/ crypto_LUKS 2$//p' | sort -u"
)
#: What may stand for an argument, by how help calls it; nothing is offered for what is not here.
KINDS = {"FILE": "file", "JSON|@FILE": "data", "DEVICE": "device", "COMMAND": "command"}
WORDS = {"N|any": ("any",), "NAME": (DEFAULT_KEY_NAME,)}


@dataclass(frozen=True)
class Argument:
    """An option (``names``), or an operand (no names).

    ``kind`` is what it takes: "" nothing that could be offered, "flag" nothing at all, "words" one of ``words``, or a
    value of ``KINDS``.  ``excludes`` are options that cannot stand beside it.
    """

    names: tuple[str, ...]
    kind: str
    words: tuple[str, ...]
    text: str
    many: bool = False
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verb:
    """``name`` has two words if the verb has an action."""

    name: str
    text: str
    arguments: Sequence[Argument]

    @property
    def options(self) -> list[Argument]:
        """The options."""
        return [one for one in self.arguments if one.names]

    @property
    def operands(self) -> list[Argument]:
        """The operands, in order."""
        return [one for one in self.arguments if not one.names]


def verbs_of(parser: argparse.ArgumentParser, *path: str) -> Iterator[Verb]:
    """All verbs; with the name '' what may stand before one."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not path or not nested:
        text = (parser.description or "").partition("\n")[0].rstrip(".")
        yield Verb(" ".join(path), _short(text[:1].lower() + text[1:]), list(_arguments(parser)))
    for action in nested:
        for name, verb in action.choices.items():
            yield from verbs_of(verb, *path, name)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[Argument]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        words = tuple(map(str, action.choices or WORDS.get(metavar, ())))
        kind = "flag" if action.nargs == 0 else "words" if words else KINDS.get(metavar, "")
        beside = [
            name
            for group in parser._mutually_exclusive_groups
            if action in group._group_actions
            for other in group._group_actions
            if other is not action
            for name in other.option_strings
        ]
        many = action.nargs in ("*", "+")
        yield Argument(tuple(action.option_strings), kind, words, _short(action.help or ""), many, tuple(beside))


def _short(text: str) -> str:
    """What fits beside the word: up to the first clause, unless that says too little."""
    for clause in (r"; | \(|: |, or |, without", r"; | \("):
        short = re.split(clause, text, maxsplit=1)[0].strip()
        if " " in short:
            break
    return short


# ---- bash ----


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


# ---- zsh ----


def zsh(verbs: Sequence[Verb]) -> str:
    """The whole file."""
    top = verbs[0]
    tops = {verb.name: verb.text for verb in verbs if verb.name and " " not in verb.name}
    groups = {verb.name.partition(" ")[0]: "" for verb in verbs if " " in verb.name}
    described = "\n".join(
        f"                {_quoted(f'{name}:{text}')}" for name, text in (tops | _group_texts(verbs)).items()
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


def _group_texts(verbs: Sequence[Verb]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for verb in verbs:
        first, _, action = verb.name.partition(" ")
        if action:
            found.setdefault(first, []).append(action)
    return {name: " or ".join(actions) for name, actions in found.items()}


def _zsh_case(verb: Verb, indent: int = 16) -> str:
    pad = " " * indent
    name = verb.name.rpartition(" ")[2]
    arguments = _zsh_arguments(verb, indent + 8)
    return f"{pad}{name})\n{pad}    _arguments -S \\\n{arguments} && ret=0\n{pad}    ;;"


def _zsh_group(name: str, verbs: Sequence[Verb]) -> str:
    mine = [verb for verb in verbs if verb.name.startswith(f"{name} ")]
    actions = [_quoted(f"{verb.name.partition(' ')[2]}:{verb.text}") for verb in mine]
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
        lines.append(_quoted(f"{place}:{operand.kind}:{_zsh_offer(operand)}"))
    return " \\\n".join(" " * indent + line for line in lines)


def _zsh_option(option: Argument) -> str:
    away = (
        "(- *)" if {"--help", "--version"} & set(option.names) else f"({' '.join((*option.names, *option.excludes))})"
    )
    text = option.text.replace("[", "(").replace("]", ")").replace(":", "\\:")
    takes = "" if option.kind == "flag" else f":{option.kind or 'value'}:{_zsh_offer(option)}"
    if len(option.names) == 1:
        sign = "=" if takes else ""
        return _quoted(f"{away}{option.names[0]}{sign}[{text}]{takes}")
    names = ",".join(name + ("=" if takes and name.startswith("--") else "") for name in option.names)
    return f"{_quoted(away)}{{{names}}}{_quoted(f'[{text}]{takes}')}"


def _zsh_offer(argument: Argument) -> str:
    if argument.kind == "words":
        return f"({' '.join(argument.words)})"
    offers = {"": " ", "file": "_files", "command": "_command_names -e"}
    return offers.get(argument.kind, f"_luksrotctl_{argument.kind}")


# ---- fish ----


def fish(verbs: Sequence[Verb]) -> str:
    """The whole file."""
    takers = sorted({n for v in verbs for o in v.options if o.kind != "flag" for n in o.names})
    groups = list(_group_texts(verbs))
    lines = ["complete -c luksrotctl -f"]
    texts = {verb.name: verb.text for verb in verbs[1:] if " " not in verb.name} | _group_texts(verbs)
    lines += [_fish_word("", name, text) for name, text in texts.items()]
    for verb in verbs:
        group, _, action = verb.name.partition(" ")
        if action:
            lines.append(_fish_word(group, action, verb.text))
        lines += [_fish_option(verb.name, option) for option in verb.options]
        lines += [
            _fish_operand(verb.name, "any" if operand.many else str(number), operand)
            for number, operand in enumerate(verb.operands)
        ]
    body = "\n".join(lines)
    return f"""{HEAD}

function __luksrotctl_volumes
    {VOLUMES}
end

# Files behind an @.
function __luksrotctl_data
    set -l typed (commandline --current-token)
    string match --quiet -- '@*' $typed; or return
    string replace --regex '^' '@' (__fish_complete_path (string sub --start 2 -- $typed))
end

# Whether the command line so far has this verb and, unless that is "any", so many operands.
function __luksrotctl_at --argument-names verb operands
    set -l found
    set -l count 0
    set -l skip 0
    for word in (commandline --tokenize --cut-at-cursor --current-process)[2..]
        if test $skip = 1
            set skip 0
        else if contains -- $word {" ".join(takers)}
            set skip 1
        else if string match --quiet -- '-*' $word
            continue
        else if test (count $found) = 0; or contains -- "$found" {" ".join(groups)}
            set -a found $word
        else
            set count (math $count + 1)
        end
    end
    test "$found" = "$verb"; and test "$operands" = any -o "$operands" = $count
end

{body}
"""


def _fish_when(verb: str, operands: str = "any") -> str:
    condition = f'__luksrotctl_at "{verb}" {operands}'
    return f"complete -c luksrotctl -n {_quoted(condition)}"


def _fish_word(verb: str, word: str, text: str) -> str:
    return f"{_fish_when(verb)} -a {word} -d {_fish_text(text)}"


def _fish_operand(verb: str, operands: str, operand: Argument) -> str:
    return f"{_fish_when(verb, operands)}{_fish_offer(operand)}"


def _fish_option(verb: str, option: Argument) -> str:
    names = "".join(f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}" for name in option.names)
    takes = "" if option.kind == "flag" else f" -x{_fish_offer(option)}".replace(" -x -F", " -r -F")
    return f"{_fish_when(verb)}{names}{takes} -d {_fish_text(option.text)}"


def _fish_offer(argument: Argument) -> str:
    if argument.kind == "words":
        return f" -a '{' '.join(argument.words)}'"
    return {
        "": "",
        "file": " -F",
        "command": " -a '(__fish_complete_command)'",
        "data": " -a '(__luksrotctl_data)'",
        "device": " -F -a '(__luksrotctl_volumes)'",
    }[argument.kind]


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _quoted(text: str) -> str:
    """For sh and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def made() -> dict[str, str]:
    """The files, by their names."""
    verbs = list(verbs_of(build_parser()))
    return dict(zip(SHELLS, (bash(verbs), zsh(verbs), fish(verbs)), strict=True))


if __name__ == "__main__":
    for name, content in made().items():
        Path(sys.argv[1], name).write_text(content, encoding="utf-8")
