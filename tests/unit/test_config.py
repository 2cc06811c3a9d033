# SPDX-License-Identifier: GPL-2.0-or-later
"""Which volumes the rules admit."""

import pytest

from luksrotd.config import DeviceRules, Rule

UUID = "8A0a1d4e-6a0a-4a57-9d3c-3f9f2d1f0b11"
LINKS = ("/dev/disk/by-id/ata-Samsung_1", "/dev/disk/by-id/wwn-0x5")


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        (Rule("uuid", "8a0a1d4e-*"), True),
        (Rule("uuid", "8a0a1d4e"), False),
        (Rule("id", "WWN-0x?"), True),
        (Rule("id", "/dev/disk/by-id/wwn-0x5"), False),
        (Rule("bus", "[au]ta"), True),
        (Rule("bus", "usb"), False),
    ],
)
def test_a_rule_looks_at_one_thing(rule, matches):
    assert rule.matches(UUID, LINKS, "ata") is matches
    assert DeviceRules(allow=(rule,)).admit(UUID, LINKS, "ata") is matches
    assert DeviceRules(deny=(rule,)).admit(UUID, LINKS, "ata") is not matches


def test_without_rules_everything_is_admitted_and_deny_wins():
    assert DeviceRules().admit(UUID, (), "")
    everything = (Rule("uuid", "*"),)
    assert not DeviceRules(allow=everything, deny=everything).admit(UUID, LINKS, "ata")
    assert DeviceRules(allow=(Rule("bus", "usb"), *everything)).admit(UUID, LINKS, "ata")
