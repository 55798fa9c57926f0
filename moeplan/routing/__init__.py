"""Routing traces and expert loads: read, convert, validate, measure and synthesise them."""
