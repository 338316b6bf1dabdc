"""A missing package is named with the extra that brings it, from one table."""

import sys

import pytest

from moe3d_deploy.errors import EXTRA_OF, MissingExtraError, require


@pytest.mark.parametrize(("package", "extra"), EXTRA_OF.items())
def test_a_package_that_is_not_there_is_named_with_its_extra(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(MissingExtraError) as caught:
        require(package)

    assert str(caught.value) == f"{package} is not installed: pip install 'moe3d-deploy[{extra}]'"


def test_a_package_that_is_there_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sympy", raising=False)

    require("sympy")

    assert "sympy" not in sys.modules
