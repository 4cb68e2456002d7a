"""Data sets in memory: `load("mnist")` finds, checks, reads and keeps them, and fetches those that are not here."""

from __future__ import annotations

from lathe.data.kinds import Fields, Graph, Graphs, Images, OneShot, Ratings, Text, Views
from lathe.data.store import DataUnavailable, get, listing, load, names, where

__all__ = [
    "DataUnavailable",
    "Fields",
    "Graph",
    "Graphs",
    "Images",
    "OneShot",
    "Ratings",
    "Text",
    "Views",
    "get",
    "listing",
    "load",
    "names",
    "where",
]
