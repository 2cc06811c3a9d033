# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotd.conf(5): every key, every rule of the syntax, every error with its file and line."""

import re
from pathlib import Path

import pytest

from luksrotd.config import Config, DeviceRules, KeyDerivation, Limits, ManagedVolume, Rule, Staged
from luksrotd.configfile import KEYS, ConfigText, parse
from luksrotd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def config(*texts):
    return parsed(*texts).config


def parsed(*texts):
    return parse([ConfigText(f"/etc/{number}.conf", text.encode()) for number, text in enumerate(texts)])


def refusal(*texts):
    with pytest.raises(ConfigError) as caught:
        config(*texts)
    assert caught.value.message.startswith("cannot use the configuration: ")
    return caught.value.message.removeprefix("cannot use the configuration: ")


def test_nothing_said_is_the_default():
    assert config() == config("") == config("# [Limits]\n; Jobs=1\n\n \t\r\n") == Config()


EVERYTHING = """
[Devices]
Allow=uuid:1234* id:ata-Samsung*
Deny=bus:usb
[Volume]
Path=/srv/a b.img
[Limits]
Jobs=2
MemoryMax=512M
WaitingJobs=10
WaitingJobsPerVolume=3
JobsPerUser=5
Transactions=6
TransactionsPerUser=7
TransactionTimeoutSec=1min 30s
[Volume]
Path=/dev/disk/by-id/data
Header=/etc/luks/data.hdr
[KeyDerivation]
Type=argon2i
Iterations=9
Memory=64M
Parallel=2
[Staged]
Expire=2w
RetireExpired=yes
"""


def test_every_key():
    assert config(EVERYTHING) == Config(
        DeviceRules((Rule("uuid", "1234*"), Rule("id", "ata-Samsung*")), (Rule("bus", "usb"),)),
        (ManagedVolume("/srv/a b.img"), ManagedVolume("/dev/disk/by-id/data", "/etc/luks/data.hdr")),
        Limits(2, 512 * 1024, 75, 10, 3, 5, 6, 7, 90.0),
        KeyDerivation("argon2i", 9, 65536, 2),
        Staged(14 * 24 * 3600, retire_expired=True),
    )
    found = {(section, key) for section, block in _sections(EVERYTHING) for key in re.findall(r"(?m)^(\w+)=", block)}
    assert found == {(section, key) for section, keys in KEYS.items() for key in keys}


def test_later_files_win_and_lists_add_up():
    first = "[Limits]\nJobs=1\nWaitingJobs=9\n[Devices]\nDeny=bus:usb\nDeny=uuid:a uuid:b"
    second = "[Limits]\nJobs=3\n[Devices]\nDeny=uuid:c"
    assert config(first, second).limits == Limits(jobs=3, waiting=9)
    assert [rule.pattern for rule in config(first, second).devices.deny] == ["usb", "a", "b", "c"]


def test_an_empty_assignment_takes_back_what_was_assigned():
    deny = config("[Devices]\nDeny=bus:usb\nAllow=uuid:x", "[Devices]\nDeny=\nDeny=uuid:a").devices
    assert deny == DeviceRules((Rule("uuid", "x"),), (Rule("uuid", "a"),))
    everything_back = re.sub(r"(?m)^(?!Path)(\w+)=.*", r"\1=", EVERYTHING)
    volumes = (ManagedVolume("/srv/a b.img"), ManagedVolume("/dev/disk/by-id/data"))
    assert (
        config(everything_back)
        == config(EVERYTHING.partition("[Limits]")[0], everything_back)
        == Config(volumes=volumes)
    )
    assert config("[Limits]\nMemoryMax=1G\nMemoryMax=").limits == Limits()


def test_memory_is_a_size_or_a_part_of_what_there_is():
    assert config("[Limits]\nMemoryMax=1G\nMemoryMax=50%").limits == Limits(memory_percent=50)
    assert config("[Limits]\nMemoryMax=50%\nMemoryMax=1048576").limits == Limits(memory_kib=1024)


def test_of_two_sections_about_one_path_the_later_counts():
    first = "[Volume]\nPath=/a\nHeader=/h\n[Volume]\nPath=/b\n"
    assert config(first, "[Volume]\nPath=/a").volumes == (ManagedVolume("/a"), ManagedVolume("/b"))


@pytest.mark.parametrize("value", ["never", "infinity"])
def test_a_staged_key_may_wait_for_ever(value):
    assert config(f"[Staged]\nExpire={value}").staged.expires_seconds is None


def test_a_line_may_go_on():
    text = "[Devices]\nDeny=uuid:a \\\n  # not this \\\n  uuid:b\\\n\tuuid:c\\\n\nAllow=uuid:d\\"
    assert config(text).devices == DeviceRules(
        (Rule("uuid", "d"),), (Rule("uuid", "a"), Rule("uuid", "b"), Rule("uuid", "c"))
    )
    assert refusal("[Limits]\n# one\nJobs=\\\n0").startswith("/etc/0.conf:3: Jobs=0: ")


