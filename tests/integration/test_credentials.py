# SPDX-License-Identifier: GPL-2.0-or-later
"""Credentials of the daemon and LUKS2 tokens, over D-Bus; each kind of secret needs a right of its own."""

import os

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from tests.integration.test_api import DEVICE, ERROR, INVALID, refusal
from tests.support import makeimage, tokenplugin
from tests.support.daemon_process import FAST, NEW, OLD, appeared, disk, ended, memfd, running, take_key

pytestmark = pytest.mark.asyncio
PIN = b"planted-pin-31337"
CREDENTIAL = {name: {"credential": Variant("s", name)} for name in ("old", "new")}


def token(number, pin=None):
    """A description, and the descriptors that go with it."""
    with_pin = {"pin-fd": Variant("h", 0)} if pin is not None else {}
    return {"token": Variant("i", number), **with_pin}, [] if pin is None else [memfd(pin)]


async def job_of(client, path, method, credential, secret, fds=()):
    try:
        body = ["", credential, secret, FAST]
        return str((await client.call(path, DEVICE, method, "sa{sv}a{sv}a{sv}", body, fds=fds))[0])
    finally:
        for fd in fds:
            os.close(fd)


@pytest.fixture
def credentials(tmp_path):
    """A directory of them, as systemd makes it."""
    directory = tmp_path / "credentials"
    directory.mkdir(0o700)
    for name, secret in {"old": OLD, "new": NEW}.items():
        (directory / name).write_bytes(secret)
        (directory / name).chmod(0o400)
    return {"CREDENTIALS_DIRECTORY": str(directory)}


async def test_credentials_of_the_service_unlock_and_are_enrolled(bed, client, volume, credentials):
    async with running(bed, client, environment=credentials):
        await appeared(client, volume.path)
        job = await job_of(client, volume.path, "Enroll", CREDENTIAL["old"], CREDENTIAL["new"])
        assert (await ended(client, job))["State"] == "finished"
        for name, kind in (("missing", ERROR + "SecretRejected"), ("../old", INVALID), ("a\nb", INVALID)):
            described = {"credential": Variant("s", name)}
            error = await refusal(job_of(client, volume.path, "Rotate", described, CREDENTIAL["new"]))
            assert error.name == kind
            assert name not in error.text
    assert volume.opens(NEW)


async def test_a_service_without_credentials_says_so(daemon, client, volume):
    error = await refusal(job_of(client, volume.path, "Enroll", CREDENTIAL["old"], CREDENTIAL["new"]))
    assert error.name == ERROR + "SecretRejected"
    assert "the service has none" in error.text


@pytest.fixture
def tokened(bed, token_plugin):
    """A volume with tokens: 0 wants a PIN, 1 gives the wrong passphrase, 2 has no plugin, 3 needs a device."""

    def prepare(image):
        bodies = [
            tokenplugin.token(OLD, pin=PIN),
            tokenplugin.token(b"wrong"),
            {"type": "nobody-has-this", "keyslots": ["0"]},
            {"type": "systemd-fido2", "keyslots": ["0"]},
        ]
        for number, body in enumerate(bodies):
            makeimage.import_token(image, body, number)

    with disk(bed, "tokened", prepare=prepare) as volume:
        yield volume


async def test_a_token_unlocks(bed, client, tokened):
    async with running(bed, client):
        await appeared(client, tokened.path)
        for method, number in (("Enroll", 0), ("Rotate", -1)):
            credential, fds = token(number, PIN)
            job = await job_of(client, tokened.path, method, credential, {"generate": Variant("b", True)}, fds)
            key = await take_key(client, job)
            assert (await ended(client, job))["State"] == "finished"
            assert tokened.opens(key)
        for number, pin, error, why in (
            (0, None, "WrongCredential", "PIN"),
            (0, b"wrong", "WrongCredential", "PIN"),
            (1, None, "WrongCredential", "opens no keyslot"),
            (2, None, "EngineFailed", "no plugin"),
            (3, None, "EngineFailed", "not supported"),
            (31, None, "WrongCredential", "no token 31"),
            (0, b"", "SecretRejected", "PIN"),
        ):
            credential, fds = token(number, pin)
            job = await job_of(client, tokened.path, "Rotate", credential, {"generate": Variant("b", True)}, fds)
            done = await ended(client, job)
            assert (done["State"], done["ErrorName"], done["Outcome"]) == ("failed", ERROR + error, "unchanged")
            assert why in done["ErrorMessage"]
        assert tokened.opens(key)


async def test_descriptions_that_are_not_one_thing(enrolled, client):
    pin, good, new = {"pin-fd": Variant("h", 0)}, {"fd": Variant("h", 0)}, {"generate": Variant("b", True)}
    for credential, secret in (
        ({"token": Variant("i", -2)}, new),
        ({"token": Variant("i", 32)}, new),
        ({"token": Variant("u", 1)}, new),
        ({**good, "token": Variant("i", 1)}, new),
        ({"credential": Variant("s", "old"), "token": Variant("i", 1)}, new),
        ({**good, **pin}, new),
        (pin, new),
        ({"token": Variant("i", 1), "pin-fd": Variant("h", 7)}, new),
        ({"generate": Variant("b", True)}, new),
        (good, {"token": Variant("i", 1)}),
        (good, {**new, **pin}),
        (good, {"generate": Variant("b", False)}),
        (good, {**new, "credential": Variant("s", "new")}),
    ):
        error = await refusal(job_of(client, enrolled.path, "Rotate", credential, secret, [memfd(OLD)]))
        assert error.name == INVALID, (credential, secret)


NOWHERE = {"keyfile": Variant("s", "/nowhere")}


@pytest.mark.parametrize(
    ("action", "credential", "secret"),
    [
        (names.ACTION_KEYFILE, {"token": Variant("i", 5)}, NOWHERE),
        (names.ACTION_CREDENTIAL, {"credential": Variant("s", "none")}, NOWHERE),
        (names.ACTION_TOKEN, {"token": Variant("i", 5)}, NOWHERE),
        (names.ACTION_GENERATE, NOWHERE, {"generate": Variant("b", True)}),
    ],
)
async def test_each_kind_of_secret_needs_a_right_of_its_own(bed, enrolled, nobody, action, credential, secret):
    """Whoever may rotate may not by that make the daemon read files, ask a TPM, or hand out keys."""

    async def attempt(refused):
        bed.set_rules(
            "polkit.addRule(function (action, subject) {"
            f" if (action.id == '{refused}') {{ return polkit.Result.NO; }}"
            " if (action.id.indexOf('org.luksrotd1.') == 0) { return polkit.Result.YES; } });"
        )
        body = ["", credential, secret, {}]
        return (await refusal(nobody.call(enrolled.path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", body))).name

    try:
        assert await attempt(action) == ERROR + "NotAuthorized"
        assert await attempt("") == ERROR + "SecretRejected"
    finally:
        bed.set_rules("")
