# SPDX-License-Identifier: GPL-2.0-or-later
"""Target: the lines between the daemon and its worker.  An input is a line."""

import atheris

with atheris.instrument_imports(include=["luksrotd"]):
    from luksrotd.errors import EngineError
    from luksrotd.rotation import wire
    from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, RemoveToken, SetToken, to_wire
    from tests.fuzz import driver
    from tests.support import hostile


if __name__ == "__main__":
    edits = (AddKeyslot(3), SetToken(2, {"type": "x", "keyslots": ["1"]}, 1), RemoveToken(1), DestroyKeyslot(2))
    lines = [*(wire.encode(to_wire(edit)) for edit in edits), wire.success({"a": [1]}), wire.failure(EngineError("x"))]
    driver.run(hostile.check_wire, lines, driver.mutate_json)
