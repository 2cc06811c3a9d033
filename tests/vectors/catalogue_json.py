# SPDX-License-Identifier: GPL-2.0-or-later
"""The vectors whose JSON is odd or wrong; the others are in ``catalogue.py``."""

import json

from luksrotd.luks2 import layout
from tests.support import forge
from tests.support.forge import Json
from tests.vectors.catalogue import KIB, VECTORS, Image, Vector, both, drop, json_vector, put, vector

JSON_C_ONLY = "json-c reads what is not JSON"
AMBIGUOUS = "json-c and we would read it differently"
USELESS = "a keyslot that can hold no key"
FUTURE = "we do not know what it means"

# ---- the text ---------------------------------------------------------------------------------------------------


@vector("FormatError: does not start with an object")
def leading_space(head):
    return forge.with_text(head, b" " + forge.text_of(head))


@vector("FormatError: does not start with an object")
def array_instead_of_an_object(head):
    return forge.with_text(head, b"[" + forge.text_of(head) + b"]")


@vector("FormatError: does not start with an object")
def byte_order_mark(head):
    return forge.with_text(head, b"\xef\xbb\xbf" + forge.text_of(head))


@vector("FormatError: does not start with an object")
def empty_area(head):
    return forge.with_text(head, b"")


@vector("FormatError: not JSON")
def truncated_text(head):
    return forge.with_text(head, forge.text_of(head)[:-1])


@vector("FormatError: is not terminated")
def text_up_to_the_very_end(head):
    text = forge.text_of(head)
    size = 16 * KIB - layout.BINARY_SIZE
    return forge.with_text(head, text[:-1] + b',"x":"' + b"x" * (size - len(text) - 7) + b'"}')


@vector("primary")
def text_up_to_the_last_byte_but_one(head):
    text = forge.text_of(head)
    size = 16 * KIB - layout.BINARY_SIZE - 1
    return forge.with_text(head, text[:-1] + b',"x":"' + b"x" * (size - len(text) - 7) + b'"}')


@vector("FormatError: not JSON")
def garbage_behind_the_object(head):
    return forge.with_text(head, forge.text_of(head) + b"x")


@vector("FormatError: not JSON")
def garbage_behind_a_zero(head):
    return forge.with_text(head, forge.text_of(head) + b"\0\0\0x")


@vector("FormatError: not JSON")
def second_object(head):
    return forge.with_text(head, forge.text_of(head) * 2)


def spliced(text: bytes, member: bytes) -> bytes:
    """The object with one more member."""
    return text[:-1] + b"," + member + b"}"


def text_vector(name: str, expect: str, member: bytes, *, stricter: str = "") -> None:
    """A vector with one more member in the text of the object."""
    VECTORS.append(
        Vector(name, lambda head: Image(forge.with_text(head, spliced(forge.text_of(head), member))), expect, stricter)
    )


