"""Runs the text of a .metal compute kernel on the CPU, checked; see host.py."""

from .host import In, InOut, KernelError, Library, Out, Run, build, lint, why_no_lint, why_unavailable

__all__ = ["In", "InOut", "KernelError", "Library", "Out", "Run", "build", "lint", "why_no_lint", "why_unavailable"]
