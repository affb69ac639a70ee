"""A plan as one HTML page that needs nothing but a browser; read :mod:`.page` first."""

from galvatron_compile.explain.page import page

__all__ = ["page"]