text_vector("comment", "FormatError: not JSON", b'"x":1/* */', stricter=JSON_C_ONLY)
text_vector("single_quotes", "FormatError: not JSON", b"'x':1", stricter=JSON_C_ONLY)
text_vector("trailing_comma", "FormatError: not JSON", b'"x":[1,]', stricter=JSON_C_ONLY)
text_vector("nan", "FormatError: NaN is not JSON", b'"x":NaN', stricter=JSON_C_ONLY)
text_vector("infinity", "FormatError: -Infinity is not JSON", b'"x":-Infinity', stricter=JSON_C_ONLY)
text_vector("capital_literal", "FormatError: not JSON", b'"x":TRUE', stricter=JSON_C_ONLY)
text_vector("leading_zero", "FormatError: not JSON", b'"x":01', stricter=JSON_C_ONLY)
text_vector("raw_control_character", "FormatError: not JSON", b'"x":"\x01"', stricter=JSON_C_ONLY)
text_vector("not_utf8", "FormatError: not JSON", b'"x":"\xff"', stricter=JSON_C_ONLY)
text_vector("unquoted_member", "FormatError: not JSON", b"x:1")
text_vector("duplicate_member", "FormatError: a member twice", b'"tokens":{}', stricter=AMBIGUOUS)
text_vector("nul_in_a_member", "FormatError: a NUL", b'"tokens\\u0000":{}', stricter=AMBIGUOUS)
text_vector("nul_in_a_text", "FormatError: a NUL", b'"x":["\\u0000"]', stricter=AMBIGUOUS)
text_vector("lone_surrogate", "FormatError: a lone surrogate", b'"x":{"y":"\\ud800"}', stricter=AMBIGUOUS)
text_vector("surrogate_pair", "primary", b'"x":"\\ud83d\\ude00"')
text_vector("integer_of_64_bits", "primary", b'"x":[18446744073709551615,-9223372036854775808]')
text_vector("integer_of_65_bits", "FormatError: does not fit", b'"x":18446744073709551616', stricter=AMBIGUOUS)
text_vector("integer_of_minus_65_bits", "FormatError: does not fit", b'"x":-9223372036854775809', stricter=AMBIGUOUS)
text_vector("integer_of_5000_digits", "FormatError: not JSON", b'"x":' + b"9" * 5000, stricter=AMBIGUOUS)
text_vector("float_that_is_too_large", "FormatError: does not fit", b'"x":1e400', stricter=AMBIGUOUS)
text_vector("floats", "primary", b'"x":[0.1,-1.5e-7,1E+3]')
text_vector("nested_as_deep_as_json_c_reads", "primary", b'"x":' + b"[" * 31 + b"]" * 31)
text_vector("nested_one_level_deeper", "FormatError: too deeply", b'"x":' + b"[" * 32 + b"]" * 32)
text_vector("scalar_at_the_last_level", "primary", b'"x":' + b"[" * 30 + b"1" + b"]" * 30)
text_vector("scalar_one_level_deeper", "FormatError: too deeply", b'"x":' + b"[" * 31 + b"1" + b"]" * 31)
text_vector("objects_nested_too_deeply", "FormatError: too deeply", b'"x":' + b'{"x":' * 31 + b"1" + b"}" * 31)
text_vector("nested_by_the_thousand", "FormatError: too deeply", b'"x":' + b"[" * 5000 + b"]" * 5000)
text_vector("never_closed", "FormatError: cannot read LUKS2 metadata", b'"x":' + b"[" * 10000)


# ---- the objects ------------------------------------------------------------------------------------------------

for member in ("keyslots", "tokens", "segments", "digests", "config"):
    json_vector(f"{member}_missing", f"FormatError: object '{member}' is missing", drop(member))
    json_vector(f"{member}_not_an_object", f"FormatError: object '{member}' is missing", put(member, []))
    json_vector(f"{member}_null", f"FormatError: object '{member}' is missing", put(member, None))


def renamed(path: str, old: str, new: str) -> forge.Edit:
    def edit(raw: Json) -> None:
        holder = raw
        for part in path.split("/"):
            holder = holder[part]
        holder[new] = holder.pop(old)

    return edit


def referred(keyslot: str) -> forge.Edit:
    return both(put("digests/0/keyslots", [keyslot]))


K0, K1 = "keyslots/0", "keyslots/1"


def second_keyslot(**area: object) -> forge.Edit:
    """Another keyslot beside the first, in the same digest."""

    def edit(raw: Json) -> None:
        slot = json.loads(json.dumps(raw["keyslots"]["0"]))
        slot["area"] |= {"offset": "290816"} | area
        raw["keyslots"]["1"] = slot
        raw["digests"]["0"]["keyslots"].append("1")

    return edit


# Keyslots

