"""The conformance kit: named checks that a plugin's author runs in his own tests.

::

    from kdcore.testing import parametrize_with_checks

    @parametrize_with_checks("acme")
    def test_conforms(check):
        check()

runs every check of everything that the installed plugin acme registers, and of the plugin itself, each as a test of its
own: ``test_conforms[loss-margin-gradcheck]``. It takes modules with ``kdcore_register`` and single subjects, too::

    @parametrize_with_checks(Subject("loss", "margin", Margin, Margin.Options(width=0.5)))

:func:`verdicts` gives the same as a table: passed, failed or skipped, with the reason. What each check promises is said
where it stands, in ``kdcore/testing/strategy.py``, ``controller.py``, ``loss.py``, ``model.py`` and ``plugin.py``.

A check needs options. It takes the defaults; an options class with required fields gives an example::

    class Options(kdcore.Options):
        example: ClassVar = {"size": 2}
        size: int = kdcore.Field(ge=1, description="the number of layers, at least 1")

:mod:`kdcore.testing.strategies` has hypothesis strategies for tests of your own. Importing this package imports neither
torch nor pytest nor hypothesis.
"""

from __future__ import annotations

from .strategy import run_view
from .subject import Check, Subject, Verdict, checks_of, parametrize_with_checks, subjects_of, verdicts

__all__ = ["Check", "Subject", "Verdict", "checks_of", "parametrize_with_checks", "run_view", "subjects_of", "verdicts"]
