"""One test over many files: thousands of tests, one a file and rule, take longer to collect than to run."""

from __future__ import annotations

from collections.abc import Callable, Collection

__all__ = ["for_all"]


def for_all(names: Collection[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """Make a test that runs a function with each name, and fails with all the names where an assertion does not hold.

    Args:
        names: Names of modules or files, at least one.
    """

    def decorate(rule: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            broken = {name: error for name in names if (error := _broken(rule, name))}
            assert not broken, "\n".join(f"{name}: {error}" for name, error in broken.items())
            assert names, "there is nothing to hold the rule to"

        test.__name__, test.__doc__, test.__module__ = rule.__name__, rule.__doc__, rule.__module__
        return test

    return decorate


def _broken(rule: Callable[[str], None], name: str) -> AssertionError | None:
    try:
        rule(name)
    except AssertionError as error:
        return error
    return None