json_vector("no_keyslots", "primary", both(put("keyslots", {}), put("digests/0/keyslots", [])))
json_vector("two_keyslots", "primary", second_keyslot())
json_vector("keyslot_31", "primary", both(renamed("keyslots", "0", "31"), referred("31")))
json_vector("keyslot_32", "primary", both(renamed("keyslots", "0", "32"), referred("32")))
json_vector(
    "keyslot_key_not_decimal", "FormatError: 'x' is not a number", both(renamed("keyslots", "0", "x"), referred("x"))
)
json_vector("keyslot_key_negative", "FormatError: '-1' is not", both(renamed("keyslots", "0", "-1"), referred("-1")))
json_vector(
    "keyslot_key_with_a_leading_zero", "FormatError: '00' is not", both(renamed("keyslots", "0", "00"), referred("00"))
)
json_vector(
    "keyslot_key_of_32_bits",
    "FormatError: '4294967296' is not",
    both(renamed("keyslots", "0", "4294967296"), referred("4294967296")),
)
json_vector(
    "unused_keyslot_key_empty",
    "FormatError: '' is not",
    put("keyslots/", {"type": "x", "key_size": 1, "area": {"type": "x", "offset": "290816", "size": "4096"}}),
    stricter="it is no number",
)
json_vector("keyslot_not_an_object", "FormatError: object '0' is missing", put(K0, []))
json_vector("keyslot_without_a_type", "FormatError: string 'type'", drop(f"{K0}/type"))
json_vector("keyslot_of_type_nothing", "FormatError: string 'type'", put(f"{K0}/type", ""))
json_vector("keyslot_of_type_number", "FormatError: string 'type'", put(f"{K0}/type", 2))
json_vector("keyslot_of_an_unknown_type", "primary", put(f"{K0}/type", "x-unknown"))
json_vector("key_size_missing", "FormatError: integer 'key_size'", drop(f"{K0}/key_size"))
json_vector("key_size_as_text", "FormatError: integer 'key_size'", put(f"{K0}/key_size", "64"))
json_vector("key_size_as_float", "FormatError: integer 'key_size'", put(f"{K0}/key_size", 64.0))
json_vector("key_size_as_boolean", "FormatError: integer 'key_size'", put(f"{K0}/key_size", True))
json_vector("key_size_0", "FormatError: integer 'key_size'", put(f"{K0}/key_size", 0), stricter=USELESS)
json_vector("key_size_negative", "FormatError: integer 'key_size'", put(f"{K0}/key_size", -1))
json_vector("key_size_of_33_bits", "FormatError: integer 'key_size'", put(f"{K0}/key_size", 2**32))
json_vector("priority_2", "primary", put(f"{K0}/priority", 2))
json_vector("priority_as_text", "FormatError: integer 'priority'", put(f"{K0}/priority", "2"), stricter=FUTURE)

json_vector("area_missing", "FormatError: object 'area'", drop(f"{K0}/area"))
json_vector("area_without_a_type", "FormatError: string 'type'", drop(f"{K0}/area/type"))
json_vector("area_not_raw", "FormatError: 'x' is not 'raw'", put(f"{K0}/area/type", "x"))
json_vector("area_without_encryption", "FormatError: string 'encryption'", drop(f"{K0}/area/encryption"))
json_vector("area_without_key_size", "FormatError: integer 'key_size'", drop(f"{K0}/area/key_size"))
json_vector("area_offset_as_integer", "FormatError: number 'offset'", put(f"{K0}/area/offset", 32768))
json_vector("area_offset_in_hexadecimal", "FormatError: number 'offset'", put(f"{K0}/area/offset", "0x8000"))
json_vector("area_offset_negative", "FormatError: number 'offset'", put(f"{K0}/area/offset", "-32768"))
json_vector("area_offset_in_arabic_digits", "FormatError: number 'offset'", put(f"{K0}/area/offset", "٣٢٧٦٨"))
json_vector("area_offset_with_a_leading_zero", "primary", put(f"{K0}/area/offset", "032768"))
json_vector("area_offset_of_65_bits", "FormatError: 'offset' is out of range", put(f"{K0}/area/offset", str(2**64)))
json_vector("area_offset_of_30_digits", "FormatError: number 'offset'", put(f"{K0}/area/offset", "9" * 30))
json_vector("area_end_of_65_bits", "FormatError: not in the keyslots area", put(f"{K0}/area/offset", str(2**64 - 1)))
json_vector("area_size_0", "FormatError: size is 0", put(f"{K0}/area/size", "0"))
json_vector("area_in_the_primary", "FormatError: not in the keyslots area", put(f"{K0}/area/offset", "0"))
json_vector("area_in_the_secondary", "FormatError: not in the keyslots area", put(f"{K0}/area/offset", "16384"))
json_vector("area_behind_the_keyslots", "FormatError: not in the keyslots area", put(f"{K0}/area/offset", "16777216"))
json_vector("area_across_the_end", "FormatError: not in the keyslots area", put(f"{K0}/area/size", str(16744448 + 1)))
json_vector("area_of_all_the_space", "primary", put(f"{K0}/area/size", str(16744448)))
json_vector("area_unaligned", "primary", put(f"{K0}/area/offset", "32769"))
json_vector("areas_overlap", "FormatError: it overlaps", second_keyslot(offset=str(32768 + 258047)))
json_vector("areas_coincide", "FormatError: it overlaps", second_keyslot(offset="32768"))
json_vector("areas_touch", "primary", second_keyslot(offset=str(32768 + 258048), size="1"))
json_vector(
    "area_of_an_unknown_type_overlaps",
    "FormatError: it overlaps",
    both(second_keyslot(offset="32768"), put(f"{K1}/type", "x"), put("digests/0/keyslots", ["0"])),
)

