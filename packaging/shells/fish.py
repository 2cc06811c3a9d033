# SPDX-License-Identifier: GPL-2.0-or-later
"""The completion for fish: one line for each word that may come."""

from collections.abc import Sequence

from shells.verbs import HEAD, VOLUMES, Argument, Verb, group_texts, quoted


def fish(verbs: Sequence[Verb]) -> str:
    """The whole file."""
    takers = sorted({n for v in verbs for o in v.options if o.kind != "flag" for n in o.names})
    groups = list(group_texts(verbs))
    lines = ["complete -c luksrotctl -f"]
    texts = {verb.name: verb.text for verb in verbs[1:] if " " not in verb.name} | group_texts(verbs)
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
    return f"complete -c luksrotctl -n {quoted(condition)}"


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
