# SPDX-License-Identifier: GPL-2.0-or-later
"""What limits a figure of docs/benchmarks, where it is not what was to be reached, and how that is known."""

from collections.abc import Mapping
from typing import Final

#: By number of the measurement.
REMARKS: Final[Mapping[int, str]] = {
    1: """What limits it is the library: its four calls alone take about as long as the whole of systemd-cryptenroll,
so no rotation that opens the keyslot it has made reaches 0.7. To open or to add a keyslot for a key of 512 bit is
16,004 digests that OpenSSL begins anew (counted by a library loaded before it): 48,012 for a rotation of ours,
which opens, adds, and opens what it added; systemd-cryptenroll, which does not look at what it made, begins 24,014.
The rest is polkit and D-Bus, wipefs before and after, the plan, six flushes, and the next worker, which starts
meanwhile.""",
    2: """With a generated key both unlock one Argon2id keyslot and derive nothing else that costs anything, so
neither can take half of the time of the other. With a passphrase of the user's, both unlock, let libcryptsetup do
its benchmark and derive the new key; ours derives it once more, to open what it has made before the old keyslot
goes. What the benchmark takes is the difference to "cost given", of which the rest are three derivations. One of them
could be saved by not opening the new keyslot: then a key that nobody has ever seen open would be the only one, and no
other look at a keyslot shows that it opens. So it stays. The benchmark chooses another cost each time, and with it how
long a round takes; a cost that was measured once, maybe while the machine was booting, would be with the volumes for
years, so it is kept for nothing.""",
    3: """Nearly all of it is Python: of some 236 ms (on a loaded machine; from the profile of one run) 11 are its
start and 124 the import of luksrotctl, asyncio and the use cases, of which half goes into making dataclasses; 33
are libcryptsetup's in the worker, whose own start is hidden beside the imports, 24 all else. Making dataclasses by
code of our own would save 40 ms; it was tried, and left out, as a library beats our own code outside of
transactions.""",
    6: """What is beyond the bytes and their flushes is the reading back of all of them past the page cache, and the
comparison with the snapshot: a device may lose a write and report success, and then the old key must not go. The ratio
was 1.9 before the descriptor and the buffer of these reads were kept (150 rounds on the same day). To look at both
headers only, where a header copy that was written and both of them are looked at one after the other, would make it
1.55; it was tried, and left out, for each write has its own check. A flush takes a third of a millisecond on this
machine, whose disk is a file of its host; on a disk where it takes five, the same reads would be a thirtieth of the
commit.""",
    7: """A volume in order costs one read past the page cache, its checksums, its JSON and its inventory in Python,
and a thirty-second part of a wipefs, which itself takes 0.15 to 0.24 ms for each volume. Before, it was one
luksDump for each: 8 ms (docs/adr/0030). Of 1.3 ms for a volume (one run, of 400), the thread that looks at them takes
1.0, of which the disk has 0.3, and the event loop the rest. Two or three such threads were tried, and are no faster:
they take turns at Python.""",
    8: """It is as much as the machine gives: two threads that do nothing but derive keys are faster than one by the
ratio in the table, which is less than 1.8 on this virtual machine. One at a time already uses the second one a
little: the next worker starts there.""",
}