json_vector("af_missing", "FormatError: object 'af'", drop(f"{K0}/af"))
json_vector("af_not_luks1", "FormatError: 'x' is not 'luks1'", put(f"{K0}/af/type", "x"))
json_vector("af_without_hash", "FormatError: string 'hash'", drop(f"{K0}/af/hash"))
json_vector("af_stripes_as_text", "FormatError: integer 'stripes'", put(f"{K0}/af/stripes", "4000"))
json_vector("af_stripes_0", "FormatError: integer 'stripes'", put(f"{K0}/af/stripes", 0), stricter=USELESS)

ARGON2 = {"type": "argon2id", "time": 4, "memory": 32, "cpus": 1, "salt": "AAAA"}

json_vector("kdf_missing", "FormatError: object 'kdf'", drop(f"{K0}/kdf"))
json_vector("kdf_without_a_type", "FormatError: string 'type'", drop(f"{K0}/kdf/type"))
json_vector("kdf_without_salt", "FormatError: members are not those", drop(f"{K0}/kdf/salt"))
json_vector("kdf_salt_as_number", "FormatError: string 'salt'", put(f"{K0}/kdf/salt", 1))
json_vector("kdf_iterations_as_text", "FormatError: integer 'iterations'", put(f"{K0}/kdf/iterations", "1000"))
json_vector("kdf_iterations_0", "FormatError: integer 'iterations'", put(f"{K0}/kdf/iterations", 0), stricter=USELESS)
json_vector(
    "kdf_with_an_unknown_member",
    "FormatError: members are not those",
    put(f"{K0}/kdf/x", 1),
    stricter="it drops the member from memory, and from disk at the next write",
)
json_vector("kdf_of_an_unknown_type", "FormatError: 'x' is unknown", put(f"{K0}/kdf/type", "x"), stricter=FUTURE)
json_vector("argon2id", "primary", put(f"{K0}/kdf", ARGON2))
json_vector("argon2i", "primary", put(f"{K0}/kdf", ARGON2 | {"type": "argon2i"}))
json_vector(
    "argon2id_with_a_hash",
    "FormatError: members are not those",
    put(f"{K0}/kdf", ARGON2 | {"hash": "x"}),
    stricter="it drops the member",
)
json_vector(
    "argon2id_without_cpus",
    "FormatError: members are not those",
    both(put(f"{K0}/kdf", dict(ARGON2)), drop(f"{K0}/kdf/cpus")),
)


# Tokens

TOKEN = {"type": "x", "keyslots": ["0"]}


def tokens(**members: object) -> forge.Edit:
    return put("tokens", {"0": TOKEN | members})


