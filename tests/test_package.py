"""The package's face: public names, and that importing them costs nothing until they are used."""

import subprocess
import sys

import pytest

import hf_contmerge


@pytest.mark.parametrize("name", hf_contmerge.__all__)
def test_public_names_exist(name):
    assert getattr(hf_contmerge, name) is not None


def test_importing_the_package_is_cheap():
    code = "import sys, hf_contmerge; print(sorted({'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        hf_contmerge.nothing_of_ours  # noqa: B018
