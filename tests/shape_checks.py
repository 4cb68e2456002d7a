"""The type checker that the tests run the library under: beartype, with int accepted for float as Python does."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
