"""Checkpoint folders in the official V3 layout: read as mapped views, loaded, converted, imported, written, fetched."""
