"""What makes two evaluations the same one."""

from typing import Any

PARTS = ("protocol", "settings", "weights", "train", "test")


def difference(there: dict[str, Any], here: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key of two identities that differs, with both values; None where none does."""
    found, wanted = _flat(there), _flat(here)
    # Another protocol has other settings, which would tell less.
    for key in ["protocol", *sorted(found.keys() | wanted.keys())]:
        if found.get(key) != wanted.get(key):
            return key, found.get(key), wanted.get(key)
    return None


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    flat = {"protocol": identity["protocol"], **identity["settings"]}
    for part in PARTS[2:]:
        flat |= {f"{part}.{key}": value for key, value in identity[part].items()}
    return flat