json_vector("token", "primary", tokens())
json_vector("token_without_keyslots_in_it", "primary", tokens(keyslots=[]))
json_vector("token_naming_a_keyslot_twice", "primary", tokens(keyslots=["0", "0"]))
json_vector("token_32", "primary", put("tokens/32", TOKEN))
json_vector("token_key_not_decimal", "FormatError: 'x' is not a number", put("tokens/x", TOKEN))
json_vector("token_not_an_object", "FormatError: object '0' is missing", put("tokens/0", "x"))
json_vector("token_without_a_type", "FormatError: string 'type'", put("tokens/0", {"keyslots": []}))
json_vector("token_of_type_nothing", "FormatError: string 'type'", tokens(type=""))
json_vector("token_without_keyslots", "FormatError: array of strings 'keyslots'", put("tokens/0", {"type": "x"}))
json_vector("token_keyslots_not_an_array", "FormatError: array of strings 'keyslots'", tokens(keyslots="0"))
json_vector("token_keyslot_as_integer", "FormatError: array of strings 'keyslots'", tokens(keyslots=[0]))
json_vector("token_naming_a_missing_keyslot", "FormatError: names keyslot 7", tokens(keyslots=["7"]))
json_vector("token_naming_a_keyslot_with_a_leading_zero", "FormatError: '00' is not a number", tokens(keyslots=["00"]))
json_vector("keyring_token_with_an_unknown_member", "primary", tokens(type="luks2-keyring", x=1))


# Digests


def digest_beside(**members: object) -> forge.Edit:
    def edit(raw: Json) -> None:
        raw["digests"]["1"] = json.loads(json.dumps(raw["digests"]["0"])) | members

    return edit


json_vector("digest_of_nothing", "primary", digest_beside(keyslots=[], segments=[]))
json_vector("digest_key_not_decimal", "FormatError: 'x' is not a number", renamed("digests", "0", "x"))
json_vector("digest_without_a_type", "FormatError: string 'type'", drop("digests/0/type"))
json_vector("digest_without_keyslots", "FormatError: array of strings 'keyslots'", drop("digests/0/keyslots"))
json_vector("digest_without_segments", "FormatError: array of strings 'segments'", drop("digests/0/segments"))
json_vector("digest_naming_a_missing_keyslot", "FormatError: names keyslot 7", put("digests/0/keyslots", ["0", "7"]))
json_vector("digest_naming_a_missing_segment", "FormatError: names segment 7", put("digests/0/segments", ["0", "7"]))
json_vector("keyslot_in_no_digest", "FormatError: in 0 digests", put("digests/0/keyslots", []))
json_vector("keyslot_in_two_digests", "FormatError: in 2 digests", digest_beside(segments=[]))
json_vector("keyslot_twice_in_one_digest", "primary", put("digests/0/keyslots", ["0", "0"]))
json_vector(
    "keyslot_of_an_unknown_type_in_no_digest", "primary", both(put(f"{K0}/type", "x"), put("digests/0/keyslots", []))
)


# Segments

S0 = "segments/0"


def second_segment(**members: object) -> forge.Edit:
    """The first segment made 1 MiB long, and another of its kind right behind it."""

    def edit(raw: Json) -> None:
        first = raw["segments"]["0"]
        first["size"] = str(KIB * KIB)
        behind = {"offset": str(int(first["offset"]) + KIB * KIB), "size": "dynamic"}
        raw["segments"]["1"] = json.loads(json.dumps(first)) | behind | members
        raw["digests"]["0"]["segments"].append("1")

    return edit


