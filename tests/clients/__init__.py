# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients of the service in other libraries than its own, run by tests/integration/test_clients.py.

Each gets the object path of a volume and three files with secrets, enrols, rotates, and prints one JSON document of
what it has seen.  They run on the system's Python, whose libraries Debian ships, and import nothing of luksrotd.
"""