def test_what_is_not_known_is_left_aside_with_a_warning():
    text = "[Limits]\nJobs=2\nJobz=1\n[Future]\nJobs=0\nanything=x\n[Staged]\nRetireExpired=on"
    result = parsed("", text)
    assert result.config == Config(limits=Limits(jobs=2), staged=Staged(retire_expired=True))
    assert result.warnings == (
        "/etc/1.conf:3: unknown key Jobz in [Limits], ignored",
        "/etc/1.conf:4: unknown section [Future], ignored",
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Jobs=1", "1: Jobs stands before the first section"),
        ("[Limits]\nJobs", "2: neither a section nor an assignment: Jobs"),
        ("[Limits\n", "1: a section must end with ']'"),
        ("[Limits]\nJobs=0", "2: Jobs=0: must be a whole number from 1 to 10000"),
        ("[Limits]\nJobs=10001", "2: Jobs=10001: must be a whole number from 1 to 10000"),
        ("[Limits]\nJobs=" + "9" * 10_000, "2: Jobs=" + "9" * 60 + "…: must be"),
        ("[Limits]\nJobs=\u0663", "2: Jobs=\u0663: must be a whole number"),
        ("[Limits]\nJobs=1 2", "2: Jobs=1 2: must be"),
        ("[Limits]\nMemoryMax=0%", "2: MemoryMax=0%: must be a whole number from 1 to 100"),
        ("[Limits]\nMemoryMax=1023", "2: MemoryMax=1023: must be a size"),
        ("[Limits]\nMemoryMax=1X", "2: MemoryMax=1X: must be a size"),
        ("[Limits]\nTransactionTimeoutSec=never", "2: TransactionTimeoutSec=never: must be a span of time"),
        ("[Limits]\nTransactionTimeoutSec=0", "2: TransactionTimeoutSec=0: must be from a second"),
        ("[Staged]\nExpire=101y", "2: Expire=101y: must be from a second to a hundred years"),
        ("[Staged]\nExpire=3 fortnights", "2: Expire=3 fortnights: must be a span of time"),
        ("[Staged]\nExpire=1.5h", "2: Expire=1.5h: must be a span of time"),
        ("[Staged]\nExpire=" + "1" * 100_000 + "!", "2: Expire=" + "1" * 60 + "…: must be a span"),
        ("[Staged]\nRetireExpired=maybe", "2: RetireExpired=maybe: must be yes or no"),
        ("[Devices]\nDeny=uuid:a usb", "2: Deny=uuid:a usb: a rule is uuid:PATTERN, id:PATTERN or bus:PATTERN"),
        ("[Devices]\nDeny=bus:", "2: Deny=bus:: a rule is"),
        ("[Volume]\nPath=srv/x", "2: Path=srv/x: must be an absolute path"),
        ("[Volume]\nPath=/srv/../x", "2: Path=/srv/../x: must be an absolute path"),
        ("\n[Volume]\nHeader=/x", "2: a [Volume] without Path="),
        ("[Volume]\nPath=/x\nPath=", "1: a [Volume] without Path="),
        ("[KeyDerivation]\nType=md5", "2: Type=md5: must be one of argon2id, argon2i, pbkdf2"),
        ("[KeyDerivation]\nMemory=1K", "2: Memory=1K: must be a size"),
        ("[KeyDerivation]\nParallel=5", "2: Parallel=5: must be a whole number from 1 to 4"),
        ("[KeyDerivation]\nIterations=2\nType=argon2id", "3: cannot use 2 iterations: argon2id takes at least 4"),
        ("[KeyDerivation]\nType=pbkdf2\nMemory=1M", "3: cannot give memory or threads for pbkdf2"),
        ("[Limits]\nJobs=1\x00", "2: a control character"),
        ("[Limits]\nJobs\u00a0=1", "2: a control character"),
    ],
)
def test_an_error_names_file_and_line(text, complaint):
    assert refusal("[Limits]", text).startswith(f"/etc/1.conf:{complaint}")


def test_the_text_is_utf_8():
    assert parse([ConfigText("x", b"# \xff\n[Limits]\nJobs=2\n")]).config.limits.jobs == 2
    with pytest.raises(ConfigError, match="x:2: not UTF-8"):
        parse([ConfigText("x", b"[Limits]\nJobs=\xff\n")])


# -- what is shipped -----------------------------------------------------------------------------------------------


def test_the_file_that_is_shipped_shows_the_defaults():
    text = (ROOT / "systemd" / "luksrotd.conf").read_text(encoding="utf-8")
    assert config(text) == Config()
    shown = re.sub(r"(?m)^#(?=\w+=|\[Volume\])", "", text)
    assert config(shown) == Config(volumes=(ManagedVolume("/var/lib/images/vault.img"),))
    found = {(section, key) for section, block in _sections(shown) for key in re.findall(r"(?m)^(\w+)=", block)}
    assert found == {(section, key) for section, keys in KEYS.items() for key in keys}


def test_the_man_page_names_every_key_under_its_section():
    page = (ROOT / "docs" / "man" / "luksrotd.conf.5.scd").read_text(encoding="utf-8")
    for section, keys in KEYS.items():
        block = re.search(rf"(?ms)^# \[{section.upper()}\] SECTION$(.*?)^# ", page)
        assert block, section
        assert re.findall(r"(?m)^\*(\w+)=\*", block[1]) == list(keys)


def test_the_example_of_the_man_page_can_be_used():
    page = (ROOT / "docs" / "man" / "luksrotd.conf.5.scd").read_text(encoding="utf-8")
    (example,) = re.findall(r"(?ms)^```\n(.*?)^```$", page)
    result = parsed(example)
    assert result.warnings == ()
    assert result.config.volumes == (ManagedVolume("/dev/disk/by-id/ata-DATA", "/etc/luks/data.hdr"),)


def _sections(text):
    return re.findall(r"(?ms)^\[(\w+)\]\n(.*?)(?=^\[|\Z)", text)