json_vector("no_segments", "FormatError: there is none", both(put("segments", {}), put("digests/0/segments", [])))
json_vector(
    "segment_key_not_decimal",
    "FormatError: 'x' is not",
    both(renamed("segments", "0", "x"), put("digests/0/segments", ["x"])),
)
json_vector(
    "segments_from_1_on",
    "FormatError: not numbered",
    both(renamed("segments", "0", "1"), put("digests/0/segments", ["1"])),
)
json_vector(
    "segments_with_a_gap",
    "FormatError: not numbered",
    both(second_segment(), renamed("segments", "1", "2"), put("digests/0/segments", ["0", "2"])),
)
json_vector("two_segments", "primary", second_segment())
json_vector("segments_overlap", "FormatError: it overlaps", second_segment(offset="16777216", size="4096"))
json_vector(
    "segment_end_of_65_bits", "FormatError: beyond 64 bits", second_segment(offset=str(2**64 - 4096), size="8192")
)
json_vector(
    "first_segment_is_dynamic",
    "FormatError: only the last",
    both(second_segment(size="4096"), put(f"{S0}/size", "dynamic")),
)
json_vector("segment_offset_as_integer", "FormatError: number 'offset'", put(f"{S0}/offset", 16777216))
json_vector("segment_offset_unaligned", "FormatError: not a multiple of 512", put(f"{S0}/offset", str(16777216 + 511)))
json_vector("segment_size_unaligned", "FormatError: not a multiple of 512", put(f"{S0}/size", "513"))
json_vector("segment_size_0", "FormatError: not a multiple of 512", put(f"{S0}/size", "0"))
json_vector(
    "segment_size_of_half_a_sector",
    "FormatError: not a multiple of its sectors",
    both(put(f"{S0}/size", "512"), put(f"{S0}/sector_size", 4096)),
)
json_vector("segment_size_missing", "FormatError: number 'size'", drop(f"{S0}/size"))
json_vector("segment_at_offset_0", "primary", put(f"{S0}/offset", "0"))
json_vector("segment_of_an_unknown_type", "primary", put(f"{S0}/type", "x"))
json_vector("segment_without_digest", "FormatError: no digest", put("digests/0/segments", []))
json_vector(
    "segment_of_an_unknown_type_without_digest", "primary", both(put(f"{S0}/type", "x"), put("digests/0/segments", []))
)
json_vector("segment_without_encryption", "FormatError: string 'encryption'", drop(f"{S0}/encryption"))
json_vector("segment_without_iv_tweak", "FormatError: number 'iv_tweak'", drop(f"{S0}/iv_tweak"))
json_vector("segment_iv_tweak_as_integer", "FormatError: number 'iv_tweak'", put(f"{S0}/iv_tweak", 0))
json_vector("segment_sector_size_as_text", "FormatError: integer 'sector_size'", put(f"{S0}/sector_size", "512"))
json_vector("segment_sector_size_of_513", "FormatError: sector_size 513", put(f"{S0}/sector_size", 513))
json_vector(
    "segment_sector_size_of_1536",
    "FormatError: sector_size 1536",
    put(f"{S0}/sector_size", 1536),
    stricter="dm-crypt has no such sectors",
)
json_vector("segment_flags", "primary", put(f"{S0}/flags", ["x"]))
json_vector("segment_flags_not_an_array", "FormatError: array of strings 'flags'", put(f"{S0}/flags", "x"))
json_vector("segment_flags_of_numbers", "FormatError: array of strings 'flags'", put(f"{S0}/flags", [1]))

