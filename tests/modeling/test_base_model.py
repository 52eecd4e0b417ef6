"""Where a base model is found by its name."""

import pytest

from fedbe.assets import micro_path
from fedbe.errors import ConfigError, Facts
from fedbe.modeling.base_model import BaseModel, packaged_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that carries the micro model and that must not be run."""
    folder = tmp_path / "tiny_carrier"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('the code of a package that only carries a model was run')")
    (folder / "model").symlink_to(micro_path())
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_model_inside_an_installed_package_is_found_without_running_it(package):
    model = BaseModel("package:tiny_carrier/model")
    assert packaged_path(model.name) == package / "model"
    assert model.check("model", Facts()) == []
    assert model.depth == BaseModel().depth
    assert model.processor("text").input_ids == BaseModel().processor("text").input_ids


def test_a_package_that_is_not_installed_is_named_with_its_installation():
    (problem,) = BaseModel("package:no_such_package_here/model").check("model", Facts())
    assert problem.key == "model.name"
    assert "pip install no-such-package-here" in problem.remedy


@pytest.mark.parametrize("name", ["package:", "package:/model", "package:a.b/model", "package:this/model"])
def test_what_names_no_package_is_a_mistake_of_the_configuration(name):
    with pytest.raises(ConfigError, match="not installed"):
        packaged_path(name)


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "package:tiny_carrier/weights"])
def test_a_folder_that_is_not_there_is_not_sought_on_the_hub(name, package):
    (problem,) = BaseModel(name).check("model", Facts())
    assert "there is no such folder" in problem.remedy