INTEGRITY = {"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}

json_vector("segment_integrity", "primary", put(f"{S0}/integrity", INTEGRITY))
json_vector("segment_integrity_not_an_object", "FormatError: object 'integrity'", put(f"{S0}/integrity", "x"))
json_vector("segment_integrity_of_nothing", "FormatError: string 'type'", put(f"{S0}/integrity", {}))
json_vector(
    "segment_integrity_without_journal_encryption",
    "FormatError: string 'journal_encryption'",
    both(put(f"{S0}/integrity", dict(INTEGRITY)), drop(f"{S0}/integrity/journal_encryption")),
)
json_vector(
    "segment_integrity_without_journal_integrity",
    "FormatError: string 'journal_integrity'",
    both(put(f"{S0}/integrity", dict(INTEGRITY)), drop(f"{S0}/integrity/journal_integrity")),
)
json_vector("backup_segment", "primary", second_segment(flags=["backup-final"]))
json_vector(
    "backup_segment_may_overlap",
    "primary",
    both(second_segment(flags=["backup-final"], offset="16777216"), put(f"{S0}/size", "dynamic")),
)
json_vector("backup_segment_only", "FormatError: no regular", put(f"{S0}/flags", ["backup-final"]))
json_vector(
    "backup_segment_first", "FormatError: no regular", both(second_segment(), put(f"{S0}/flags", ["backup-final"]))
)
json_vector(
    "backup_segment_behind_a_gap",
    "FormatError: not numbered",
    both(second_segment(flags=["backup-final"]), renamed("segments", "1", "2"), put("digests/0/segments", ["0", "2"])),
)
json_vector(
    "backup_segment_with_a_huge_number",
    "FormatError: not numbered",
    both(
        second_segment(flags=["backup-final"]),
        renamed("segments", "1", "2000000000"),
        put("digests/0/segments", ["0", "2000000000"]),
    ),
)


# Config

json_vector("json_size_missing", "FormatError: number 'json_size'", drop("config/json_size"))
json_vector("json_size_as_integer", "FormatError: number 'json_size'", put("config/json_size", 12288))
json_vector(
    "json_size_of_another_header", "FormatError: json_size 28672 does not fit", put("config/json_size", "28672")
)
json_vector(
    "json_size_with_a_sign",
    "FormatError: number 'json_size'",
    put("config/json_size", "+12288"),
    stricter="it is not how numbers are written",
)
json_vector("keyslots_size_missing", "FormatError: number 'keyslots_size'", drop("config/keyslots_size"))
json_vector("keyslots_size_unaligned", "FormatError: keyslots_size 1000000 is", put("config/keyslots_size", "1000000"))
json_vector(
    "keyslots_size_over_the_segment",
    "FormatError: behind the first segment",
    put("config/keyslots_size", str(16744448 + 4096)),
)
json_vector("keyslots_size_of_65_bits", "FormatError: out of range", put("config/keyslots_size", str(2**64)))
json_vector(
    "keyslots_size_0",
    "FormatError: keyslots_size 0 is",
    both(put("config/keyslots_size", "0"), put("keyslots", {}), put("digests/0/keyslots", [])),
    stricter="there is no room for keys",
)


def keyslots_mib(mib: int) -> forge.Edit:
    return both(put("config/keyslots_size", str(mib * KIB * KIB)), put(f"{S0}/offset", str((mib + 1) * KIB * KIB)))


@vector("primary")
def keyslots_size_of_128_mib(head):
    return Image(forge.edited(head, keyslots_mib(128)), 140 * KIB * KIB)


@vector("FormatError: keyslots_size 135266304 is")
def keyslots_size_of_129_mib(head):
    return Image(forge.edited(head, keyslots_mib(129)), 140 * KIB * KIB)


json_vector("config_flags", "primary", put("config/flags", ["allow-discards", "x"]))
json_vector("config_flags_not_an_array", "FormatError: array of strings 'flags'", put("config/flags", {}))
json_vector("config_flags_of_numbers", "FormatError: array of strings 'flags'", put("config/flags", [1]))
json_vector("requirements_unknown", "primary", put("config/requirements", {"mandatory": ["x"]}))
json_vector("requirements_optional", "primary", put("config/requirements", {"optional": ["x"]}))
json_vector("requirements_not_an_object", "FormatError: object 'requirements'", put("config/requirements", ["x"]))
json_vector(
    "requirements_mandatory_not_an_array",
    "FormatError: array of strings 'mandatory'",
    put("config/requirements", {"mandatory": "x"}),
)
json_vector(
    "requirements_mandatory_of_numbers",
    "FormatError: array of strings 'mandatory'",
    put("config/requirements", {"mandatory": [1]}),
)


# Re-encryption

REENCRYPT = {
    "type": "reencrypt",
    "key_size": 1,
    "mode": "reencrypt",
    "direction": "forward",
    "priority": 0,
    "area": {"type": "none", "offset": "290816", "size": "16486400"},
}


def reencrypting(*flags: str, slots: int = 1, **members: object) -> forge.Edit:
    """A volume in the middle of a re-encryption."""

    def edit(raw: Json) -> None:
        segment = raw["segments"]["0"]
        backup = json.dumps(segment)
        raw["segments"]["1"] = json.loads(backup) | {"flags": ["backup-final"]}
        raw["segments"]["2"] = json.loads(backup) | {"flags": ["backup-previous"]}
        raw["digests"]["0"]["segments"] += ["1", "2"]
        raw["config"]["requirements"] = {"mandatory": list(flags)}
        for number in range(slots):
            slot = json.loads(json.dumps(REENCRYPT)) | members
            slot["area"] |= {"offset": str(290816 + number * 4096), "size": "4096"}
            raw["keyslots"][str(number + 1)] = slot

    return edit


json_vector("reencryption", "primary", reencrypting("online-reencrypt-v2"))
json_vector("reencryption_of_the_first_version", "primary", reencrypting("online-reencrypt"))
json_vector("reencryption_of_a_later_version", "primary", reencrypting("online-reencrypt-v99"))
json_vector("reencryption_offline", "primary", reencrypting("offline-reencrypt", slots=0))
json_vector(
    "reencryption_without_keyslot", "FormatError: no keyslot of type", reencrypting("online-reencrypt-v2", slots=0)
)
json_vector(
    "reencryption_with_two_keyslots", "FormatError: 2 keyslots of type", reencrypting("online-reencrypt-v2", slots=2)
)
json_vector("reencryption_without_requirement", "FormatError: without the requirement", reencrypting())
json_vector(
    "reencryption_with_two_requirements",
    "FormatError: more than one",
    reencrypting("online-reencrypt-v2", "online-reencrypt-v3"),
)
json_vector("reencryption_without_mode", "FormatError: string 'mode'", reencrypting("online-reencrypt-v2", mode=""))
json_vector(
    "reencryption_without_direction",
    "FormatError: string 'direction'",
    reencrypting("online-reencrypt-v2", direction=""),
)
json_vector("reencryption_in_an_unknown_mode", "FormatError: mode 'x'", reencrypting("online-reencrypt-v2", mode="x"))
json_vector(
    "reencryption_in_an_unknown_direction",
    "FormatError: direction 'x'",
    reencrypting("online-reencrypt-v2", direction="x"),
)
json_vector(
    "reencryption_with_a_key", "FormatError: key_size is not 1", reencrypting("online-reencrypt-v2", key_size=2)
)
json_vector(
    "reencryption_without_backup_segment",
    "FormatError: a backup segment",
    both(reencrypting("online-reencrypt-v2"), put("segments/2/flags", ["backup-x"])),
)
json_vector(
    "reencryption_to_something_else", "primary", both(reencrypting("online-reencrypt-v2"), put("segments/1/type", "x"))
)
json_vector(
    "reencryption_from_something_else",
    "FormatError: does not match the backup",
    both(reencrypting("online-reencrypt-v2"), put("segments/1/type", "x"), put("segments/2/encryption", "x")),
)
json_vector(
    "reencryption_of_what_does_not_match_its_end",
    "FormatError: does not match the backup",
    both(
        reencrypting("online-reencrypt-v2"),
        put(f"{S0}/flags", ["in-reencryption"]),
        put("segments/1/encryption", "x"),
    ),
)


def resilience(**area: object) -> forge.Edit:
    """A re-encryption that protects its data in a certain way."""

    def edit(raw: Json) -> None:
        reencrypting("online-reencrypt-v2")(raw)
        raw["keyslots"]["1"]["area"] |= area

    return edit


CHECKSUM = {"type": "checksum", "hash": "sha256", "sector_size": 512}
SHIFT = {"type": "datashift", "shift_size": "4096"}

json_vector("reencryption_with_checksums", "primary", resilience(**CHECKSUM))
json_vector(
    "reencryption_with_checksums_of_no_hash", "FormatError: string 'hash'", resilience(**CHECKSUM | {"hash": ""})
)
json_vector(
    "reencryption_with_checksums_of_odd_sectors",
    "FormatError: not a power of two",
    resilience(**CHECKSUM | {"sector_size": 1536}),
)
json_vector("reencryption_with_a_shift", "primary", resilience(**SHIFT))
json_vector(
    "reencryption_with_a_shift_of_nothing",
    "FormatError: shift_size 0",
    resilience(**SHIFT | {"shift_size": "0"}),
)
json_vector(
    "reencryption_with_an_unaligned_shift",
    "FormatError: shift_size 513",
    resilience(**SHIFT | {"shift_size": "513"}),
)
json_vector(
    "reencryption_with_a_shift_and_checksums",
    "primary",
    resilience(**SHIFT | CHECKSUM | {"type": "datashift-checksum"}),
)
